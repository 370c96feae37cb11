"""Read tokenized cells from parquet files, batch by batch, and check each of them."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geneformer_pretrain.errors import DataError, require_readable

COLUMN = "input_ids"
INT32_MAX = np.iinfo(np.int32).max

# One batch is decoded at a time. Both limits bound its memory: the second one where long cells cluster.
TOKENS_PER_BATCH = 512 * 1024
MAX_ROWS_PER_BATCH = 2048

BATCHES_AHEAD = 4
"""Batches decoded in the background."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class CellBatch(NamedTuple):
    """Checked cells of one file.

    Attributes
    ----------
    path, row
        File, and row in it of the first cell.
    tokens
        Integers [num_tokens], in [0, 2**31).
    offsets
        int64 [num_cells + 1], cell i is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    path: Path
    row: int
    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file's numbers, from its footer."""

    path: Path
    rows: int
    tokens: int
    rows_per_batch: int


def inspect_parquet(path: Path) -> ParquetFile:
    """Check a file's schema and size from its footer, so that hours of conversion are not begun in vain.

    Raises
    ------
    DataError
        If the file cannot be read as parquet or has no usable column.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        with path.open("rb") as content:
            start = content.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise DataError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`") from error
        raise DataError(f"{path}: cannot be read as parquet ({error}); {_advice(path)}") from error
    if metadata.num_rows == 0:
        return ParquetFile(path, 0, 0, 1)
    require_column(schema, path)
    first = metadata.row_group(0)
    column = next(i for i in range(first.num_columns) if first.column(i).path_in_schema.split(".")[0] == COLUMN)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    tokens = [group.column(column).num_values for group in groups]
    densest = max(count / group.num_rows for count, group in zip(tokens, groups, strict=True) if group.num_rows)
    rows_per_batch = min(max(int(TOKENS_PER_BATCH / max(densest, 1)), 1), MAX_ROWS_PER_BATCH)
    return ParquetFile(path, metadata.num_rows, sum(tokens), rows_per_batch)


def _advice(path: Path) -> str:
    """Remedy for a file that is no parquet, by its name and what lies beside it."""
    from geneformer_pretrain.tokenization.counts import SUFFIXES

    if (path.parent / "state.json").is_file():
        return f"of a dataset saved with save_to_disk, give the folder {path.parent}"
    if (path.parent / "dataset_info.json").is_file():
        return LOAD_DATASET_CACHE
    if path.suffix in SUFFIXES:
        return "these look like counts: make a corpus of them with `geneformer-pretrain tokenize`"
    return "replace the file or take it out of the corpus"


LOAD_DATASET_CACHE = (
    "this is the private cache of datasets.load_dataset, without the list of its files; save the dataset with "
    "load_dataset(...).save_to_disk(FOLDER) and give that folder, or give the files that it was loaded from"
)


def require_column(schema: pa.Schema, path: Path) -> pa.DataType:
    """Return the type of the ``input_ids`` column, after checking that it is a list of integers."""
    if COLUMN not in schema.names:
        raise DataError(
            f"{path}: no column {COLUMN!r}, only {schema.names}; rename the column that holds the token ids"
        )
    if schema.names.count(COLUMN) > 1:
        raise DataError(f"{path}: has several columns {COLUMN!r}; keep one of them")
    kind = schema.field(COLUMN).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise DataError(
            f"{path}: column {COLUMN!r} has type {kind}, not a list of integers; store one list of token ids a row"
        )
    return kind


def read_parquet(files: Sequence[ParquetFile]) -> Iterator[CellBatch]:
    """Yield the checked cells of several files in order; decoding runs ahead in a thread.

    Raises
    ------
    DataError
        If a file is damaged or holds a cell that cannot be trained on; names the file, row and value.
    """
    batches = _decode(files)
    with ThreadPoolExecutor(1, "parquet") as thread:
        ahead: deque[Future[CellBatch | None]] = deque()
        try:
            while True:
                while len(ahead) < BATCHES_AHEAD:
                    ahead.append(thread.submit(next, batches, None))
                batch = ahead.popleft().result()
                if batch is None:
                    return
                yield batch
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


def _decode(files: Sequence[ParquetFile]) -> Iterator[CellBatch]:
    for source in files:
        row = 0
        try:
            # A small read buffer without pre-buffering keeps Arrow from holding whole row groups.
            with pq.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(source.rows_per_batch, columns=[COLUMN], use_threads=False):
                    yield CellBatch(source.path, row, *check_cells(batch.column(0), source.path, row))
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            require_readable(error, source.path)
            raise DataError(
                f"{source.path}: damaged after row {row} ({error}); make or download the file again"
            ) from error


def check_cells(column: pa.Array, path: Path, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch's tokens [num_tokens] and the cells' boundaries in them, int64 [num_rows + 1]."""
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py()
        raise DataError(f"{path}, row {row}: {COLUMN} is null; drop the row")
    if pa.types.is_fixed_size_list(column.type):
        offsets = np.arange(len(column) + 1, dtype=np.int64) * column.type.list_size
    else:
        offsets = column.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
    lengths = np.diff(offsets)
    if lengths.min() == 0:
        raise DataError(f"{path}, row {first_row + int(lengths.argmin())}: {COLUMN} is empty; drop the row")
    values = column.flatten()
    if values.null_count:
        position = pc.index(values.is_null(), True).as_py()
        row = first_row + row_of(position, offsets)
        raise DataError(f"{path}, row {row}: {COLUMN} holds a null; remove it or drop the row")
    tokens = values.to_numpy()
    if tokens.min() < 0 or tokens.max() > INT32_MAX:
        position = int(np.argmax((tokens < 0) | (tokens > INT32_MAX)))
        row = first_row + row_of(position, offsets)
        raise DataError(
            f"{path}, row {row}: token {tokens[position]} is not in [0, {INT32_MAX}]; tokenize the cell again"
        )
    return tokens, offsets


def row_of(position: int, offsets: np.ndarray) -> int:
    """Row of the cell that holds the token at a position."""
    return int(np.searchsorted(offsets, position, side="right")) - 1
