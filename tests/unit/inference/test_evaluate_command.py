"""The command `evaluate` with embeddings from a stand-in: what it writes, its baselines and its errors."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import transformers
from PIL import Image
from threadpoolctl import threadpool_limits

from geneformer_pretrain.commands import evaluate
from geneformer_pretrain.console import Summary
from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from tests.tiny import one_cpu_thread  # noqa: F401

V = 60
CELLS = 90


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def simulate() -> tuple[list[np.ndarray], pa.Table, np.ndarray]:
    """Tokens, columns and counts of cells of three types, each with ten genes of its own, from three donors."""
    generator = np.random.default_rng(0)
    types = np.arange(CELLS) % 3
    own = (np.arange(V - 2) // 10 == types[:, None]) * 2.0
    counts = generator.poisson(own + 0.2)
    counts[:, -1] += 1  # no cell is empty
    tokens = [2 + np.argsort(-row, kind="stable")[: (row > 0).sum()] for row in counts]
    labels = np.array(["T cell", "B cell", "monocyte"], object)[types]
    labels[:4] = "rare"
    table = pa.table(
        {
            "cell": np.arange(CELLS),
            "cell_id": [f"c{cell}" for cell in range(CELLS)],
            "cell_type": pa.array(labels.tolist()),
            "donor_id": [f"D{cell // 30}" for cell in range(CELLS)],
            "one": ["same"] * CELLS,
        }
    )
    return tokens, table, counts


class CountsStandIn:
    """A counts file of the cells in reverse order, with cells that nobody asked for."""

    def __init__(self, counts: np.ndarray, names: list[str]) -> None:
        self.counts, self.names, self.num_cells = counts, names, len(names)
        self.gene_ids = np.array([f"g{gene}" for gene in range(counts.shape[1])])

    def __enter__(self) -> "CountsStandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cell_ids(self, first: int, last: int) -> list[str]:
        return self.names[first:last]

    def blocks(self) -> Iterator[SimpleNamespace]:
        for first in range(0, self.num_cells, 7):
            block = self.counts[first : first + 7]
            indptr = np.concatenate([[0], np.cumsum((block > 0).sum(axis=1))])
            yield SimpleNamespace(first_row=first, indptr=indptr, indices=np.nonzero(block)[1], data=block[block > 0])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A model with its head, and stand-ins for the readers of cells, genes and counts."""
    tokens, table, counts = simulate()
    flat, offsets = np.concatenate(tokens), np.concatenate([[0], np.cumsum([len(cell) for cell in tokens])])
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=V, hidden_act="relu", pad_token_id=0,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    state = SimpleNamespace(table=table, calls=[], names=[f"c{cell}" for cell in range(CELLS)], counts=counts)

    def embed_cells(model: str, cells: list[str], **options: Any) -> SimpleNamespace:
        state.calls.append(options)
        presence = np.zeros((CELLS, V), np.float32)
        for cell, genes in enumerate(tokens):
            presence[cell, genes] = 1
        projection = np.random.default_rng(1 + options.get("random_weights", False)).standard_normal((V, 12))
        # Random weights see the first few genes only, so that they are worse.
        embeddings = (presence * (np.arange(V) < (8 if options.get("random_weights") else V))) @ projection
        return SimpleNamespace(
            embeddings=embeddings.astype(np.float32), table=state.table, tokens=flat, offsets=offsets
        )

    genes = SimpleNamespace(vocab_size=V, num_special_tokens=2, special_tokens={"pad": 0, "mask": 1})
    modules: dict[str, dict[str, Any]] = {
        "inference.embed": {"embed_cells": embed_cells},
        "inference.cells": {"is_corpus": lambda path: not str(path).endswith(".h5ad")},
        "tokenization.gene_set": {"GeneSet": SimpleNamespace(load=lambda folder: genes)},
        "tokenization.counts": {
            "CountsFile": CountsStandIn,
            "find_counts": lambda paths: paths,
            "open_counts": lambda path: CountsStandIn(
                np.concatenate([state.counts, state.counts[:5]])[::-1],
                [*state.names, *(f"other{i}" for i in range(5))][::-1],
            ),
        },
    }
    monkeypatch.delitem(sys.modules, "geneformer_pretrain.inference.evaluate_counts", raising=False)
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"geneformer_pretrain.{name}", module)
    state.folder = tmp_path
    return state


def run(world: SimpleNamespace, *words: str, cells: str = "corpus") -> Summary:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    output = str(world.folder / "report")
    return evaluate.run(parser.parse_args([str(world.folder / "model"), cells, "--output", output, *words]))


