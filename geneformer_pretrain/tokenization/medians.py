"""Medians of many genes over any number of cells: in fixed memory within 0.5%, or exactly.

The sketch counts the values of each gene in bins. A value v > 0 is 2**e * m with 1 <= m < 2; its bin is known from e
and the first 12 bits of m, by integer operations alone. Within an octave the edges l, u of a bin (multiples of 2**-12)
satisfy 199 u < 201 l, that is (u - l) / (u + l) < 1/200.

**Bound.** A bin's values are represented by r = 2 l u / (l + u). For l <= v <= u, |r - v| / v is greatest at an edge:
(r - l) / l = (u - r) / u = (u - l) / (u + l) < 1/200. The median of n values is the mean of the values v, w of the
ranks (n - 1) // 2 and n // 2. Counting through the bins finds the very bins that hold these two, so the estimate is
(r + s) / 2 with |r - v| < v / 200 and |s - w| < w / 200, hence |(r + s) / 2 - (v + w) / 2| < ((v + w) / 2) / 200. As
the edges are whole multiples of 2**-12, the inequality is strict by at least 1e-7, far above what rounding adds. The
bound holds for values from 2**-14 to 2**14; values outside are counted too, and a median that falls there raises an
error (with a cell's own total, count / total * 10,000 reaches neither end below totals of 160 million).

Sketches add up: bins are integers, so the result does not depend on the order of cells or on machines.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.jit import compiled

RELATIVE_ERROR = 0.005
"""Bound of the relative error of a median from a sketch."""

_CELL_BITS = 12
_LOWEST, _HIGHEST = -14, 14


def _edges_of_octave() -> list[int]:
    """Return edges of bins in [1, 2] times 2**12, each as far from the last as the bound allows."""
    edges, end = [1 << _CELL_BITS], 2 << _CELL_BITS
    while edges[-1] < end:
        edges.append(min((201 * edges[-1] - 1) // 199, end))
    return edges


_EDGES = _edges_of_octave()
_PER_OCTAVE = len(_EDGES) - 1
_BIN_OF_CELL = np.repeat(np.arange(_PER_OCTAVE), np.diff(_EDGES)).astype(np.int64)

NUM_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
"""Bins of a gene; the first and the last hold what lies outside of 2**-14 to 2**14."""

LAYOUT = [_LOWEST, _HIGHEST, _CELL_BITS, NUM_BINS]
"""What makes bins of two releases the same."""


def _representatives() -> np.ndarray:
    """Return the value that stands for each bin, float64 [NUM_BINS]; NaN for the first and the last."""
    lower, upper = np.array(_EDGES[:-1], np.float64), np.array(_EDGES[1:], np.float64)
    octave = 2 * lower * upper / (lower + upper) / (1 << _CELL_BITS)
    scales = 2.0 ** np.arange(_LOWEST, _HIGHEST)
    return np.concatenate([[np.nan], np.outer(scales, octave).ravel(), [np.nan]])


REPRESENTATIVES = _representatives()


@compiled
def _bin(bits: Any, bin_of_cell: Any) -> Any:
    """Return the bin of a positive value from its bits as float64."""
    octave = (bits >> 52) - 1023
    if octave < _LOWEST:
        return 0
    if octave >= _HIGHEST:
        return NUM_BINS - 1
    cell = (bits >> (52 - _CELL_BITS)) & ((1 << _CELL_BITS) - 1)
    return 1 + (octave - _LOWEST) * _PER_OCTAVE + bin_of_cell[cell]


@compiled
def _scale_values(
    indptr: Any,
    indices: Any,
    data: Any,
    totals: Any,
    target_sum: Any,
    gene_of_column: Any,
    column_counts: Any,
    num_genes: Any,
    genes: Any,
    values: Any,
) -> Any:
    """Scale the counts of a block; columns of one gene are summed. Cells with a total of 0 are left out.

    Writes the genes of each cell that have counts into `genes`, their values into `values`. Returns their number.
    """
    last_cell, sums = np.full(num_genes, -1), np.empty(num_genes)
    end = 0
    for cell in range(len(indptr) - 1):
        if totals[cell] == 0:
            continue
        start = end
        for position in range(indptr[cell], indptr[cell + 1]):
            column, count = indices[position], np.float64(data[position])
            if count == 0:
                continue
            column_counts[column] += count
            gene = gene_of_column[column]
            if gene < 0:
                continue
            if last_cell[gene] == cell:
                sums[gene] += count
            else:
                last_cell[gene], sums[gene] = cell, count
                genes[end] = gene
                end += 1
        for place in range(start, end):
            values[place] = sums[genes[place]] / totals[cell] * target_sum
    return end


@compiled
def _count_values(genes: Any, bits: Any, bin_of_cell: Any, bins: Any) -> None:
    """Count values, given by their bits, in the bins of their genes."""
    for place in range(len(genes)):
        bins[genes[place], _bin(bits[place], bin_of_cell)] += np.uint32(1)


@compiled
def _collect_values(
    genes: Any,
    values: Any,
    bits: Any,
    bin_of_cell: Any,
    first_bin: Any,
    last_bin: Any,
    next_place: Any,
    end: Any,
    collected: Any,
) -> None:
    """Write the values that lie in the bins `first_bin` to `last_bin` of their gene from `next_place` to `end`."""
    for place in range(len(genes)):
        gene = genes[place]
        if first_bin[gene] <= _bin(bits[place], bin_of_cell) <= last_bin[gene]:
            if next_place[gene] < end[gene]:
                collected[next_place[gene]] = values[place]
            next_place[gene] += 1


@compiled
def sum_cells(indptr: Any, data: Any, kept: Any, totals: Any) -> None:
    """Sum the counts of each cell into `totals`, float64 [cells]; 0 for cells that are not kept."""
    for cell in range(len(indptr) - 1):
        total = 0.0
        if kept[cell]:
            for position in range(indptr[cell], indptr[cell + 1]):
                total += data[position]
        totals[cell] = total


@dataclass(frozen=True, eq=False)
class CellBlock:
    """Counts of some cells, and what scales them.

    Attributes
    ----------
    indptr, indices, data
        Rows of a sparse matrix; zeros, unsorted and repeated indices may occur.
    totals
        Total of each cell, float64 [cells]; 0 leaves the cell out.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    totals: np.ndarray


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of a file as the sketch sees them.

    Attributes
    ----------
    gene_of_column
        Gene of each column, int32 [columns]; -1 for none.
    counts
        Sum of the counts of each column so far, float64 [columns].
    """

    gene_of_column: np.ndarray
    counts: np.ndarray

    @classmethod
    def create(cls, gene_of_column: np.ndarray) -> "Columns":
        """Start with counts of zero."""
        return cls(gene_of_column, np.zeros(len(gene_of_column)))

    def scale(self, block: CellBlock, num_genes: int, target_sum: float) -> tuple[np.ndarray, np.ndarray]:
        """Return gene and value of each count of a block, int32 and float64 [counts], and add to `counts`."""
        genes, values = np.empty(len(block.data), np.int32), np.empty(len(block.data))
        arrays = (block.indptr, block.indices, block.data, block.totals)
        number = _scale_values(*arrays, target_sum, self.gene_of_column, self.counts, num_genes, genes, values)
        return genes[:number], values[:number]


class MedianSketch:
    """Values of each gene, counted in bins; see the module for the bound.

    Parameters
    ----------
    bins
        Number of values in each bin, uint32 [genes, NUM_BINS]: 7.8 kB a gene.
    """

    def __init__(self, bins: np.ndarray) -> None:
        self.bins = bins

    @classmethod
    def empty(cls, num_genes: int) -> "MedianSketch":
        """Make a sketch of no cells."""
        return cls(np.zeros((num_genes, NUM_BINS), np.uint32))

    def add(self, block: CellBlock, columns: Columns, target_sum: float) -> None:
        """Count the values of a block. Runs without Python's lock, so that the next block can be read meanwhile."""
        genes, values = columns.scale(block, len(self.bins), target_sum)
        _count_values(genes, values.view(np.int64), _BIN_OF_CELL, self.bins)

    @property
    def num_cells(self) -> np.ndarray:
        """Number of cells with counts of each gene, int64 [genes]."""
        return self.bins.sum(axis=1, dtype=np.int64)

    def median_bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the bins of the two middle values.

        Returns
        -------
        first, last
            Bin of the value of rank (n - 1) // 2 and of rank n // 2, int64 [genes]; 0 for a gene without values.
        below
            Number of values below the first of them, int64 [genes].
        """
        first, last, below = (np.zeros(len(self.bins), np.int64) for _ in range(3))
        for gene, bins in enumerate(self.bins):
            cumulative = np.cumsum(bins, dtype=np.int64)
            if number := int(cumulative[-1]):
                first[gene], last[gene] = np.searchsorted(cumulative, [(number - 1) // 2, number // 2], side="right")
                below[gene] = cumulative[first[gene]] - bins[first[gene]]
        return first, last, below

    def medians(self) -> np.ndarray:
        """Return the medians within `RELATIVE_ERROR`, float64 [genes].

        NaN for genes without values, infinite for a median outside of 2**-14 to 2**14.
        """
        first, last, _ = self.median_bins()
        medians = (REPRESENTATIVES[first] + REPRESENTATIVES[last]) / 2
        return np.where(self.num_cells == 0, np.nan, np.where(np.isnan(medians), np.inf, medians))


class ExactMedians:
    """Exact medians from a second pass: collects the values that share a bin with the median.

    Parameters
    ----------
    sketch
        Sketch of all the cells.
    first_gene, last_gene
        Range of genes of this pass; see `groups`.
    """

    def __init__(self, sketch: MedianSketch, first_gene: int, last_gene: int) -> None:
        self._genes = np.arange(first_gene, last_gene)
        self._number = sketch.num_cells
        first, last, self._below = sketch.median_bins()
        sizes = np.zeros(len(first), np.int64)
        for gene in self._genes:
            if self._number[gene]:
                sizes[gene] = sketch.bins[gene, first[gene] : last[gene] + 1].sum(dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._next = self._starts.copy()
        self._first, self._last = np.where(sizes > 0, first, 1), np.where(sizes > 0, last, 0)
        self._collected = np.empty(int(self._ends[-1]))

    def add(self, block: CellBlock, columns: Columns, target_sum: float) -> None:
        """Collect the values of a block. Runs without Python's lock."""
        genes, values = columns.scale(block, len(self._first), target_sum)
        bounds = (self._first, self._last, self._next, self._ends)
        _collect_values(genes, values, values.view(np.int64), _BIN_OF_CELL, *bounds, self._collected)

    def medians(self) -> np.ndarray:
        """Return the medians of the genes of this pass, float64 [last_gene - first_gene]; NaN without values.

        Raises
        ------
        DataError
            If the second pass saw other cells than the first.
        """
        if not np.array_equal(self._next, self._ends):
            raise DataError("The counts changed between the first and the second pass over them; start again.")
        medians = np.full(len(self._genes), np.nan)
        for place, gene in enumerate(self._genes):
            if number := int(self._number[gene]):
                values = self._collected[self._starts[gene] : self._ends[gene]]
                ranks = np.array([(number - 1) // 2, number // 2]) - self._below[gene]
                medians[place] = np.partition(values, ranks)[ranks].mean()
        return medians


def groups(sketch: MedianSketch, most_values: int) -> list[tuple[int, int]]:
    """Divide the genes into ranges whose `ExactMedians` hold at most `most_values` values, or a single gene's.

    Each range takes one further pass over the counts.
    """
    first, last, _ = sketch.median_bins()
    ranges, start, held = [], 0, 0
    for gene, bins in enumerate(sketch.bins):
        size = int(bins[first[gene] : last[gene] + 1].sum(dtype=np.int64))
        if gene > start and held + size > most_values:
            ranges.append((start, gene))
            start, held = gene, 0
        held += size
    return [*ranges, (start, len(sketch.bins))]
