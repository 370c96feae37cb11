"""Check that a matrix holds counts, and name the fault where it does not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import kernels
from geneformer_pretrain.tokenization.matrices import CountsBlock

NOISE = 1e-5
"""Distance from a whole number, relative to the value (at least 1), that passes as float noise."""


class Named(Protocol):
    """A file with names for its rows and columns."""

    path: Path
    gene_ids: np.ndarray

    def cell_ids(self, first: int, last: int) -> list[str]:
        """Names of rows."""


def check_values(block: CountsBlock, file: Named, allow_noninteger: bool, other_matrices: Sequence[str]) -> None:
    """Raise DataError for the first value of a block that is no count.

    Values that are negative or not finite are never accepted: ranks of them mean nothing.

    Parameters
    ----------
    allow_noninteger
        Accept values that are not whole.
    other_matrices
        Options that would read another matrix of the file, for the remedy.
    """
    if block.data.dtype.kind == "u" or kernels.all_counts(block.data):
        return
    values = block.data.astype(np.float64)
    wrong = ~np.isfinite(values) | (values < 0)
    if not allow_noninteger:
        wrong |= _not_whole(np.where(wrong, 0, values))
    if not wrong.any():
        return
    at = int(np.argmax(wrong))
    row, cell = _cell_at(block, at)
    name, gene, value = file.cell_ids(row, row + 1)[0], file.gene_ids[block.indices[at]], values[at]
    remedy = counts_elsewhere(other_matrices)
    if np.isfinite(value) and value >= 0:
        remedy += ", or add --allow-noninteger to use these as they are"
    raise DataError(f"{file.path}: row {row} (cell {name}), gene {gene}: {_fault(value, cell)}, not a count. {remedy}.")


def counts_elsewhere(other_matrices: Sequence[str]) -> str:
    """Say where counts may be, if not in the matrix that was read."""
    if not other_matrices:
        return "Give a file with the raw counts"
    has_layer = any(option.startswith("--layer ") for option in other_matrices)
    beside_model = " (--counts-layer where a model is named)" if has_layer else ""
    return f"Read other values of this file with {' or '.join(other_matrices)}{beside_model}"


def describe_logarithms(block: CountsBlock, file: Named) -> str | None:
    """Name the first cell of a block whose values are not whole, if they are logarithms of scaled counts."""
    not_whole = _not_whole(block.data.astype(np.float64))
    if not not_whole.any():
        return None
    row, cell = _cell_at(block, int(np.argmax(not_whole)))
    total = _total_of_logarithms(cell)
    if total is None:
        return None
    name = file.cell_ids(row, row + 1)[0]
    return f"row {row} (cell {name}) is log-normalised (log(1 + x), x summing to {total:,.0f})"


def _not_whole(values: np.ndarray) -> np.ndarray:
    return np.abs(values - np.rint(values)) > NOISE * np.maximum(values, 1)


def _cell_at(block: CountsBlock, place: int) -> tuple[int, np.ndarray]:
    """Return the row of the file that a value is in, and all values of it, float64."""
    row = int(np.searchsorted(block.indptr, place, "right")) - 1
    return block.first_row + row, block.data[block.indptr[row] : block.indptr[row + 1]].astype(np.float64)


def _total_of_logarithms(cell: np.ndarray) -> float | None:
    """Return the sum of x where the values of a cell are log(1 + x), x counts scaled to that sum; else None."""
    if np.isfinite(cell).all() and (cell >= 0).all() and cell.max() < 30:
        counts = np.expm1(cell[cell > 0])
        if _multiples(counts):
            return float(counts.sum())
    return None


def _fault(value: float, cell: np.ndarray) -> str:
    """Name the fault of a value, from the values of its cell."""
    if not np.isfinite(value):
        return f"{value} is not finite"
    if value < 0:
        return f"{value:g} is negative" + (" (a scaled matrix?)" if value != np.rint(value) else "")
    if (total := _total_of_logarithms(cell)) is not None:
        return f"{value:g} is log-normalised (log(1 + x), x summing to {total:,.0f} in this cell)"
    if np.isfinite(cell).all() and (cell >= 0).all() and _multiples(cell[cell > 0]):
        return f"{value:g} is normalised (summing to {cell.sum():,.0f} in this cell)"
    return f"{value:g} is not a whole number"


def _multiples(values: np.ndarray) -> bool:
    """Return True if all values are multiples of the least, as scaled counts are of a cell's single counts."""
    ratio = values / values.min()
    return bool(len(values) > 1 and np.all(np.abs(ratio - np.rint(ratio)) < 1e-3 * np.maximum(ratio, 1)))
