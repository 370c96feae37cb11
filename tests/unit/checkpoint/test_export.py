"""The exported model in a process that has stock transformers and nothing of this project."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from stat import S_IMODE

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import BertConfig

from geneformer_pretrain.cli import main
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.training.main import run
from modeling_bert_te import BertForMaskedLM
from tests.checkpoints import FILE, read_checkpoint
from tests.tiny import (
    VOCAB_SIZE,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    tiny_config,
)

pytestmark = pytest.mark.process

OLD = Path(__file__).parents[2] / "data/checkpoints_0_1"

STOCK = """
import sys, warnings
warnings.simplefilter("error")
import torch
for name in ("modeling_bert_te", "geneformer_pretrain", "train"):
    sys.modules[name] = None  # an import of it raises
from transformers import AutoModelForMaskedLM, BertForMaskedLM, BertForSequenceClassification

folder, inputs, outputs = sys.argv[1:]
batch = torch.load(inputs)
results = {}
for cls in (BertForMaskedLM, AutoModelForMaskedLM):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert type(model) is BertForMaskedLM
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        results[cls.__name__] = model.eval()(**batch).logits
cls = BertForSequenceClassification
classifier, info = cls.from_pretrained(folder, num_labels=3, output_loading_info=True)
# Only what pretraining never had is new: pooler and classifier.
assert all(key.startswith(("bert.pooler.", "classifier.")) for key in info["missing_keys"]), info
assert classifier(**batch).logits.shape == (2, 3)
results["word"] = classifier.bert.embeddings.word_embeddings.weight.detach()
results["last"] = classifier.bert.encoder.layer[-1].output.dense.weight.detach()
torch.save(results, outputs)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model after three real steps, so that no bias is zero and no LayerNorm weight one."""
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(folder, "training.num_train_steps=3", "model.hidden_act=gelu")
    assert run(config) == 0
    return folder / "run" / "final_model"


def make_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB_SIZE, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_stock_classes_load_it_without_this_project(exported, tmp_path):
    inputs, outputs = tmp_path / "in.pt", tmp_path / "out.pt"
    batch = make_batch()
    torch.save(batch, inputs)
    subprocess.run(
        [sys.executable, "-I", "-c", STOCK, exported, inputs, outputs], cwd=tmp_path, check=True, timeout=120
    )
    results = torch.load(outputs)
    model = BertForMaskedLM.from_pretrained(exported).eval()
    with torch.no_grad():
        ours = model(**batch)
    valid = batch["attention_mask"].bool()
    assert ours.logits.std() > 0.01
    for name in ("BertForMaskedLM", "AutoModelForMaskedLM"):
        assert_close(results[name][valid], ours.logits[valid], atol=1e-5, rtol=0)
    assert torch.equal(results["word"], model.bert.embeddings.word_embeddings.weight)
    assert torch.equal(results["last"], model.bert.encoder.layer[-1].output.dense.weight)


def test_folder_holds_one_float32_file_and_a_stock_configuration(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((exported / "config.json").read_text())
    stock = {*BertConfig().to_dict(), "torch_dtype", "architectures"}
    assert set(config) - stock == {"geneformer_max_tokens"}  # seq_length, as there are more positions
    assert config["geneformer_max_tokens"] < config["max_position_embeddings"]
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["model_type"] == "bert"
    assert (config["type_vocab_size"], config["pad_token_id"]) == (2, 0)
    assert (config["hidden_act"], config["vocab_size"]) == ("gelu", VOCAB_SIZE)
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    weights = load_file(exported / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "cls.predictions.decoder.weight" not in weights


def test_equals_the_last_checkpoint(exported):
    """Nothing is lost on the way: every weight of the checkpoint is in the export, bit by bit."""
    checkpoint = read_checkpoint(exported.parent / "step_3")
    weights = load_file(exported / "model.safetensors")
    assert weights
    assert weights.keys() == {name.removeprefix("model.") for name in checkpoint if name.startswith("model.")}
    for name, value in weights.items():
        assert torch.equal(value, checkpoint[f"model.{name}"]), name


def test_loads_in_bfloat16(exported):
    model = BertForMaskedLM.from_pretrained(exported, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(make_batch()["input_ids"]).prediction_logits).all()


def test_a_later_export_replaces_the_earlier(exported):
    before = (exported / "model.safetensors").stat().st_ino
    folder = exported.parents[1]
    config = tiny_config(folder, "training.num_train_steps=3", "model.hidden_act=gelu")
    assert run(config) == 0
    assert (exported / "model.safetensors").stat().st_ino != before
    assert not [path for path in exported.parent.iterdir() if path.suffix in (".tmp", ".replaced")]
    assert Path(exported / "config.json").is_file()


@pytest.mark.parametrize("engine", ["training.use_fsdp2=false", "training.use_fsdp2=true"])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, engine):
    before = os.umask(0o027)
    try:
        assert run(tiny_config(tmp_path, engine, "training.log_cell_ids=true")) == 0
    finally:
        os.umask(before)
    found = {path.relative_to(tmp_path): path for path in (tmp_path / "run").rglob("*")}
    assert {"model.safetensors", "config.json", "manifest.json", "metrics.jsonl"} <= {path.name for path in found}
    for name, path in found.items():
        assert S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), name


def test_what_an_interrupted_export_left_is_no_obstacle(tmp_path):
    config = tiny_config(tmp_path)
    assert run(config) == 0
    final_model = tmp_path / "run/final_model"
    weights = (final_model / "model.safetensors").read_bytes()
    final_model.rename(tmp_path / "run/final_model.replaced")
    (tmp_path / "run/final_model.tmp").mkdir()
    (tmp_path / "run/final_model.tmp/model.safetensors").touch()
    for _ in range(2):
        assert run(config) == 0
        assert (final_model / "model.safetensors").read_bytes() == weights
        assert not list((tmp_path / "run").glob("final_model.*"))
        (tmp_path / "run/final_model.replaced/deep").mkdir(parents=True)


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    config = tiny_config(tmp_path)
    assert run(config) == 0
    final_model = tmp_path / "run/final_model"
    final_model.rename(tmp_path / "elsewhere")
    final_model.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert run(config) == 0
        assert not list((tmp_path / "run").glob("final_model.*"))
        assert not final_model.is_symlink()
        assert (final_model / "model.safetensors").is_file()
        assert (tmp_path / "elsewhere/model.safetensors").is_file()


def test_a_link_that_leads_nowhere_is_replaced_and_a_file_is_not(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "run").mkdir()
    final_model = tmp_path / "run/final_model"
    final_model.symlink_to(tmp_path / "not mounted")
    assert run(config) == 0
    assert not final_model.is_symlink()
    shutil.rmtree(final_model)
    final_model.write_text("mine")
    with pytest.raises(TrainingError, match=rf"cannot write to {final_model} \(Not a directory\)"):
        run(config)
    assert final_model.read_text() == "mine"


def test_an_export_that_may_not_be_replaced_is_named(tmp_path, monkeypatch):
    """And it stays; root, who runs tests in containers, may write everywhere."""
    config = tiny_config(tmp_path)
    assert run(config) == 0
    final_model = tmp_path / "run/final_model"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: Path(path) != final_model)
        with pytest.raises(TrainingError, match=rf"cannot write to {final_model} \(Permission denied\)"):
            run(config)
    assert (final_model / "config.json").is_file()
    assert not list((tmp_path / "run").glob("final_model.*"))


def test_a_leftover_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    assert run(config) == 0
    delete, left = shutil.rmtree, tmp_path / "run/final_model.replaced"
    left.mkdir()

    def refuse(folder, *args, **kwargs):
        if folder == left:
            raise PermissionError(errno.EACCES, "Permission denied", "config.json")  # a file inside, as shutil names it
        delete(folder, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(TrainingError, match=rf"cannot write to {left} \(Permission denied\)"):
        run(config)
    assert (tmp_path / "run/final_model/config.json").is_file()


# The command


def export(capsys, *arguments):
    """Run `geneformer-pretrain export`; return its exit code and what it printed."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


