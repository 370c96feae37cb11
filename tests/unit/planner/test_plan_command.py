"""`plan` as users type it."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.cli import main
from geneformer_pretrain.commands.plan import SAMPLE
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model.memory import num_parameters
from geneformer_pretrain.planner.measured import card
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.conftest import ROOT
from tests.corpora import write_corpus_folder
from tests.unit.planner.conftest import model

TE = "model.use_te_layers=true"


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ending:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(ending.value.code or 0), captured.out, captured.err


def test_plan_prints_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "plan.json"
    started = time.monotonic()
    code, out, _ = run_plan(
        capsys,
        *("--config-name", "106m", "--gpus", "8", "--gpu", "H100", "--price", "2.5", "--report", str(report)),
        "training.num_train_steps=5000",
    )
    assert time.monotonic() - started < 10
    assert code == 0
    values = json.loads(report.read_text())
    assert values["num_parameters"] == 106_775_122
    assert values["num_train_steps"] == 5000
    assert [engine["engine"] for engine in values["engines"]] == ["DDP", "FSDP2", "FSDP2, groups of 4"]
    memory = values["engines"][0]["memory"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    for text in ("106,775,122 parameters", "Genecorpus-30M", "activations", "~ estimated", "GPU-hours, cost"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 190


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "v100"], "--gpu v100: not among the GPUs that are known: h100, h200"),
        (["--gpus", "0"], "--gpus 0: it must be positive"),
        (["--gpus", "12"], "--gpus 12 is no multiple of --gpus-per-node 8"),
        (["--network", "0"], "--network 0.0: it must be a number of at least 1e-06"),
        (["--tokens", "0"], "--tokens 0.0: it must be a number of at least 1"),
        (["--tokens", "inf"], "--tokens inf: it must be a number"),
        (["--price", "nan"], "--price nan: it must be a number"),
        (["data.path=s3://bucket/cells"], "s3://bucket/cells: a remote address"),
        (["model.hidden_size=300"], "make heads of size 75"),
        (["training.use_fp8=true", "--gpu", "l40s"], "FP8 with PyTorch layers needs compute capability 9 or 10"),
        (["data.path=none.parquet"], "none.parquet: no such file or folder"),
        (["data.gene_set=none"], "data.gene_set: none"),
        (["--config-name", "4b", "--gpu", "a100"], "has no FP8: set training.use_fp8=false"),
        (["--gpus", "4", "training.use_fsdp2=true", "training.shard_group_size=3"], "does not divide the 4 GPUs"),
        (["data.packing=false"], "plan sizes packed runs"),
        (["training.compute_dtype=float32"], "plan sizes runs in BF16 and FP8"),
        (["training.sede=1"], "did you mean training.seed"),
        (["--corpus", "none.parquet"], "none.parquet: no such file or folder"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run_plan(capsys, *arguments)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert said in line


def test_the_example_of_the_documentation_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/scaling.md").read_text()
    _, command, _, example, _ = text.split("```", 5)[:5]
    code, out, _ = run_plan(capsys, *command.split()[3:])
    assert code == 0
    assert out == example.removeprefix("\n")


BF16 = "training.use_fp8=false"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--gpu", "h100", TE], "It fits with model.micro_batch_size=7, or with training.recompute_every_n_layers=2."),
        (["--gpu", "h100", "--gpus", "8", TE], "It fits with training.use_fsdp2=true."),
        (
            ["--gpu", "h100", "--gpus", "8", TE, "training.use_fsdp2=true", "training.shard_group_size=1"],
            "It fits with training.shard_group_size=null.",
        ),
        (["--gpu", "l40s", BF16], "recomputation makes it fit on 1 of these GPUs; 2 are enough: --gpus 2 with "),
        (["--gpu", "l40s", "--gpus", "8", BF16], "It fits with training.use_fsdp2=true model.micro_batch_size=8, or "),
        (["--gpu", "l40s", "--gpus", "8", TE], "It fits with training.use_fsdp2=true model.micro_batch_size=7, or "),
        (["--gpu", "rtx4090", "--gpus", "2", TE, "training.use_fsdp2=true"], "3 are enough: --gpus 3 with "),
        (["--gpu", "rtx4090", "--gpus", "8", BF16], "or with training.recompute_every_n_layers=1 training.use_fsdp2"),
        (["--gpu", "a100-40gb", BF16], "2 are enough: --gpus 2 with "),
        (["--gpu", "a100-40gb", "--gpus", "16", BF16, "training.use_nvfsdp=true"], "It fits with "),
        (["--gpu", "rtx4090", "--gpus-per-node", "1", BF16], "3 are enough: --gpus 3 with "),
        (
            ["--gpu", "l40s", "--gpus", "2", BF16, "training.use_fsdp2=true", "training.reshard_after_forward=false"],
            "training.reshard_after_forward=null",
        ),
        (
            ["--gpu", "h100", "training.cuda_graphs=true", TE.replace("true", "false"), BF16],
            "training.cuda_graphs=null",
        ),
        (["--gpu", "rtx4090", BF16, "model.micro_batch_size=1", "model.num_hidden_layers=72"], "are enough: --gpus "),
    ],
)
def test_every_remedy_for_lack_of_memory_fits_by_the_plan(
    capsys: pytest.CaptureFixture[str], arguments: list[str], remedy: str
) -> None:
    _, out, _ = run_plan(capsys, "--config-name", "4b", *arguments)
    (line,) = (line for line in out.splitlines() if line.startswith("!"))
    assert " does not fit: " in line
    assert remedy in line
    options, keys = ([each for each in arguments if ("=" in each) == is_key] for is_key in (False, True))
    more = " ".join(re.findall(r"--gpus \d+", line)).split()
    ways = line.split(" with ")[1:]
    for way in ways:
        _, out, _ = run_plan(capsys, "--config-name", "4b", *options, *more, *keys, *re.findall(r"\S+=\w+", way))
        assert "does not fit" not in out
        assert "whole run" in out
    assert ways


def test_a_model_that_no_number_of_gpus_holds(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ("model.hidden_size=25600", "model.num_attention_heads=400")
    _, out, _ = run_plan(capsys, "--config-name", "4b", "--gpu", "rtx4090", BF16, *wide)
    assert "makes it fit on up to 1,024 of these GPUs: use GPUs with more memory." in out


def test_data_path_is_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"input_ids": [[5, 6, 7], [8]]}), tmp_path / "cells.parquet")
    _, out, _ = run_plan(capsys, f"data.path={tmp_path}/cells.parquet", "data.validation_fraction=0.5")
    assert "epoch        1 step; the run has 150, 150 epochs\n" in out
    assert f"1 cell, 2 tokens ({tmp_path}/cells.parquet)" in out


def test_an_epoch_of_less_than_a_step_says_what_a_step_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve cells of 500 tokens fill three packs of 2,048."""
    pq.write_table(pa.table({"input_ids": [list(range(2, 502))] * 12}), tmp_path / "cells.parquet")
    _, out, _ = run_plan(capsys, f"data.path={tmp_path}/cells.parquet", "--gpus", "1")
    assert "epoch        3 steps; the run has 150, 50 epochs\n" in out
    _, out, _ = run_plan(capsys, f"data.path={tmp_path}/cells.parquet", "--gpus", "6")
    assert (
        "epoch        less than one step; the run has 150, 300 epochs\n"
        "             all cells fill 3 of the 6 micro-batches of a step, which reads each cell 2.0 times\n"
    ) in out


