"""The command `evaluate` on simulated cells of three types: what it writes, its baselines and its errors."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from scipy import sparse
from threadpoolctl import threadpool_limits

from geneformer_pretrain.commands import evaluate
from geneformer_pretrain.console import Summary
from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.files import new_folder
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.tiny import one_cpu_thread  # noqa: F401

pytestmark = pytest.mark.process

GENES, CELLS = 60, 90
V = GENES + 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With matrices this small, more threads would only wait for each other."""
    with threadpool_limits(1):
        yield


@dataclass
class World:
    """A model, and cells as a corpus and as counts, in which each type has twenty genes of its own."""

    folder: Path
    obs: pd.DataFrame
    counts: np.ndarray

    @property
    def corpus(self) -> Path:
        return self.folder / "cells.parquet"

    @property
    def h5ad(self) -> Path:
        return self.folder / "cells.h5ad"

    def run(self, *words: object, cells: Path | None = None) -> Summary:
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        given = ["model", cells or self.corpus, "--gene-set", self.folder / "genes", "--output", self.report, *words]
        given[0] = self.folder / "model"
        return evaluate.run(parser.parse_args([str(word) for word in given]))

    @property
    def report(self) -> Path:
        return self.folder / "report"


@pytest.fixture
def world(tmp_path: Path) -> World:
    generator = np.random.default_rng(0)
    types = np.arange(CELLS) % 3
    own = np.arange(GENES) // 20 == types[:, None]
    counts = generator.poisson(np.where(own, 1.0, 0.2))
    counts[:, -1] += 1  # no cell is empty
    labels = np.array(["T cell", "B cell", "monocyte"], object)[types]
    labels[:4] = "rare"
    donors = [f"D{cell // 30}" for cell in range(CELLS)]
    obs = pd.DataFrame({"cell_type": labels, "donor_id": donors, "one": "same"}, index=[f"c{i}" for i in range(CELLS)])
    tokens = [2 + np.argsort(-row, kind="stable")[: (row > 0).sum()] for row in counts]
    columns = {"input_ids": pa.array(tokens, pa.list_(pa.int32())), "cell_id": obs.index.to_numpy(object)}
    columns |= {name: obs[name].to_numpy(object) for name in obs} | {"tags": [["a"]] * CELLS}
    pq.write_table(pa.table(columns), tmp_path / "cells.parquet")
    names = [f"ENSG{gene:011d}" for gene in range(GENES)]
    var = pd.DataFrame({"ensembl_id": names}, index=names)
    anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs, var).write_h5ad(tmp_path / "cells.h5ad")
    gene_names: list[str | None] = [None, None, *names]
    medians = np.array([np.nan, np.nan, *np.ones(GENES)])
    GeneSet("simulated", None, ["<pad>", "<mask>", *names], gene_names, medians, V).save(tmp_path / "genes")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=V, hidden_act="relu", pad_token_id=0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    # As if it had learned the types: genes of a type have vectors of their own.
    with torch.no_grad():
        words = model.bert.embeddings.word_embeddings.weight
        words[2:] += torch.randn(3, 32).repeat_interleave(20, dim=0)
    model.save_pretrained(tmp_path / "model")
    return World(tmp_path, obs, counts)


