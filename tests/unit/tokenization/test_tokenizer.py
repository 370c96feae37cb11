"""Tokens equal those of an independent implementation, cell for cell, and each rule holds by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import kernels, matrices
from geneformer_pretrain.tokenization.counts import open_counts
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.tokenizer import Tally, tokenize_blocks
from tests.unit.tokenization.files import (
    CELLS,
    FORMATS,
    GENE_IDS,
    GENES,
    example_anndata,
    example_counts,
    example_gene_set,
    write_h5ad,
)


def reference(counts: np.ndarray, gene_ids: list[str], gene_set: GeneSet, total: float | None = None) -> list[int]:
    """Tokens of one cell by plain Python and float64: counts of [columns] in any order, ids as tokens."""
    summed: dict[str, float] = {}
    for gene, count in zip(gene_ids, counts, strict=True):
        summed[gene] = summed.get(gene, 0.0) + float(count)
    total = sum(summed.values()) if total is None else total
    token_of = {gene: token for token, gene in enumerate(gene_set.tokens)}
    values = []
    for gene, count in summed.items():
        if count != 0 and gene in token_of and not np.isnan(gene_set.medians[token_of[gene]]):
            values.append((-(count / total * 10_000 / float(gene_set.medians[token_of[gene]])), gene))
    tokens = [token_of[gene] for _, gene in sorted(values)]
    if "cls" in gene_set.special_tokens:
        cls, eos = gene_set.special_tokens["cls"], gene_set.special_tokens["eos"]
        return [cls, *tokens[: gene_set.max_tokens - 2], eos] if tokens else []
    return tokens[: gene_set.max_tokens]


def tokens_by_row(
    path: Path, gene_set: GeneSet, reading: dict[str, Any] | None = None, **options: Any
) -> dict[int, list[int]]:
    """Tokens of each kept row."""
    with open_counts(path, **(reading or {})) as counts:
        found = {}
        for block in tokenize_blocks(counts, gene_set, **options):
            assert block.cell_ids == [f"cell {row}" for row in block.rows]
            for row, first, last in zip(block.rows, block.offsets, block.offsets[1:], strict=False):
                found[int(row)] = block.tokens[first:last].tolist()
        return found


def tally_of(path: Path, gene_set: GeneSet, **options: Any) -> Tally:
    """Sums over a file."""
    tally = Tally()
    with open_counts(path) as counts:
        for block in tokenize_blocks(counts, gene_set, **options):
            tally += block.tally
    return tally


def expected_rows(counts: np.ndarray, gene_set: GeneSet, gene_ids: list[str] = GENE_IDS) -> dict[int, list[int]]:
    """Reference tokens of each row that has any."""
    cells = {row: reference(counts[row], gene_ids, gene_set) for row in range(len(counts))}
    return {row: tokens for row, tokens in cells.items() if tokens}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    write, reading = FORMATS[name]
    gene_set = example_gene_set()
    assert tokens_by_row(write(tmp_path), gene_set, reading) == expected_rows(example_counts().toarray(), gene_set)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("max_tokens", [5, 2048])
def test_versions_and_lengths(version: str, max_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "BLOCK_ROWS", 9)
    gene_set = example_gene_set(version, max_tokens=max_tokens)
    found = tokens_by_row(write_h5ad(tmp_path / "a.h5ad"), gene_set)
    assert found == expected_rows(example_counts().toarray(), gene_set)
    assert max(map(len, found.values())) <= max_tokens
    if version == "v2":
        assert all((cell[0], cell[-1]) == (2, 3) for cell in found.values())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_kernel_equals_the_reference(data: Any) -> None:
    """Any counts, medians and maps of columns, with ties, repeated columns, explicit zeros and unknown genes."""
    genes = data.draw(st.integers(1, 60), "genes")
    columns = data.draw(st.integers(1, 90), "columns")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    few_values = data.draw(st.booleans(), "few different medians")
    medians = random.choice([0.5, 1, 2], genes) if few_values else np.exp(random.normal(0, 3, genes))
    medians[random.random(genes) < 0.1] = np.nan
    slot_of_column = random.integers(-1, genes, columns).astype(np.int32)
    rows = [random.integers(0, columns, data.draw(st.integers(0, 200))) for _ in range(3)]
    indices = np.concatenate(rows).astype(np.int32)
    values = random.integers(0, data.draw(st.sampled_from([2, 5, 100_000])), len(indices)).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    limit = data.draw(st.integers(1, 70), "limit")
    tokens, lengths = np.zeros(len(indices) + 6, np.uint16), np.zeros(3, np.int32)
    outcome, sums = np.zeros(3, np.int8), np.zeros((3, 3))
    wanted, totals, names = np.ones(3, bool), np.empty(0), np.arange(genes, dtype=np.int32) + 2
    written = kernels.rank_cells(
        *(indptr, indices, values, wanted, totals, slot_of_column, medians, names, 1e4, limit, 0, -1, -1),
        *(tokens, lengths, outcome, sums),
    )
    expected = []
    for row in range(3):
        counts = np.zeros(genes + 1)  # the last one collects what has no token
        np.add.at(counts, slot_of_column[rows[row]], values[indptr[row] : indptr[row + 1]])
        total, matched = counts.sum(), counts[:-1].sum()
        with np.errstate(all="ignore"):
            scaled = counts[:-1] / total * 10_000 / medians
        order = np.argsort(-scaled, kind="stable")
        cell = [slot + 2 for slot in order if counts[slot] > 0 and scaled[slot] > 0][:limit]
        assert lengths[row] == len(cell)
        assert sums[row].tolist() == [total, matched, counts[:-1][np.isnan(medians)].sum() if total else 0]
        assert outcome[row] == (kernels.EMPTY if total == 0 else kernels.KEPT if cell else kernels.NO_GENES)
        expected += cell
    assert tokens[:written].tolist() == expected


@pytest.mark.parametrize("equal", [40, 4000])
def test_very_many_ties_and_a_far_outlier(equal: int) -> None:
    """All in one bucket but one: still exact, and ties in the order of slots whatever the order of columns."""
    random = np.random.default_rng(0)
    slots = random.permutation(equal).astype(np.int32)
    values = np.ones(equal)
    values[slots == 7] = 1e12
    tokens, outcome = np.zeros(equal + 2, np.int32), np.zeros(1, np.int8)
    kernels.rank_cells(
        *(np.array([0, equal]), np.arange(equal, dtype=np.int32), values, np.ones(1, bool), np.empty(0), slots),
        *(np.ones(equal), np.arange(equal, dtype=np.int32), 1e4, equal, 0, -1, -1),
        *(tokens, np.zeros(1, np.int32), outcome, np.zeros((1, 3))),
    )
    assert tokens[:equal].tolist() == [7, *(slot for slot in range(equal) if slot != 7)]


def test_ties_come_in_the_order_of_gene_ids(tmp_path: Path) -> None:
    """Not in that of columns, nor in that of tokens."""
    genes = sorted(GENE_IDS, reverse=True)
    gene_set = example_gene_set(genes=genes, medians=np.concatenate([[np.nan] * 2, np.ones(GENES)]))
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(sp.csr_matrix(np.ones((1, GENES), "f4"))))
    assert [gene_set.tokens[token] for token in tokens_by_row(path, gene_set)[0]] == sorted(GENE_IDS)


def test_columns_of_one_gene_are_summed_before(tmp_path: Path) -> None:
    """Exact duplicates, versions, other case and aliases: the total and the rank are of the sum."""
    gene = GENE_IDS[0]
    spelled = [gene, gene, gene.lower(), f"{gene}.12", "FORMER1", *GENE_IDS[5:]]
    data = example_anndata()
    data.var["ensembl_id"] = spelled
    counts = example_counts().toarray()
    gene_set = example_gene_set(aliases={"FORMER1": gene})
    means = [gene] * 5 + GENE_IDS[5:]
    assert tokens_by_row(write_h5ad(tmp_path / "a.h5ad", data), gene_set) == expected_rows(counts, gene_set, means)


def test_the_total_is_of_all_genes(tmp_path: Path) -> None:
    """A cell's total counts genes without a token: seen where rounding of the quotient makes or breaks a tie."""
    gene_set = example_gene_set(genes=sorted(GENE_IDS)[:25])
    found = tokens_by_row(write_h5ad(tmp_path / "a.h5ad"), gene_set)
    assert found == expected_rows(example_counts().toarray(), gene_set)
    tally = tally_of(tmp_path / "a.h5ad", gene_set)
    counts = example_counts().toarray()
    known = [gene in gene_set.tokens for gene in GENE_IDS]
    assert (tally.counts, tally.matched_counts) == (counts.sum(), counts[:, known].sum())