def test_a_corpus_brings_the_vocabulary_of_its_gene_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["<pad>", "<mask>", *(f"gene{number}" for number in range(98))]
    genes = GeneSet("toy", "human", names, [None] * 100, np.array([np.nan] * 2 + [1.0] * 98), max_tokens=2048)
    corpus = write_corpus_folder(tmp_path / "corpus", [[[5, 6, 7], [8]]], gene_set=genes.describe())
    report = tmp_path / "plan.json"

    def size(*arguments: str) -> tuple[int, str]:
        code, out, err = run_plan(capsys, "--report", str(report), "--config-name", "10m", *arguments)
        assert code == 0, err
        values = json.loads(report.read_text())
        assert f"{values['num_parameters']:,} parameters" in out
        assert values["num_parameters"] == num_parameters(
            model(load_config("10m"), vocab_size=values["vocab_size"]).model
        )
        return values["vocab_size"], out

    said = "100 tokens of the corpus's gene set, toy: give it to train.py, data.gene_set="
    for way in (["--corpus", str(corpus)], [f"data.path={corpus}"], [f"data.path='{corpus}/part-*.parquet'"]):
        vocabulary, out = size(*way)
        assert vocabulary == 100
        assert f"{said}FOLDER\n" in out
    assert size("--corpus", str(corpus), "model.vocab_size=3000")[0] == 3000
    (corpus / "corpus.json").rename(corpus / "aside")
    assert size("--corpus", str(corpus))[0] == 25_426
    (corpus / "aside").rename(corpus / "corpus.json")

    genes.save(corpus / "gene_set")
    assert f"{said}{corpus}/gene_set\n" in size("--corpus", str(corpus))[1]
    vocabulary, out = size("--corpus", str(corpus), f"data.gene_set={corpus}/gene_set")
    assert vocabulary == 100
    assert "vocabulary" not in out
    replace(genes, name="other", medians=2 * genes.medians).save(tmp_path / "other")
    code, _, err = run_plan(capsys, "--corpus", str(corpus), f"data.gene_set={tmp_path}/other")
    assert code == 1
    assert "tokenized with the gene set 'toy', which is not 'other'" in err


@pytest.mark.parametrize("prefix", ["", "++"])
def test_data_path_is_the_corpus_however_it_is_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    pq.write_table(pa.table({"input_ids": [[5, 6, 7], [8]]}), tmp_path / "cells.parquet")
    _, out, _ = run_plan(capsys, f"{prefix}data.path={tmp_path}/cells.parquet")
    assert f"2 cells, 4 tokens ({tmp_path}/cells.parquet)" in out
    monkeypatch.setattr("geneformer_pretrain.commands.plan.SAMPLE", "another.parquet")  # as if a configuration set it
    _, out, _ = run_plan(capsys)
    assert f"({load_config().data.path})" in out


def test_the_shipped_path_is_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config().data.path == SAMPLE
    assert "Genecorpus-30M" in run_plan(capsys)[1]
    assert f"({SAMPLE})" in run_plan(capsys, f"data.path={SAMPLE}")[1]


def test_unknown_gpu_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="h100"):
        card("tpu")