def test_report(world: SimpleNamespace) -> None:
    summary = run(world, "--label", "cell_type", "--layer", "-1")
    folder = world.folder / "report"
    values = json.loads((folder / "report.json").read_text())
    assert values == summary.values
    assert values["classes"] == {"B cell": 29, "T cell": 28, "monocyte": 29}
    assert values["left_out"] == {"rare (fewer than 10 cells)": 4}
    rows = values["representations"]
    assert list(rows) == ["model", "random weights", "PCA of token presence"]
    assert rows["model"]["logistic"]["macro_f1"] > 0.75 > rows["random weights"]["logistic"]["macro_f1"]
    assert rows["PCA of token presence"]["logistic"]["macro_f1"] > 0.9
    assert values["majority_class"]["accuracy"] == pytest.approx(29 / 86)
    losses = values["masked_loss"]
    assert list(losses) == ["model", "random weights", "gene frequencies of these cells"]
    assert losses["model"] == pytest.approx(np.log(V), abs=0.5)
    assert world.calls[0] == {"layer": -1, "pooling": "mean", "gene_set": None}
    assert world.calls[1] == world.calls[0] | {"random_weights": True}
    text = (folder / "report.md").read_text()
    assert f"| model | {rows['model']['logistic']['macro_f1']:.3f} ± " in text
    assert "Against random weights: logistic macro F1 +" in text
    assert "rare (fewer than 10 cells): 4 cells" in text
    for name in ("map.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.png", "map.png", "report.json", "report.md"]
    assert any("model: logistic macro F1" in line for line in summary.lines)


@pytest.mark.parametrize(
    ("cells", "words"), [("cells.h5ad", ()), ("corpus", ("--counts", "cells.h5ad"))], ids=["counts", "corpus"]
)
def test_counts_are_one_more_baseline(world: SimpleNamespace, cells: str, words: tuple[str, ...]) -> None:
    summary = run(world, "--label", "cell_type", "--groups", "donor_id", *words, cells=cells)
    rows = summary.values["representations"]
    assert rows["PCA of log-normalised counts"]["logistic"]["macro_f1"] > 0.9  # the right cells: they come reversed
    assert summary.values["folds"] == 3
    assert "hold out whole groups (donor_id)" in (world.folder / "report/report.md").read_text()


def test_counts_of_the_cells_in_their_order(world: SimpleNamespace) -> None:
    run(world, "--label", "cell_type")
    from geneformer_pretrain.inference.evaluate_counts import counts_of_cells

    chosen = [f"c{cell}" for cell in (5, 80, 3)]
    np.testing.assert_array_equal(counts_of_cells(["x"], chosen).toarray(), world.counts[[5, 80, 3]])
    with pytest.raises(DataError, match="cell 'c777' is in none of the files"):
        counts_of_cells(["x"], ["c1", "c777"])
    with pytest.raises(DataError, match="cell 'c1' is there 2 times"):
        counts_of_cells(["x", "x"], ["c1"])
    with pytest.raises(DataError, match="some ids of the cells occur twice"):
        counts_of_cells(["x"], ["c1", "c1"])


def test_cells_are_drawn_if_there_are_more(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(world, "--label", "cell_type", "--max-cells", "70")
    assert sum(summary.values["classes"].values()) + sum(summary.values["left_out"].values()) == 70
    assert "90 cells: 70 of them are drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--label", "age"], DataError, "--label age: corpus has no such column; it has cell, cell_id, cell_type"),
        (["--label", "cell_type", "--groups", "site"], DataError, "--groups site: corpus has no such column"),
        (["--label", "one"], DataError, "--label one: 1 class remains"),
        (["--label", "cell_type", "--groups", "one"], DataError, "--groups one: all cells are of one group"),
        (["--label", "cell_type", "--max-cells", "0"], ConfigError, "--max-cells 0: at least 1"),
    ],
)
def test_mistakes_are_errors_in_words(world: SimpleNamespace, words: list[str], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(world, *words)
    assert not (world.folder / "report").exists()
    assert len(world.calls) <= 1  # before the second pass over the cells


def test_an_existing_report_is_kept_unless_overwritten(world: SimpleNamespace) -> None:
    (world.folder / "report").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        run(world, "--label", "cell_type")
    assert not world.calls
    run(world, "--label", "cell_type", "--overwrite")
    assert (world.folder / "report/report.md").exists()


def test_no_cell_ids_no_counts(world: SimpleNamespace) -> None:
    world.table = world.table.drop(["cell_id"])
    with pytest.raises(DataError, match="--counts: the cells have no column cell_id"):
        run(world, "--label", "cell_type", "--counts", "cells.h5ad")
