"""examples/finetune_cell_types.py on simulated cells and a small export: it runs, learns and refuses bad columns."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from tests.tiny import one_cpu_thread  # noqa: F401

ROOT = Path(__file__).resolve().parents[3]
V = 100


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_cell_types", ROOT / "examples/finetune_cell_types.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_act="relu", pad_token_id=0,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_cells(path: Path, number: int, seed: int) -> Path:
    """Cells of three types, whose top genes are the type's own; a rare type and cells without a type."""
    generator = np.random.default_rng(seed)
    types = np.arange(number) % 3
    tokens = [
        np.concatenate([2 + 20 * kind + generator.permutation(20)[:8], 62 + generator.permutation(30)[:10]])
        for kind in types
    ]
    names: list[str | None] = [f"type {kind}" for kind in types]
    names[:3], names[3:6] = ["rare"] * 3, [None] * 3
    pq.write_table(pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32())), "cell_type": names}), path)
    return path


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells.parquet", 160, 0)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A corpus in a folder, as `tokenize` writes it."""
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/corpus.json").touch()
    write_cells(tmp_path / "fresh/part-00001.parquet", 40, 2)
    return write_cells(tmp_path / "fresh/part-00000.parquet", 50, 1).parent


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune_cell_types.py", *map(str, words)])
    example.main()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_what_stock_classes_can_load(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    cells: Path,
    fresh: Path,
    lora: bool,
) -> None:
    rates = [1e-5, 3e-3]  # of which the first learns nothing
    words = [model, "--cells", cells, "--test-cells", fresh, "--output", tmp_path / "out", "--epochs", 12]
    run(example, monkeypatch, *words, "--learning-rates", *rates, *(["--lora"] if lora else []))
    output = capsys.readouterr().out
    assert "--cells: 3 of 157 cells are left out" in output
    assert "--test-cells: 6 of 84 cells are left out" in output
    assert "115, 39, 78 cells to learn from, to choose by, to test on" in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    kind = "LoRA" if lora else "fine-tuned"
    assert list(results) == [
        kind, "the same from random weights", "logistic regression on gene presence", "largest type",
    ]  # fmt: skip
    mine = results[kind]
    assert mine["learning_rate"] == rates[1]
    # The frozen weights beneath the adapters are random here, so that these have less to work with.
    assert mine["macro_f1"] > (0.6 if lora else 0.9)
    assert results["largest type"]["accuracy"] == pytest.approx(1 / 3, abs=0.05)
    assert results["largest type"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert results["logistic regression on gene presence"]["macro_f1"] > 0.9
    assert f"{kind}: accuracy {mine['accuracy']:.3f}, balanced accuracy {mine['balanced_accuracy']:.3f}" in output
    if lora:
        assert (tmp_path / "out/adapter_model.safetensors").exists()
    else:
        loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
        assert loaded.config.id2label == {0: "type 0", 1: "type 1", 2: "type 2"}


def test_the_rate_is_chosen_by_the_second_set(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is best on the third set loses."""
    second, third = example.Cells([], np.array([0])), example.Cells([], np.array([1]))
    found = {(0.1, 0): 0.2, (0.2, 0): 0.9, (0.3, 0): 0.5, (0.3, 1): 1.0}
    monkeypatch.setattr(example, "train", lambda make, learn, rate, arguments: rate)
    monkeypatch.setattr(example, "score_model", lambda rate, cells: {"macro_f1": found[rate, int(cells.types[0])]})
    arguments = argparse.Namespace(learning_rates=[0.1, 0.2, 0.3])
    assert example.train_best(None, [third, second, third], arguments) == (0.2, 0.2)


def test_simulated_cells_come_with_the_types_of_the_generator(example: ModuleType) -> None:
    arguments = argparse.Namespace(cells=None, test_cells=None, label="cell_type", max_tokens=256, seed=0)
    sets, names = example.three_sets(arguments)
    assert [len(cells.types) for cells in sets] == [375, 125, 500]
    assert names == [f"type {number}" for number in range(8)]
    for cells in sets[:2]:  # stratified
        np.testing.assert_allclose(
            np.bincount(cells.types) / len(cells.types), np.bincount(sets[0].types) / 375, atol=0.01
        )
    known = {cell.tobytes() for cells in sets[:2] for cell in cells.tokens}
    sample = pq.read_table(ROOT / "sample_data/cells.parquet")["input_ids"]
    assert known == {cell.values.to_numpy()[:256].astype(np.int64).tobytes() for cell in sample}
    assert not known & {cell.tobytes() for cell in sets[2].tokens}
    scores = example.gene_baselines(sets)
    assert scores["logistic regression on gene presence"]["accuracy"] > 0.9  # the types are those of the tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "age"], "no column 'age'; it has input_ids, cell_type"),
        (["--label", "one"], "'one' has 1 types"),
        (["--test-cells", "none"], "none: no such corpus"),
        (["--test-cells", "{cells}", "--cells", "none"], "none: no such corpus"),
    ],
)
def test_cells_that_cannot_be_used(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: Path,
    cells: Path,
    words: list[str],
    message: str,
) -> None:
    table = pq.read_table(cells)
    pq.write_table(table.append_column("one", pa.array(["same"] * len(table))), cells)
    given = [word.format(cells=cells) for word in words]
    with pytest.raises(SystemExit, match=message):
        run(example, monkeypatch, model, "--cells", cells, "--test-cells", cells, "--output", tmp_path / "out", *given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("known", [{"max_position_embeddings": 12}, {"geneformer_max_tokens": 12}])
def test_cells_are_cut_to_what_the_model_was_trained_on(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cells: Path, fresh: Path,
    known: dict[str, int],
) -> None:  # fmt: skip
    config = transformers.BertConfig.from_pretrained(model)
    config.update(known)
    transformers.BertForMaskedLM(config).save_pretrained(model)
    longest: list[int] = []
    collate = example.collate
    monkeypatch.setattr(
        example, "collate", lambda cells: longest.append(max(len(x["input_ids"]) for x in cells)) or collate(cells)
    )
    words = [model, "--cells", cells, "--test-cells", fresh, "--output", tmp_path / "out", "--epochs", 1]
    run(example, monkeypatch, *words, "--learning-rates", 1e-3)
    assert set(longest) == {12}


def test_cells_of_another_gene_set(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cells: Path, fresh: Path
) -> None:
    """Their tokens would be taken for other genes, without a word."""
    (model / "gene_set.json").write_text(json.dumps({"name": "mine", "fingerprint": "1"}))
    (fresh / "corpus.json").write_text(json.dumps({"gene_set": {"name": "other", "fingerprint": "2"}}))
    with pytest.raises(SystemExit, match=r"fresh: tokenized with the gene set 'other', which is not the model's"):
        run(example, monkeypatch, model, "--cells", cells, "--test-cells", fresh, "--output", tmp_path / "out")


def test_own_cells_need_own_test_cells(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, model: Path, cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(example, monkeypatch, model, "--cells", cells)
    assert "--cells and --test-cells go together" in capsys.readouterr().err


def test_counts_are_no_corpus(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cells: Path
) -> None:
    counts = tmp_path / "cells.h5ad"
    counts.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(
        SystemExit, match=r"cells\.h5ad: not a parquet file; of counts, make a corpus first: .* tokenize"
    ):
        run(example, monkeypatch, model, "--cells", counts, "--test-cells", cells, "--output", tmp_path / "out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_earlier_result_is_deleted_only_on_request(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cells: Path, fresh: Path
) -> None:
    out = tmp_path / "out"
    words = [model, "--cells", cells, "--test-cells", fresh, "--epochs", 0.1, "--learning-rates", 1e-3, "--output", out]
    run(example, monkeypatch, *words, "--lora")
    (out / "notes.txt").touch()
    with pytest.raises(SystemExit, match="out: holds an earlier result; name another folder or add --overwrite"):
        run(example, monkeypatch, *words)
    assert (out / "adapter_model.safetensors").exists()
    run(example, monkeypatch, *words, "--overwrite")
    new = {file.name for file in out.iterdir()}
    assert new == {"config.json", "model.safetensors", "training_args.bin", "results.json", "notes.txt"}
    example.delete_result(out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_outputs_that_hold_something_else(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, cells: Path, fresh: Path
) -> None:
    words = [model, "--cells", cells, "--test-cells", fresh, "--overwrite", "--output"]
    for output, message in (
        (model, "the model itself"),
        (fresh, "holds something else than a result of this script"),
        (cells, "is a file; name a folder"),
    ):
        held = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match=message):
            run(example, monkeypatch, *words, output)
        assert sorted(tmp_path.rglob("*")) == held