def test_report(world: World) -> None:
    summary = world.run("--label", "cell_type", "--layer", "-1")
    values = json.loads((world.report / "report.json").read_text())
    assert values == summary.values
    assert values["classes"] == {"B cell": 29, "T cell": 28, "monocyte": 29}
    assert values["left_out"] == {"rare (fewer than 10 cells)": 4}
    assert values["counts_options"] is None
    rows = values["representations"]
    assert list(rows) == ["model", "random weights", "PCA of token presence"]
    assert rows["model"]["logistic"]["macro_f1"] > 0.9
    assert rows["random weights"]["logistic"]["macro_f1"] < rows["model"]["logistic"]["macro_f1"]
    assert rows["model"]["ari"] > rows["random weights"]["ari"] + 0.2
    assert values["majority_class"]["accuracy"] == pytest.approx(29 / 86)
    losses = values["masked_loss"]
    assert list(losses) == ["model", "random weights", "gene frequencies of these cells"]
    assert losses["random weights"] == pytest.approx(np.log(V), abs=0.5)
    text = (world.report / "report.md").read_text()
    assert "Counts were read" not in text
    assert f"Model `{world.folder / 'model'}`, layer -1, mean; cells of `{world.corpus}`." in text
    assert f"| model | {rows['model']['logistic']['macro_f1']:.3f} ± " in text
    assert "Against random weights: logistic macro F1 +" in text
    assert "rare (fewer than 10 cells): 4 cells" in text
    for name in ("map.png", "confusion.png"):
        with Image.open(world.report / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    names = ["confusion.png", "map.png", "report.json", "report.md"]
    assert sorted(path.name for path in world.report.iterdir()) == names
    assert any("model: logistic macro F1" in line for line in summary.lines)


@pytest.mark.parametrize("given", ["counts", "corpus"])
def test_counts_are_one_more_baseline(world: World, given: str) -> None:
    words = [] if given == "counts" else ["--counts", world.h5ad]
    cells = world.h5ad if given == "counts" else world.corpus
    summary = world.run("--label", "cell_type", "--groups", "donor_id", "--allow-low-match", *words, cells=cells)
    rows = summary.values["representations"]
    assert list(rows) == ["model", "random weights", "PCA of log-normalised counts", "PCA of token presence"]
    assert all(rows[name]["logistic"]["macro_f1"] > 0.7 for name in rows if name != "random weights")
    assert summary.values["folds"] == 3
    text = (world.report / "report.md").read_text()
    assert "hold out whole groups (donor_id)" in text
    options = summary.values["counts_options"]
    assert {name for name, value in options.items() if value} == {"gene_id_column", "allow_low_match"}
    assert options["allow_noninteger"] is False
    assert "Counts were read with `--gene-id-column ensembl_id --allow-low-match`." in text


def test_cells_are_drawn_if_there_are_more(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    summary = world.run("--label", "cell_type", "--max-cells", 70)
    assert sum(summary.values["classes"].values()) + sum(summary.values["left_out"].values()) == 70
    assert "70 of 90 cells drawn at random" in capsys.readouterr().err


def test_columns_of_counts_are_looked_for_before_they_are_tokenized(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(*_: object) -> None:
        pytest.fail("the mistake was seen only after the counts had been tokenized")

    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", tokenize)
    for words, message in (
        (["--label", "age"], rf"{world.h5ad.name}: no column 'age' \(--label\); it has: cell_id, cell_type"),
        (["--label", "cell_type", "--groups", "site"], rf"{world.h5ad.name}: no column 'site' \(--groups\)"),
    ):
        with pytest.raises(DataError, match=message):
            world.run(*words, "--allow-low-match", cells=world.h5ad)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--label", "age"], DataError, r"cells\.parquet: no column 'age' \(--label\); it has: cell_id, cell_type"),
        (["--label", "cell_type", "--groups", "site"], DataError, r"no column 'site' \(--groups\)"),
        (["--label", "tags"], DataError, r"column 'tags' \(--label\) holds list<.*> values; name a column of text"),
        (["--label", "cell_type", "--groups", "tags"], DataError, r"column 'tags' \(--groups\) holds list<"),
        (["--label", "one"], DataError, "--label one: one class remains"),
        (["--label", "cell_type", "--groups", "one"], DataError, "--groups one: all cells are of one group"),
        (["--label", "cell_type", "--max-cells", "0"], ConfigError, "--max-cells 0: at least 1"),
    ],
)
def test_mistakes_are_errors_in_words(
    world: World, monkeypatch: pytest.MonkeyPatch, words: list[str], error: type[Exception], message: str
) -> None:
    def embed(*_: object) -> None:
        pytest.fail("the mistake was seen only after the cells had been embedded")

    monkeypatch.setattr("geneformer_pretrain.inference.evaluate_cells.embed", embed)
    with pytest.raises(error, match=message):
        world.run(*words)
    assert not world.report.exists()


def save_other_genes(world: World) -> None:
    """The corpus says that it is of another gene set."""
    other = replace(GeneSet.load(world.folder / "genes"), name="other", medians=np.full(V, 2.0)).describe()
    (world.folder / "folder").mkdir()
    world.corpus.rename(world.folder / "folder/cells.parquet")
    facts = {"format_version": 1, "gene_set": other, "parts": [{"file": "cells.parquet", "cells": CELLS}]}
    (world.folder / "folder/corpus.json").write_text(json.dumps(facts))


def save_long_cell(world: World) -> None:
    cells = pq.read_table(world.corpus)
    tokens = cells["input_ids"].to_pylist()
    tokens[7] = [2] * (V + 1)
    column = pa.array(tokens, pa.list_(pa.int32()))
    pq.write_table(cells.set_column(0, "input_ids", column), world.corpus)


def save_nan_weight(world: World) -> None:
    model = transformers.BertForMaskedLM.from_pretrained(world.folder / "model")
    model.bert.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")
    model.save_pretrained(world.folder / "model")


def drop_ids(world: World) -> None:
    pq.write_table(pq.read_table(world.corpus).drop_columns("cell_id"), world.corpus)


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (save_other_genes, ["{folder}/folder"], "gene set 'other'"),
        (save_long_cell, [], rf"cells\.parquet, row 7: {V + 1} tokens; .* knows up to {V}"),
        (save_nan_weight, [], r"encoder\.layer\.1\.output\.dense\.weight holds NaN"),
        (drop_ids, ["{folder}/cells.parquet", "--counts", "{folder}/cells.h5ad"], r"no column 'cell_id' \(--counts"),
    ],
)
def test_input_that_cannot_be_used(
    world: World, spoil: Callable[[World], None], words: list[str], message: str
) -> None:
    spoil(world)
    cells, *options = words or [str(world.corpus)]
    given = [word.format(folder=world.folder) for word in ["--label", "cell_type", *options]]
    with pytest.raises(DataError, match=message):
        world.run(*given, cells=Path(cells.format(folder=world.folder)))
    assert not world.report.exists()


