"""Medians from bins stay within the bound for any values; a second pass gives them exactly."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import medians as module
from geneformer_pretrain.tokenization.medians import (
    NUM_BINS,
    RELATIVE_ERROR,
    REPRESENTATIVES,
    CellBlock,
    Columns,
    ExactMedians,
    MedianSketch,
    groups,
    sum_cells,
)

LOWEST, HIGHEST = 2.0**-14, 2.0**14
VALUES = st.floats(LOWEST, np.nextafter(HIGHEST, 0))


def one_gene(values: list[float]) -> CellBlock:
    """Cells of one gene whose scaled values are exactly `values`: totals and target sum are 1."""
    count = len(values)
    return CellBlock(np.arange(count + 1), np.zeros(count, np.int32), np.array(values, np.float64), np.ones(count))


def columns_of(gene_of_column: list[int]) -> Columns:
    return Columns.create(np.array(gene_of_column, np.int32))


def test_edges_of_bins_keep_the_bound_in_exact_arithmetic() -> None:
    edges = module._EDGES
    assert (edges[0], edges[-1]) == (4096, 8192)
    for lower, upper in pairwise(edges):
        assert Fraction(upper - lower, upper + lower) < Fraction(1, 200) - Fraction(1, 10**7)
    known = REPRESENTATIVES[1:-1]
    assert len(known) == NUM_BINS - 2
    octave = np.repeat(2.0 ** np.arange(-14, 14), len(edges) - 1)
    lower = octave * np.tile(np.array(edges[:-1]) / 4096, 28)
    upper = octave * np.tile(np.array(edges[1:]) / 4096, 28)
    assert (lower[0], upper[-1]) == (LOWEST, HIGHEST)
    np.testing.assert_array_equal(lower[1:], upper[:-1])
    for edge in (lower, upper):
        assert (np.abs(known - edge) / edge < RELATIVE_ERROR).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40))
@example([LOWEST])
@example([np.nextafter(HIGHEST, 0), LOWEST])
@example([1.0, np.nextafter(1, 2), np.nextafter(1, 0)])
def test_the_median_is_within_the_bound_and_exact_in_a_second_pass(values: list[float]) -> None:
    block, sketch = one_gene(values), MedianSketch.empty(1)
    sketch.add(block, columns_of([0]), 1.0)
    expected = np.median(values)
    assert abs(sketch.medians()[0] - expected) <= RELATIVE_ERROR * expected
    exact = ExactMedians(sketch, 0, 1)
    exact.add(block, columns_of([0]), 1.0)
    assert exact.medians()[0] == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(VALUES, st.floats(1e-300, 1e300)), min_size=1, max_size=20))
def test_values_outside_of_the_range_never_give_a_wrong_median(values: list[float]) -> None:
    block, sketch = one_gene(values), MedianSketch.empty(1)
    sketch.add(block, columns_of([0]), 1.0)
    estimate, expected = sketch.medians()[0], np.median(values)
    assert np.isinf(estimate) or abs(estimate - expected) <= RELATIVE_ERROR * expected
    middle = np.sort(values)[[(len(values) - 1) // 2, len(values) // 2]]
    assert np.isinf(estimate) == bool((middle < LOWEST).any() or (middle >= HIGHEST).any())
    exact = ExactMedians(sketch, 0, 1)
    exact.add(block, columns_of([0]), 1.0)
    assert exact.medians()[0] == expected


@pytest.mark.parametrize(
    ("index_type", "data_type"), [(np.int32, np.float32), (np.int64, np.float64), (np.int32, np.uint16)]
)
def test_columns_of_a_gene_are_summed_and_zeros_ignored(index_type: type, data_type: type) -> None:
    """One cell: gene 0 in two columns and one of them twice, gene 1 explicitly zero, one column of no gene."""
    indices = np.array([3, 0, 2, 0, 1, 4], index_type)
    data = np.array([4, 1, 2, 3, 0, 10], data_type)
    totals = np.empty(2)
    sum_cells(np.array([0, 6, 6]), data, np.array([True, True]), totals)
    assert totals.tolist() == [20, 0]
    block = CellBlock(np.array([0, 6, 6]), indices, data, totals)
    columns, sketch = columns_of([0, 1, 0, 2, -1]), MedianSketch.empty(3)
    sketch.add(block, columns, 10_000.0)
    assert sketch.num_cells.tolist() == [1, 0, 1]
    exact = ExactMedians(sketch, 0, 3)
    exact.add(block, columns_of([0, 1, 0, 2, -1]), 10_000.0)
    np.testing.assert_array_equal(exact.medians(), [3000, np.nan, 2000])
    assert columns.counts.tolist() == [4, 0, 2, 4, 10]


def test_cells_that_are_not_kept_count_nowhere() -> None:
    totals = np.empty(2)
    indptr, indices, data = np.array([0, 1, 2]), np.zeros(2, np.int32), np.array([5.0, 7.0])
    sum_cells(indptr, data, np.array([False, True]), totals)
    columns, sketch = columns_of([0]), MedianSketch.empty(1)
    sketch.add(CellBlock(indptr, indices, data, totals), columns, 1.0)
    assert (totals.tolist(), sketch.num_cells.tolist(), columns.counts.tolist()) == ([0, 7], [1], [7])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_passes_cover_each_gene_once_and_hold_no_more_than_allowed(sizes: list[int], most: int) -> None:
    sketch = MedianSketch.empty(len(sizes))
    sketch.bins[:, 5] = sizes
    ranges = groups(sketch, most)
    assert [gene for first, last in ranges for gene in range(first, last)] == list(range(len(sizes)))
    assert all(sum(sizes[first:last]) <= most or last - first == 1 for first, last in ranges)


@pytest.mark.parametrize("later", [[2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
def test_counts_that_change_between_the_passes_are_noticed(later: list[float]) -> None:
    sketch = MedianSketch.empty(1)
    sketch.add(one_gene([2.0, 2.0, 2.0]), columns_of([0]), 1.0)
    exact = ExactMedians(sketch, 0, 1)
    exact.add(one_gene(later), columns_of([0]), 1.0)
    with pytest.raises(DataError, match="changed between"):
        exact.medians()