def test_a_gene_without_a_median_is_left_out_and_counted(tmp_path: Path) -> None:
    medians = example_gene_set().medians.copy()
    medians[[4, 9]] = np.nan
    gene_set, path = example_gene_set(medians=medians), write_h5ad(tmp_path / "a.h5ad")
    found = tokens_by_row(path, gene_set)
    assert found == expected_rows(example_counts().toarray(), gene_set)
    assert not {4, 9} & set(np.concatenate(list(found.values())).tolist())
    lost = [GENE_IDS.index(gene_set.tokens[token]) for token in (4, 9)]
    assert tally_of(path, gene_set).unranked_counts == example_counts().toarray()[:, lost].sum()
    with pytest.raises(DataError, match="none of its genes has a median"):
        tally_of(path, example_gene_set(medians=np.full(GENES + 2, np.nan)))


def test_given_totals_are_used_as_given(tmp_path: Path) -> None:
    """And their difference to the sums is counted."""
    counts = example_counts().toarray()
    totals = counts.sum(axis=1)
    totals[5], totals[6] = 3 * totals[5], totals[6] / 4
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(n_counts=totals))
    gene_set = example_gene_set()
    found = tokens_by_row(path, gene_set, n_counts_column="n_counts")
    assert found == {
        row: reference(counts[row], GENE_IDS, gene_set, float(totals[row])) for row in range(CELLS) if row != 3
    }
    tally = tally_of(path, gene_set, n_counts_column="n_counts")
    assert (tally.other_totals, tally.greatest_ratio) == (2, pytest.approx(4))
    assert tally_of(path, gene_set).other_totals == 0


