"""Matrices of counts, read in blocks of rows: by cells (CSR), dense, and by genes or unordered (transposed on disk).

The arrays may be h5py datasets, zarr arrays, memory maps: anything that gives a numpy array for a slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import kernels

BLOCK_VALUES = 1 << 20
"""Values in a block; a few times the chunk of a compressed array where that is more."""
MOST_BLOCK_VALUES = 1 << 23
BLOCK_ROWS = 1 << 14
DENSE_BYTES = 64 << 20
"""Bytes of a dense block; more only where one row of chunks needs them."""


@dataclass(frozen=True)
class CountsBlock:
    """Some consecutive cells of a matrix, in compressed sparse rows.

    Explicit zeros, unsorted and repeated columns may occur.

    Attributes
    ----------
    first_row
        Row of the first cell in the file, from 0.
    indptr
        [cells + 1] int64, from 0: the values of cell i lie at indptr[i] to indptr[i + 1].
    indices
        [values] int32 or int64 columns of the matrix.
    data
        [values] float32, float64 or an integer type.
    """

    first_row: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1


class Matrix(Protocol):
    """Counts of cells (rows) and genes (columns)."""

    num_cells: int
    num_genes: int

    def blocks(self, first: int, last: int) -> Iterator[CountsBlock]:
        """Yield the rows `first` to `last` in order."""


def readable(data: np.ndarray) -> np.ndarray:
    """Convert half precision, booleans and foreign byte orders to types that the kernels take."""
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    if data.dtype == np.float16:
        return data.astype(np.float32)
    return data if data.dtype.isnative else data.astype(data.dtype.newbyteorder("="))


class ByCell:
    """A sparse matrix stored by cells: AnnData's csr_matrix, 10x's HDF5."""

    def __init__(self, indptr: Any, indices: Any, data: Any, num_genes: int) -> None:
        self._indptr, self._indices, self._data = indptr, indices, data
        self.num_cells, self.num_genes = int(indptr.shape[0]) - 1, num_genes
        chunk = (getattr(data, "chunks", None) or (0,))[0]
        self._block_values = min(max(4 * chunk, BLOCK_VALUES), MOST_BLOCK_VALUES)

    def blocks(self, first: int, last: int) -> Iterator[CountsBlock]:
        """Yield rows; see `Matrix.blocks`."""
        for start in range(first, last, BLOCK_ROWS):
            indptr = np.asarray(self._indptr[start : min(start + BLOCK_ROWS, last) + 1]).astype(np.int64)
            if indptr[0] < 0 or np.any(np.diff(indptr) < 0) or indptr[-1] > self._data.shape[0]:
                raise DataError(f"the row pointers (indptr) are damaged near row {start}; get a new copy of the file.")
            row = 0
            while row < len(indptr) - 1:
                end = int(np.searchsorted(indptr, indptr[row] + self._block_values, "right")) - 1
                end = min(max(end, row + 1), len(indptr) - 1)
                begin, stop = int(indptr[row]), int(indptr[end])
                yield CountsBlock(
                    start + row,
                    indptr[row : end + 1] - begin,
                    np.asarray(self._indices[begin:stop]),
                    readable(np.asarray(self._data[begin:stop])),
                )
                row = end


class Dense:
    """A dense matrix, [cells, genes], or [genes, cells] as loom has it."""

    def __init__(self, array: Any, *, by_gene: bool = False) -> None:
        self._array, self._by_gene = array, by_gene
        genes, cells = (0, 1) if by_gene else (1, 0)
        self.num_genes, self.num_cells = int(array.shape[genes]), int(array.shape[cells])
        row_bytes = max(self.num_genes * array.dtype.itemsize, 1)
        chunk = (getattr(array, "chunks", None) or (1, 1))[cells]
        self._rows = max(DENSE_BYTES // row_bytes // chunk, 1) * chunk
        if self._rows * row_bytes > 8 * DENSE_BYTES:  # chunks of very many cells: rather read them more than once
            self._rows = max(8 * DENSE_BYTES // row_bytes, 1)

    def blocks(self, first: int, last: int) -> Iterator[CountsBlock]:
        """Yield rows; see `Matrix.blocks`. Blocks end where rows of chunks do."""
        row = first
        while row < last:
            end = min((row // self._rows + 1) * self._rows, last)
            if self._by_gene:
                values = np.ascontiguousarray(np.asarray(self._array[:, row:end]).T)
            else:
                values = np.ascontiguousarray(self._array[row:end])
            yield CountsBlock(row, *kernels.compress_rows(readable(values)))
            row = end


class Selected:
    """Some columns of a matrix.

    Parameters
    ----------
    keep
        [genes] bool.
    """

    def __init__(self, matrix: Matrix, keep: np.ndarray) -> None:
        self._matrix, self._keep = matrix, keep
        self._new_column = np.cumsum(keep) - 1
        self.num_cells, self.num_genes = matrix.num_cells, int(keep.sum())

    def blocks(self, first: int, last: int) -> Iterator[CountsBlock]:
        """Yield rows; see `Matrix.blocks`."""
        for block in self._matrix.blocks(first, last):
            require_columns(block, len(self._keep))
            kept = self._keep[block.indices]
            before = np.concatenate([[0], np.cumsum(kept)])
            columns = self._new_column[block.indices[kept]]
            yield CountsBlock(block.first_row, before[block.indptr], columns, block.data[kept])


def require_columns(block: CountsBlock, num_genes: int) -> None:
    """Raise DataError if a block has columns that the matrix has not."""
    if not kernels.columns_within(block.indices, num_genes):
        last = block.first_row + block.num_cells - 1
        raise DataError(
            f"rows {block.first_row} to {last} have column numbers outside of 0 to {num_genes - 1}: "
            "the file is damaged; get a new copy."
        )
