"""Columns of the cells that decide which cells count, and by which total."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from geneformer_pretrain.errors import DataError

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.counts import CountsFile

FILTER_COLUMN = "filter_pass"
"""Column that chooses cells if it is there and no other is named."""


def filter_column_of(counts: "CountsFile", named: str | None) -> str | None:
    """Return the column that chooses the cells of a file: the one named, else `filter_pass` if there is one."""
    return named if named is not None or FILTER_COLUMN not in counts.obs_columns else FILTER_COLUMN


def passing_cells(counts: "CountsFile", column: str | None, first: int, last: int) -> np.ndarray:
    """Read which of the cells `first` to `last` pass a filter, bool [cells]; those with a missing value do not.

    Parameters
    ----------
    column
        Boolean or numeric: cells with True or 1 pass. None: all cells pass.

    Raises
    ------
    DataError
        If the column holds something else.
    """
    if column is None:
        return np.ones(last - first, bool)
    values = _read(counts, column, first, last)
    if not (pa.types.is_boolean(values.type) or _is_number(values.type)):
        raise _refused(counts, column, values, "chooses cells; make it boolean, or 0 and 1")
    values = values.cast(pa.float64())
    return np.asarray(values.fill_null(0)) == 1


def given_totals(counts: "CountsFile", column: str, first: int, last: int) -> np.ndarray:
    """Read the totals of the cells `first` to `last` from a column, float64 [cells]; NaN where missing.

    Raises
    ------
    DataError
        If the column does not hold numbers.
    """
    values = _read(counts, column, first, last)
    if not _is_number(values.type):
        raise _refused(counts, column, values, "is to give the totals of cells")
    return np.asarray(values.cast(pa.float64()).fill_null(np.nan))


def _read(counts: "CountsFile", column: str, first: int, last: int) -> pa.Array:
    return counts.obs([column], first, last).column(0).combine_chunks()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _refused(counts: "CountsFile", column: str, values: pa.Array, purpose: str) -> DataError:
    example = next((value for value in values.to_pylist() if value is not None), None)
    return DataError(
        f"{counts.path}: the column {column!r} holds {values.type} values such as {example!r}, but {purpose}."
    )
