"""A gene set built from counts: medians, choice of genes and cells, partial results, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.tokenization import gene_set_build
from geneformer_pretrain.tokenization.counted_genes import CountedGenes, merge
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.gene_set_build import GeneSetBuilder
from geneformer_pretrain.tokenization.gene_table import GeneTable
from tests.unit.tokenization.memory_counts import MemoryCounts, ensembl, random_matrix, reference_medians

GENES = 40


def make_file(seed: int, cells: int = 60) -> MemoryCounts:
    """Counts with genes in an order of their own, some of them missing."""
    generator = np.random.default_rng(seed)
    present = generator.permutation(GENES)[: GENES - 3]
    return MemoryCounts(Path(f"/data/{seed}.h5ad"), random_matrix(cells, len(present), seed), ensembl(present))


def builder(*files: MemoryCounts, **options: Any) -> GeneSetBuilder:
    by_path = {file.path: file for file in files}
    return GeneSetBuilder(by_path.__getitem__, list(by_path), **options)


def together(files: list[MemoryCounts]) -> tuple[np.ndarray, np.ndarray]:
    """All cells as one dense matrix [cells, GENES], and their totals."""
    parts = []
    for file in files:
        dense = np.zeros((file.num_cells, GENES))
        dense[:, [int(gene_id[-11:]) for gene_id in file.gene_ids]] = file.matrix.toarray()
        parts.append(dense)
    matrix = np.concatenate(parts)
    return matrix, matrix.sum(axis=1)


FILES = [make_file(seed) for seed in range(3)]


def test_medians_of_several_files_with_genes_in_different_orders() -> None:
    build = builder(*FILES)
    result = build.count()
    counted = result.genes
    expected = reference_medians(*together(FILES))
    order = [int(gene_id[-11:]) for gene_id in counted.gene_ids]
    np.testing.assert_allclose(counted.sketch.medians(), expected[order], rtol=0.005)
    np.testing.assert_array_equal(build.exact_medians(counted), expected[order])
    matrix, totals = together(FILES)
    assert [source.cells for source in counted.sources] == [60, 60, 60]
    assert counted.counted_cells == (totals > 0).sum()
    assert sum(source.counts for source in counted.sources) == matrix.sum()


def test_tokens_are_in_the_order_of_ids_and_rare_genes_left_out() -> None:
    matrix, _ = together(FILES)
    counted = builder(*FILES).count().genes
    cells = (matrix > 0).sum(axis=0)
    least = int(np.median(cells))
    gene_set = counted.to_gene_set(name="a", special_tokens="v2", min_cells=least)
    expected = [gene_id for gene_id, number in zip(ensembl(range(GENES)), cells, strict=True) if number >= least]
    assert gene_set.tokens == ["<pad>", "<mask>", "<cls>", "<eos>", *expected]
    assert (gene_set.max_tokens, gene_set.origin["genes_left_out"]) == (4096, len(counted.gene_ids) - len(expected))
    with pytest.raises(DataError, match="No gene has counts in 1,000 or more"):
        counted.to_gene_set(name="a", min_cells=1000)


def test_genes_that_no_cell_has_stay_only_if_asked() -> None:
    table = GeneTable([*ensembl(range(GENES)), "ENSG00099999999"], [None] * GENES + ["NEVER"])
    counted = builder(*FILES, genes=table).count().genes
    assert "ENSG00099999999" not in counted.to_gene_set(name="a").tokens
    gene_set = counted.to_gene_set(name="a", min_cells=0)
    assert gene_set.tokens[-1] == "ENSG00099999999"
    assert np.isnan(gene_set.medians[-1])
    assert (gene_set.symbols[-1], gene_set.num_unranked_genes) == ("NEVER", 1)


def test_totals_are_over_all_genes_though_only_some_are_chosen() -> None:
    chosen = ensembl(range(0, GENES, 2)).tolist()
    build = builder(*FILES, genes=GeneTable(chosen, [None] * len(chosen)), allow_low_match=True)
    counted = build.count().genes
    expected = reference_medians(*together(FILES))[::2]
    np.testing.assert_array_equal(build.exact_medians(counted), expected)
    assert counted.gene_ids == chosen


def test_versions_case_and_symbols_are_one_gene() -> None:
    ids = np.array(["ENSG00000000001.4", "ensg00000000001", "SYM1", "ENSG00000000002", "OTHER"])
    matrix = sp.csr_matrix(np.array([[1, 2, 3, 4, 0], [0, 0, 5, 0, 5]], np.float32))
    table = GeneTable(["ENSG00000000001", "ENSG00000000002"], ["SYM1", None])
    file = MemoryCounts(Path("/data/a.h5ad"), matrix, ids)
    build = builder(file, genes=table)
    result = build.count()
    np.testing.assert_array_equal(build.exact_medians(result.genes), [5500, 4000])
    ways = result.match.num_columns_by_way
    assert (ways["version"], ways["case"], ways["symbol"], ways["exact"], ways["unmatched"]) == (1, 1, 1, 1, 1)
    counted = builder(replace(file, gene_ids=ids)).count().genes  # all genes: a symbol is a gene of its own
    assert counted.gene_ids == ["ENSG00000000001", "SYM1", "ENSG00000000002", "OTHER"]


@pytest.mark.parametrize("block_cells", [1, 13, 1000])
def test_the_result_does_not_depend_on_blocks_or_the_order_of_files(block_cells: int) -> None:
    files = [replace(file, block_cells=block_cells) for file in FILES[::-1]]
    assert (
        builder(*files).count().genes.to_gene_set(name="a").fingerprint
        == builder(*FILES).count().genes.to_gene_set(name="a").fingerprint
    )


def test_a_named_total_is_not_empty_as_it_is() -> None:
    matrix, totals = together(FILES)
    given = [np.asarray(file.matrix.sum(axis=1)).ravel() * 2 + 1 for file in FILES]
    files = [replace(file, columns={"total": column}) for file, column in zip(FILES, given, strict=True)]
    build = builder(*files, n_counts_column="total")
    counted = build.count().genes
    order = [int(gene_id[-11:]) for gene_id in counted.gene_ids]
    expected = reference_medians(matrix, np.concatenate(given))
    np.testing.assert_array_equal(build.exact_medians(counted), expected[order])
    assert counted.counted_cells == (totals > 0).sum()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_total_that_is_none_is_refused_by_its_row(bad: float) -> None:
    totals = np.ones(60)
    totals[17] = bad
    file = replace(FILES[0], columns={"total": totals})
    with pytest.raises(DataError, match=r"0\.h5ad: row 17 \(cell cell-17\): total is .*leave --n-counts-column out"):
        builder(file, n_counts_column="total").count()


@pytest.mark.parametrize("kind", [bool, np.int8, np.float64])
@pytest.mark.parametrize(("name", "option"), [("filter_pass", None), ("good", "good")])
def test_only_cells_that_pass_count(name: str, option: str | None, kind: type) -> None:
    passing = np.random.default_rng(9).random(60) < 0.5
    file = replace(FILES[0], columns={name: passing.astype(kind)})
    build = builder(file, filter_column=option)
    counted = build.count().genes
    matrix, totals = together([FILES[0]])
    assert [source.filter_column for source in counted.sources] == [name]
    order = [int(gene_id[-11:]) for gene_id in counted.gene_ids]
    np.testing.assert_array_equal(
        build.exact_medians(counted), reference_medians(matrix[passing], totals[passing])[order]
    )


@pytest.mark.parametrize("name", ["filter_pass", "total"])
def test_a_column_of_texts_is_refused(name: str) -> None:
    file = replace(FILES[0], columns={name: pa.array([None, *["1"] * 59])})
    with pytest.raises(DataError, match=f"0.h5ad: the column '{name}' holds string values such as '1'"):
        builder(file, n_counts_column=None if name == "filter_pass" else name).count()


def test_exact_medians_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder(*FILES)
    counted = build.count().genes
    once = build.exact_medians(counted)
    monkeypatch.setattr(gene_set_build, "MOST_EXACT_VALUES", 20)
    np.testing.assert_array_equal(build.exact_medians(counted), once)


def save_parts(folder: Path, **options: Any) -> list[Path]:
    for number, file in enumerate(FILES):
        builder(file, **options).count().genes.save(folder / f"{number}.parquet")
    return sorted(folder.glob("*.parquet"))


def table_of(genes: int) -> GeneTable:
    return GeneTable(ensembl(range(genes)).tolist(), [f"S{number}" for number in range(genes)])


@pytest.mark.parametrize("options", [{}, {"genes": table_of(GENES)}])
def test_merged_partial_results_are_those_of_one_machine(tmp_path: Path, options: dict[str, Any]) -> None:
    paths = save_parts(tmp_path, **options)
    finish: Callable[[CountedGenes], GeneSet] = lambda counted: counted.to_gene_set(name="a", min_cells=20)  # noqa: E731
    one, merged, other_order = finish(builder(*FILES, **options).count().genes), merge(paths), merge(paths[::-1])
    assert finish(merged).origin == one.origin
    assert finish(merged).symbols == one.symbols
    assert finish(merged).fingerprint == finish(other_order).fingerprint == one.fingerprint


def test_partial_results_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    paths = save_parts(tmp_path)
    with pytest.raises(DataError, match=r"1\.parquet: holds /data/1\.h5ad, and so does .*1\.parquet"):
        merge([*paths, paths[1]])
    builder(FILES[0], genes=table_of(GENES)).count().genes.save(tmp_path / "chosen")
    with pytest.raises(DataError, match=r"chosen: does not fit .*genes: 40 given genes, .*, there all genes"):
        merge([paths[1], tmp_path / "chosen"])
    with pytest.raises(OutputError, match="--overwrite"):
        builder(FILES[0]).count().genes.save(paths[0])
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    with pytest.raises(DataError, match=r"0\.parquet is not a partial result"):
        merge(paths)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([str(number) for number in range(4)], "gene ids are only row numbers"),
        (["", "", "", ""], "no gene has an id"),
        (["a", "b c", "d", "e"], "'b c' cannot be the id of a gene"),
        (["a", "<pad>", "d", "e"], "'<pad>' cannot be the id of a gene"),
    ],
)
def test_ids_that_are_none_are_refused_before_anything_is_read(ids: list[str], message: str) -> None:
    file = MemoryCounts(Path("/data/b.h5ad"), random_matrix(5, 4, 0), np.array(ids))
    with pytest.raises(DataError, match=rf"b\.h5ad: {message}"):
        builder(FILES[0], file).count()


def test_a_file_of_another_species_is_refused_by_name() -> None:
    mouse = MemoryCounts(Path("/data/mouse.h5ad"), random_matrix(5, 4, 0), ensembl(range(4), "ENSMUSG"))
    with pytest.raises(DataError, match=r"mouse\.h5ad: none of its 4 genes is in the gene set"):
        builder(FILES[0], mouse, genes=table_of(GENES)).count()
    few = table_of(2)
    with pytest.raises(DataError, match=r"0\.h5ad: genes of the gene set hold only \d"):
        builder(FILES[0], genes=few).count()
    assert builder(FILES[0], genes=few, allow_low_match=True).count().genes.gene_ids == few.gene_ids


def test_a_median_outside_of_the_range_of_the_bins_asks_for_exact() -> None:
    file = replace(FILES[0], columns={"total": np.full(60, 1e-9)})
    build = builder(file, n_counts_column="total")
    counted = build.count().genes
    with pytest.raises(DataError, match="correct the column of totals, or use --exact"):
        counted.to_gene_set(name="a")
    assert counted.to_gene_set(name="a", exact=build.exact_medians(counted)).num_unranked_genes == 0


def test_no_counts_at_all() -> None:
    file = replace(FILES[0], matrix=sp.csr_matrix(FILES[0].matrix.shape, dtype=np.float32))
    with pytest.raises(DataError, match="no cell that passes has counts"):
        builder(file).count()
