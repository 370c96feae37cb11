"""Counts of an evaluation's cells: found in unfiltered files by id, with the options that made the corpus."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from geneformer_pretrain.commands import split, tokenize
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.evaluate_counts import CellCounts, Wanted, counts_of_cells, options_of_corpus
from geneformer_pretrain.tokenization.gene_set import GeneSet

GENES, CELLS = 30, 50
NAMES = [f"ENSG{gene:011d}" for gene in range(GENES)]
OPTIONS = CountsOptions()


@pytest.fixture
def gene_set(tmp_path: Path) -> GeneSet:
    gene_names: list[str | None] = [None, None, *NAMES]
    medians = np.array([np.nan, np.nan, *np.ones(GENES)])
    made = GeneSet("simulated", None, ["<pad>", "<mask>", *NAMES], gene_names, medians, GENES)
    made.save(tmp_path / "genes")
    return made


def write(path: Path, seed: int, **obs: Any) -> np.ndarray:
    """Counts of cells c0, c1, ..., the last without any; X is log-normalised, the counts are a layer."""
    counts = np.random.default_rng(seed).poisson(0.6, (CELLS, GENES)).astype(np.float32)
    counts[:, 0] += 1
    counts[-1] = 0
    totals = counts.sum(axis=1)
    table = pd.DataFrame({"total": totals * 2, **obs}, index=[f"c{cell}" for cell in range(CELLS)])
    var = pd.DataFrame({"id": [f"{name}.{seed}" for name in NAMES]}, index=NAMES)
    data = anndata.AnnData(sparse.csr_matrix(np.log1p(counts / np.maximum(totals, 1)[:, None])), table, var)
    data.layers["counts"] = sparse.csr_matrix(counts)
    data.write_h5ad(path)
    return counts


RULE = replace(OPTIONS, gene_id_column="id", layer="counts")


def wanted(counts: Any, ids: list[str], numbers: list[int] | None = None, all_ids: list[str] | None = None) -> Wanted:
    """Cells with these counts, whose tokens are their genes that have any."""
    cells, genes = np.nonzero(np.asarray(counts))
    offsets = np.searchsorted(cells, np.arange(len(ids) + 1))
    return Wanted(ids, np.array(numbers or range(len(ids))), lambda: all_ids or ids, genes + 2, offsets)


def find(
    paths: list[Path], ids: list[str], counts: Any, gene_set: GeneSet, options: CountsOptions = RULE
) -> CellCounts:
    return counts_of_cells(paths, wanted(counts, ids), gene_set, options)


def run(command: Any, *words: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in words]))


def test_cells_come_in_their_order_and_genes_of_files_are_matched(tmp_path: Path, gene_set: GeneSet) -> None:
    counts = write(tmp_path / "a.h5ad", 1)
    found = find([tmp_path / "a.h5ad"], ["c5", "c40", "c3"], counts[[5, 40, 3]], gene_set)
    np.testing.assert_array_equal(found.matrix.toarray(), counts[[5, 40, 3]])
    np.testing.assert_array_equal(found.totals, counts[[5, 40, 3]].sum(axis=1))
    write(tmp_path / "b.h5ad", 2)
    other = anndata.read_h5ad(tmp_path / "b.h5ad")[::-1, ::-1].copy()
    other.obs_names = [f"other{name}" for name in other.obs_names]
    other.write_h5ad(tmp_path / "b.h5ad")  # genes in another order, their ids of another version
    seventh = other["otherc7"].layers["counts"].toarray()[0, ::-1]
    found = find([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], ["otherc7", "c7"], [seventh, counts[7]], gene_set)
    np.testing.assert_array_equal(found.matrix.toarray()[0], seventh)
    np.testing.assert_array_equal(found.matrix.toarray()[1], counts[7])
    with pytest.raises(DataError, match="cell 'c777' is in none of the files"):
        find([tmp_path / "a.h5ad"], ["c1", "c777"], counts[[1, 2]], gene_set)


def test_a_filtered_corpus_finds_its_cells_in_the_unfiltered_file(tmp_path: Path, gene_set: GeneSet) -> None:
    counts = write(tmp_path / "a.h5ad", 1, good=np.arange(CELLS) % 3 != 1)
    words = [tmp_path / "a.h5ad", "--gene-set", tmp_path / "genes", "--output", tmp_path / "corpus", "--workers", 1]
    words += ["--gene-id-column", "id", "--layer", "counts", "--n-counts-column", "total", "--filter-column", "good"]
    run(tokenize, *words, "--min-genes", 12)
    kept = np.flatnonzero((np.arange(CELLS) % 3 != 1) & ((counts > 0).sum(axis=1) >= 12))
    ids = pq.read_table(tmp_path / "corpus/part-00000.parquet")["cell_id"].to_pylist()
    assert ids == [f"c{cell}" for cell in kept]
    assert 5 < len(ids) < CELLS * 2 // 3
    options = options_of_corpus(tmp_path / "corpus", OPTIONS)
    rule = CountsOptions("id", n_counts_column="total", filter_column="good", layer="counts", min_genes=12)
    assert options == rule
    found = find([tmp_path / "a.h5ad"], ids, counts[kept], gene_set, options)
    np.testing.assert_array_equal(found.matrix.toarray(), counts[kept])
    np.testing.assert_array_equal(found.totals, 2 * counts[kept].sum(axis=1))
    run(split, tmp_path / "corpus", "--fraction", 0.3, "--output", tmp_path / "split")
    assert options_of_corpus(tmp_path / "split/held_out", OPTIONS) == rule
    assert options_of_corpus(tmp_path / "corpus", replace(OPTIONS, layer="X2")) == replace(rule, layer="X2")
    for inside in ("part-00000.parquet", "*.parquet"):
        assert options_of_corpus(tmp_path / "corpus" / inside, OPTIONS) == rule


def test_an_id_in_several_files_is_that_of_the_row_that_was_tokenized(tmp_path: Path, gene_set: GeneSet) -> None:
    """Barcodes repeat from sample to sample; here the filter leaves one row of each."""
    a = write(tmp_path / "a.h5ad", 1, filter_pass=np.arange(CELLS) < 20)
    b = write(tmp_path / "b.h5ad", 2, filter_pass=np.arange(CELLS) >= 20)
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    few = np.zeros((3, GENES))
    few[:, 0] = 1  # the gene that each cell has, so that both rows may be the cell
    found = find(files, ["c30", "c2", "c48"], few, gene_set)
    np.testing.assert_array_equal(found.matrix.toarray(), np.stack([b[30], a[2], b[48]]))
    with pytest.raises(DataError, match="none of the 2 rows that may be cell 'c49' are of the corpus"):
        find(files, ["c49"], few[:1] * 0, gene_set)  # it has no counts


@pytest.fixture
def two(tmp_path: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Two files whose cells have the same names; the last cell of each has no counts."""
    a, b = (write(tmp_path / f"{name}.h5ad", seed) for seed, name in enumerate("ab"))
    return [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], a, b