@pytest.mark.parametrize("engine", ["training.use_fsdp2=false", "training.use_fsdp2=true"])
def test_command_exports_what_the_run_does(tmp_path, capsys, engine):
    """The newest checkpoint of the run's folder, or any of its steps; the run's folder stays as it is."""
    assert run(tiny_config(tmp_path, engine, "training.num_train_steps=3", "training.save_every_n_steps=1")) == 0
    folder = tmp_path / "run"
    (folder / "step_4.tmp").mkdir()  # as if it were still training
    before = sorted(folder.rglob("*"))
    final = {path.name: path.read_bytes() for path in (folder / "final_model").iterdir()}
    for source, output in ((folder, "newest"), (folder / "step_3", "third")):
        code, printed = export(capsys, source, "--output", tmp_path / output, "--report", tmp_path / "report.json")
        assert code == 0
        assert f"Exported {folder}/step_3 to {tmp_path / output}" in printed
        assert {path.name: path.read_bytes() for path in (tmp_path / output).iterdir()} == final
        assert json.loads((tmp_path / "report.json").read_text())["step"] == 3
    code, _ = export(capsys, folder / "step_2", "--output", tmp_path / "second")
    assert code == 0
    assert (tmp_path / "second/model.safetensors").read_bytes() != final["model.safetensors"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_command_exports_checkpoints_of_release_0_1(tmp_path, capsys, engine):
    source = OLD / engine / "step_3"
    assert export(capsys, source, "--output", tmp_path / "model")[0] == 0
    model, info = BertForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] or set(info["missing_keys"]) <= {"cls.predictions.decoder.weight"}
    expected = read_checkpoint(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"]), name


def test_command_passes_over_damage_and_says_so(tmp_path, capsys):
    assert run(tiny_config(tmp_path, "training.save_every_n_steps=1")) == 0
    folder = tmp_path / "run"
    (folder / "step_2" / FILE).write_bytes(b"")
    code, printed = export(capsys, folder, "--output", tmp_path / "model")
    assert code == 0
    assert f"{folder}/step_2 is damaged: {FILE} has 0 bytes" in printed
    assert f"Exported {folder}/step_1 to" in printed
    code, printed = export(capsys, folder / "step_2", "--output", tmp_path / "other")
    assert code == 1
    assert printed.startswith(f"Error: {folder}/step_2 cannot be exported: {FILE} has 0 bytes")
    assert "Traceback" not in printed
    (folder / "step_1" / "manifest.json").unlink()
    code, printed = export(capsys, folder, "--output", tmp_path / "other")
    assert code == 1
    assert f"Error: {folder} has no checkpoint that can be exported; {folder}/step_2 is damaged: " in printed
    assert not (tmp_path / "other").exists()


def test_command_refuses_mistakes_in_one_line(tmp_path, capsys):
    source = OLD / "ddp"
    assert "Error: " in export(capsys, tmp_path / "absent", "--output", tmp_path / "x")[1]
    (tmp_path / "taken").mkdir()
    code, printed = export(capsys, source, "--output", tmp_path / "taken")
    assert (code, printed.count("\n")) == (1, 1)
    assert "--overwrite" in printed
    assert export(capsys, source, "--output", tmp_path / "taken", "--overwrite")[0] == 0
    assert (tmp_path / "taken/model.safetensors").is_file()


def test_a_gene_set_goes_with_the_model(tmp_path, capsys):
    genes = tmp_path / "genes"
    genes.mkdir()
    pq.write_table(pa.table({"token": [f"g{number}" for number in range(VOCAB_SIZE)]}), genes / "genes.parquet")
    for name in ("gene_set.json", "vocab.txt", "tokenizer_config.json"):
        (genes / name).write_text(name)
    (genes / "config.json").write_text("of another model")
    (genes / "model.safetensors").write_text("of another model")
    assert export(capsys, OLD / "ddp", "--output", tmp_path / "model", "--gene-set", genes)[0] == 0
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "gene_set.json",
        "genes.parquet",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert (tmp_path / "model/vocab.txt").read_text() == "vocab.txt"
    BertForMaskedLM.from_pretrained(tmp_path / "model")
    pq.write_table(pa.table({"token": ["g"]}), genes / "genes.parquet")
    code, printed = export(capsys, OLD / "ddp", "--output", tmp_path / "other", "--gene-set", genes)
    assert code == 1
    assert f"{genes} has 1 tokens, but the model has {VOCAB_SIZE}" in printed
