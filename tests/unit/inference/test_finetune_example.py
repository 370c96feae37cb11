"""examples/finetune_cell_types.py on simulated cells and a small export: it runs, learns and refuses bad columns."""

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


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Cells of three types, whose top genes are the type's own; a rare type and cells without a type."""
    generator = np.random.default_rng(0)
    types = np.arange(160) % 3
    tokens = [
        np.concatenate([2 + 20 * kind + generator.permutation(20)[:8], 62 + generator.permutation(30)[:10]])
        for kind in types
    ]
    names = [f"type {kind}" for kind in types]
    names[:3], names[3:6] = ["rare"] * 3, [None] * 3  # type: ignore[list-item]
    table = pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32())), "cell_type": names})
    pq.write_table(table, tmp_path / "cells.parquet")
    return tmp_path / "cells.parquet"


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
    lora: bool,
) -> None:
    words = [model, "--cells", cells, "--output", tmp_path / "out", "--epochs", 12]
    run(example, monkeypatch, *words, *(["--lora", "--learning-rate", 1e-2] if lora else ["--learning-rate", 3e-3]))
    output = capsys.readouterr().out
    assert "6 of 160 cells are left out" in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    mine = results["LoRA" if lora else "fine-tuned"]
    # The frozen weights beneath the adapters are random here, so that these have less to work with.
    assert mine["macro_f1"] > (0.6 if lora else 0.9)
    assert results["largest type"]["accuracy"] == pytest.approx(1 / 3, abs=0.05)
    assert results["logistic regression on gene presence"]["macro_f1"] > 0.9
    assert f"accuracy {mine['accuracy']:.3f}, macro F1 {mine['macro_f1']:.3f}" in output
    if lora:
        assert (tmp_path / "out/adapter_model.safetensors").exists()
    else:
        loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
        assert loaded.config.id2label == {0: "type 0", 1: "type 1", 2: "type 2"}


def test_simulated_cells_come_with_the_types_of_the_generator(example: ModuleType) -> None:
    tokens, types = example.simulated_cells()
    assert len(tokens) == len(types) == 500
    assert sorted(set(types)) == [f"type {number}" for number in range(8)]
    labels = np.unique(types, return_inverse=True)[1]
    scores = example.baselines(tokens, labels, np.arange(375), np.arange(375, 500))
    assert scores["logistic regression on gene presence"]["accuracy"] > 0.9  # the types are those of the tokens


@pytest.mark.parametrize(
    ("label", "message"), [("age", "no column 'age'; it has input_ids, cell_type"), ("one", "'one' has 1 types")]
)
def test_columns_that_cannot_be_used(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: Path,
    cells: Path,
    label: str,
    message: str,
) -> None:
    if label == "one":
        table = pq.read_table(cells)
        pq.write_table(table.append_column("one", pa.array(["same"] * len(table))), cells)
    with pytest.raises(SystemExit, match=message):
        run(example, monkeypatch, model, "--cells", cells, "--label", label, "--output", tmp_path / "out")