@pytest.mark.parametrize("value", [0, np.nan, -3, np.inf])
def test_a_total_that_is_none(value: float, tmp_path: Path) -> None:
    totals = np.full(CELLS, 50.0)
    totals[[3, 11]] = value  # row 3 is empty: its total is of no use
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(n_counts=totals))
    with pytest.raises(DataError, match=rf"a\.h5ad: row 11 \(cell cell 11\): n_counts is {value:g}, not a positive"):
        tally_of(path, example_gene_set(), n_counts_column="n_counts")
    passing = np.ones(CELLS, bool)
    passing[11] = False
    path = write_h5ad(tmp_path / "b.h5ad", example_anndata(n_counts=totals, filter_pass=passing))
    assert tally_of(path, example_gene_set(), n_counts_column="n_counts").kept == CELLS - 2


@pytest.mark.parametrize("kind", [bool, int, float])
def test_filter_columns(kind: type, tmp_path: Path) -> None:
    passing = (np.arange(CELLS) % 3 == 0).astype(kind)
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(filter_pass=passing, other=~passing.astype(bool)))
    rows = {row for row in range(CELLS) if row % 3 == 0 and row != 3}
    assert set(tokens_by_row(path, example_gene_set())) == rows
    assert tally_of(path, example_gene_set()).left_out == {
        "filter": CELLS - len(rows) - 1, "empty": 1, "no_genes": 0, "few_genes": 0
    }  # fmt: skip
    others = set(range(CELLS)) - rows - {3}
    assert set(tokens_by_row(path, example_gene_set(), filter_column="other")) == others