def test_a_model_that_does_not_name_its_genes(world: World) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = [world.folder / "model", world.corpus, "--label", "cell_type", "--output", world.report]
    with pytest.raises(DataError, match=r"no gene_set\.json.*add --gene-set"):
        evaluate.run(parser.parse_args([str(word) for word in words]))


def test_an_existing_report_is_kept_unless_overwritten(world: World) -> None:
    world.report.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        world.run("--label", "cell_type")
    world.run("--label", "cell_type", "--overwrite")
    assert (world.report / "report.md").exists()


def test_a_report_that_cannot_be_made_is_refused_before_the_work(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_folder(world.report), pytest.raises(OutputError, match="another process makes it"):
        world.run("--label", "cell_type")
    assert "Scoring" not in capsys.readouterr().err


def test_a_model_without_head_has_no_loss(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.BertForMaskedLM.from_pretrained(world.folder / "model")
    model.bert.save_pretrained(world.folder / "model")
    assert world.run("--label", "cell_type").values["masked_loss"] == {}
    assert "has no head for masked tokens" in capsys.readouterr().err


def test_several_processes_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="evaluate runs in one process; start it without torchrun"):
        world.run("--label", "cell_type")


def test_other_values_and_genes_are_read_when_an_option_allows_it(world: World) -> None:
    data = anndata.read_h5ad(world.h5ad)
    data.X = data.X * 0.5
    data.var["ensembl_id"] = [name if gene % 3 == 0 else f"other{gene}" for gene, name in enumerate(data.var_names)]
    data.write_h5ad(world.h5ad)
    words = ["--label", "cell_type"]
    with pytest.raises(DataError, match=r"not a count.*add --allow-noninteger"):
        world.run(*words, cells=world.h5ad)
    with pytest.raises(DataError, match="--allow-low-match accepts it"):
        world.run(*words, "--allow-noninteger", cells=world.h5ad)
    summary = world.run(*words, "--allow-noninteger", "--allow-low-match", cells=world.h5ad)
    assert "PCA of log-normalised counts" in summary.values["representations"]
