"""Cells that share an id, as runs of 10x that were joined share barcodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

CELL_ID = "cell_id"


@dataclass(frozen=True)
class RepeatedIds:
    """Cells that share their id with another one.

    Attributes
    ----------
    cells
        Their number.
    example
        An id that they share.
    """

    cells: int
    example: str

    def describe(self, remedy: str) -> str:
        """Warn of them in one line."""
        return (
            f"WARNING {self.cells:,} cells share an id with another one, such as {self.example!r}: make ids "
            f"unique before (obs_names_make_unique), or {remedy}"
        )


def find_repeated_ids(parts: Sequence[Path], num_cells: int) -> RepeatedIds | None:
    """Look for cells of all parts that have the same `cell_id`; return None if each has an id of its own.

    Hashes of 64 bits are compared, in 8 bytes of memory a cell: among 100 million different ids, two are taken for
    one with a probability of 0.0003.

    Parameters
    ----------
    parts
        Parquet files.
    num_cells
        Rows of all of them.
    """
    hashes, filled = np.empty(num_cells, np.uint64), 0
    for ids in _read(parts):
        hashes[filled : filled + len(ids)] = _hash(ids)
        filled += len(ids)
    hashes.sort()
    repeats = hashes[1:][hashes[1:] == hashes[:-1]]  # n - 1 times for n cells
    if not len(repeats):
        return None
    shared = np.unique(repeats)
    example = next(
        ids[np.argmax(found)].decode() for ids in _read(parts) if (found := np.isin(_hash(ids), shared)).any()
    )
    return RepeatedIds(len(repeats) + len(shared), example)


def _read(parts: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the ids of some cells, [n] of bytes."""
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(columns=[CELL_ID], use_threads=False):
                yield batch.column(0).cast(pa.binary()).to_numpy(zero_copy_only=False)


def _hash(ids: np.ndarray) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, ids), np.uint64, len(ids))
