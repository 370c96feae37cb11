"""Matrices that are not stored by cells, read through a copy on disk that is.

A matrix by genes (CSC) or a list of entries (Matrix Market) gives no row without reading all of it. Its entries are
distributed once, in order, over buckets of consecutive rows, and a bucket is sorted by row when it is read. That
reads the row numbers twice and the rest once, and needs 8 bytes and one value for each entry on disk (12 bytes for
float32: 12 GB for a billion entries) until the work is done. Memory stays near 400 MB whatever the size, beside 12
bytes a cell.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import locked, new_folder
from geneformer_pretrain.tokenization import kernels
from geneformer_pretrain.tokenization.matrices import CountsBlock, readable

BUCKET_VALUES = 1 << 21
"""Entries in a bucket, unless one row has more."""
CHUNK_VALUES = 1 << 22
"""Entries distributed at a time."""

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and values, [n] each."""


class Source(Protocol):
    """Entries of a matrix in any order, in chunks of about CHUNK_VALUES."""

    num_cells: int
    num_genes: int
    dtype: np.dtype

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the row of each entry."""

    def entries(self) -> Iterator[Entries]:
        """Yield all entries, in the same order."""


class Transposed:
    """Entries in any order, read by rows.

    Parameters
    ----------
    folder
        Folder of the copy; made when the first block is read, and used again if it is there.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self._source, self._folder = source, folder
        self.num_cells, self.num_genes = source.num_cells, source.num_genes

    def prepare(self) -> None:
        """Write the copy unless it is there; a process that finds another one at it waits."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._folder.with_name(self._folder.name + ".lock")):
            if not self._folder.exists():
                with new_folder(self._folder) as folder:
                    _distribute(self._source, folder)

    def blocks(self, first: int, last: int) -> Iterator[CountsBlock]:
        """Yield rows; see `Matrix.blocks`."""
        self.prepare()
        layout = json.loads((self._folder / "layout.json").read_text())
        starts, offsets, dtype = layout["first_rows"], layout["offsets"], np.dtype(layout["dtype"])
        if first >= last:
            return
        bucket = int(np.searchsorted(starts, first, "right")) - 1
        while bucket < len(starts) - 1 and starts[bucket] < last:
            begin, count = offsets[bucket], offsets[bucket + 1] - offsets[bucket]
            rows, columns, data = (
                np.fromfile(self._folder / name, kind, count, offset=begin * np.dtype(kind).itemsize)
                for name, kind in (("rows", np.int32), ("columns", np.int32), ("data", dtype))
            )
            num_rows = starts[bucket + 1] - starts[bucket]
            indptr, indices, values = kernels.sort_by_row(rows, columns, readable(data), num_rows)
            start, end = max(first - starts[bucket], 0), min(last - starts[bucket], num_rows)
            span = slice(indptr[start], indptr[end])
            yield CountsBlock(
                starts[bucket] + start, indptr[start : end + 1] - indptr[start], indices[span], values[span]
            )
            bucket += 1


def _distribute(source: Source, folder: Path) -> None:
    """Write the entries by buckets of rows: files `rows` (within the bucket), `columns` and `data`."""
    per_row = np.zeros(source.num_cells, np.int64)
    for rows in source.rows():
        if len(rows) and (rows.min() < 0 or rows.max() >= source.num_cells):
            raise DataError(f"row numbers outside of 0 to {source.num_cells - 1}: the file is damaged; get a new copy.")
        kernels.count_into(rows, per_row)
    before = np.concatenate([[0], np.cumsum(per_row)])
    starts = [0]
    while starts[-1] < source.num_cells:
        end = int(np.searchsorted(before, before[starts[-1]] + BUCKET_VALUES, "right")) - 1
        starts.append(min(max(end, starts[-1] + 1), source.num_cells))
    offsets = before[starts]
    bucket_of_row = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
    del per_row, before
    written = offsets[:-1].copy()
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in ("rows", "columns", "data")]
        for rows, columns, data in source.entries():
            bounds, order = kernels.order_by_bucket(rows, bucket_of_row, len(starts) - 1)
            rows, columns, data = rows[order], columns[order].astype(np.int32), data[order]
            for bucket in np.flatnonzero(np.diff(bounds)):
                span = slice(bounds[bucket], bounds[bucket + 1])
                within = (rows[span] - starts[bucket]).astype(np.int32)
                for file, values in zip(files, (within, columns[span], data[span]), strict=True):
                    file.seek(written[bucket] * values.itemsize)
                    file.write(values.tobytes())
                written[bucket] += len(within)
    if np.any(written != offsets[1:]):
        raise DataError("the matrix changed while it was read; start again once it is complete.")
    layout = {"first_rows": starts, "offsets": offsets.tolist(), "dtype": source.dtype.str}
    (folder / "layout.json").write_text(json.dumps(layout))


class ByGene:
    """Entries of a sparse matrix stored by genes: AnnData's csc_matrix, arrays of h5py or zarr."""

    def __init__(self, indptr: np.ndarray, indices: object, data: object, num_cells: int) -> None:
        self._indptr, self._indices, self._data = indptr.astype(np.int64), indices, data
        self.num_cells, self.num_genes = num_cells, len(indptr) - 1
        self.dtype = data.dtype  # type: ignore[attr-defined]
        if np.any(np.diff(self._indptr) < 0) or self._indptr[-1] > data.shape[0]:  # type: ignore[attr-defined]
            raise DataError("the column pointers (indptr) are damaged; get a new copy of the file.")

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the row of each entry."""
        for begin in range(0, int(self._indptr[-1]), CHUNK_VALUES):
            end = min(begin + CHUNK_VALUES, int(self._indptr[-1]))
            yield np.asarray(self._indices[begin:end])  # type: ignore[index]

    def entries(self) -> Iterator[Entries]:
        """Yield all entries."""
        for number, rows in enumerate(self.rows()):
            begin = number * CHUNK_VALUES
            bounds = np.clip(self._indptr, begin, begin + len(rows))
            inside = bounds[1:] - bounds[:-1]
            columns = np.repeat(np.arange(self.num_genes, dtype=np.int32), inside)
            yield rows, columns, np.asarray(self._data[begin : begin + len(rows)])  # type: ignore[index]