@pytest.mark.parametrize("values", [["True"] * CELLS, ["1"] * CELLS])
def test_a_filter_of_text_is_refused(values: list[str], tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(filter_pass=values))
    with pytest.raises(DataError, match=r"column 'filter_pass' holds string values such as .*, but chooses cells"):
        tally_of(path, example_gene_set())


def test_totals_of_text_are_refused(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        DataError, match="column 'donor' holds string values such as 'donor 0', but is to give the totals"
    ):
        tally_of(path, example_gene_set(), n_counts_column="donor")


def test_cells_with_few_genes_are_left_out(tmp_path: Path) -> None:
    path, gene_set = write_h5ad(tmp_path / "a.h5ad"), example_gene_set(max_tokens=6)
    genes = np.diff(example_counts().indptr)
    found = tokens_by_row(path, gene_set, min_genes=14)
    assert set(found) == set(np.flatnonzero(genes >= 14).tolist())
    assert tally_of(path, gene_set, min_genes=14).left_out["few_genes"] == np.sum((genes < 14) & (genes > 0))


def test_empty_cells_and_explicit_zeros_give_nothing(tmp_path: Path) -> None:
    counts = sp.csr_matrix(
        (np.array([0, 0, 3, 0], "f4"), np.array([4, 5, 1, 2]), np.array([0, 2, 4, 4])), shape=(3, GENES)
    )
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(counts))
    gene_set = example_gene_set()
    assert tokens_by_row(path, gene_set) == {1: [gene_set.tokens.index(GENE_IDS[1])]}
    assert tally_of(path, gene_set).left_out["empty"] == 2


def test_genes_of_another_species(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=rf"a\.h5ad: none of its 40 genes .*{GENE_IDS[0]}.*ENSMUSG00000000001"):
        tally_of(path, example_gene_set(genes=["ENSMUSG00000000001"]))
    few = example_gene_set(genes=sorted(GENE_IDS)[:6])
    with pytest.raises(DataError, match=r"a\.h5ad.*counts.*--allow-low-match"):
        tally_of(path, few)
    assert tally_of(path, few, allow_low_match=True).kept > 10


def test_large_vocabularies_need_wider_tokens(tmp_path: Path) -> None:
    genes = sorted(GENE_IDS) + [f"X{number}" for number in range(70_000)]
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(example_counts(cells=2)))
    with open_counts(path) as counts:
        assert next(tokenize_blocks(counts, example_gene_set(genes=genes))).tokens.dtype == np.int32
        assert next(tokenize_blocks(counts, example_gene_set())).tokens.dtype == np.uint16


def test_ranges_of_rows_and_columns(tmp_path: Path) -> None:
    path, gene_set = write_h5ad(tmp_path / "a.h5ad"), example_gene_set()
    with open_counts(path) as counts:
        (block,) = tokenize_blocks(counts, gene_set, columns=["donor", "cell_type"], first=2, last=6)
    assert block.rows.tolist() == [2, 4, 5]
    assert block.columns.to_pydict() == {
        "donor": ["donor 2", "donor 0", "donor 1"],
        "cell_type": [None, "B cell", None],
    }


def test_the_order_of_operations_decides_near_ties(tmp_path: Path) -> None:
    """Medians in proportion to the counts: only rounding tells the genes apart, and it must be the rule's."""
    counts = np.random.default_rng(0).integers(1, 50, GENES).astype(np.float32)
    medians = np.concatenate([[np.nan] * 2, counts.astype(np.float64)[np.argsort(GENE_IDS)] / 7.3])
    gene_set = example_gene_set(medians=medians)
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(sp.csr_matrix(counts[None])))
    assert tokens_by_row(path, gene_set) == expected_rows(counts[None], gene_set)
    median_of = dict(zip(gene_set.tokens, gene_set.medians, strict=True))
    other = sorted(
        (-(float(count) * 10_000 / float(counts.sum()) / median_of[gene]), gene)
        for gene, count in zip(GENE_IDS, counts, strict=True)
    )
    assert [gene_set.tokens.index(gene) for _, gene in other] != expected_rows(counts[None], gene_set)[0]