KEPT = [f"c{cell}" for cell in range(CELLS - 1)]


def test_ids_that_repeat_are_told_apart_by_the_genes(
    two: tuple[list[Path], np.ndarray, np.ndarray], gene_set: GeneSet
) -> None:
    """In any order of the files, and for a part of the corpus."""
    files, a, b = two
    ids, numbers = ["c3", "c3", "c4"], [3, CELLS - 1 + 3, CELLS - 1 + 4]
    expected = np.stack([a[3], b[3], b[4]])
    for order in (files, files[::-1]):
        found = counts_of_cells(order, wanted(expected, ids, numbers, KEPT * 2), gene_set, RULE)
        np.testing.assert_array_equal(found.matrix.toarray(), expected)
    half = wanted(expected, ids, [0, 2, 1], ["c3", "c4", "c3", "c7"])
    np.testing.assert_array_equal(counts_of_cells(files, half, gene_set, RULE).matrix.toarray(), expected)


def test_rows_that_are_not_the_cells_are_refused(
    two: tuple[list[Path], np.ndarray, np.ndarray], gene_set: GeneSet
) -> None:
    """The corpus is of both files, and the chosen cells are of the second."""
    files, _, b = two
    chosen = wanted(b[:9], KEPT[:9], [CELLS - 1 + cell for cell in range(9)], KEPT * 2)
    with pytest.raises(DataError, match="2 cells of the corpus are called 'c0', and 1 in the files; name all files"):
        counts_of_cells(files[:1], chosen, gene_set, RULE)
    with pytest.raises(DataError, match=r"cell 'c[0-8]' of the files has no counts of some genes"):
        find(files[:1], KEPT[:9], b[:9], gene_set)


def test_cells_of_few_genes_are_found_by_the_order(
    two: tuple[list[Path], np.ndarray, np.ndarray], gene_set: GeneSet
) -> None:
    """Both rows have the gene of the second cell; the other cells show whether the files are in their order."""
    files, _, b = two
    tokens = np.stack([b[3], np.eye(GENES)[0]])
    cells = wanted(tokens, ["c3", "c4"], [CELLS - 1 + 3, CELLS - 1 + 4], KEPT * 2)
    found = counts_of_cells(files, cells, gene_set, RULE)
    np.testing.assert_array_equal(found.matrix.toarray(), b[3:5])
    with pytest.raises(DataError, match="2 of the 2 rows that may be cell 'c4' are of the corpus; name exactly"):
        counts_of_cells(files[::-1], cells, gene_set, RULE)


def test_a_corpus_that_says_nothing_leaves_the_options(tmp_path: Path) -> None:
    part = {"name": "x", "fingerprint": "f", "vocab_size": 3, "special_tokens": {}, "max_tokens": 4}
    (tmp_path / "corpus.json").write_text(json.dumps({"format_version": 1, "gene_set": part, "parts": []}))
    assert options_of_corpus(tmp_path, RULE) == RULE
