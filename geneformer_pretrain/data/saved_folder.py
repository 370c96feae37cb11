"""Folders written by ``datasets.Dataset.save_to_disk``: their files, and the selection of rows that some have."""

import json
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from geneformer_pretrain.data.arrow_cache import SourceFile
from geneformer_pretrain.data.arrow_stream import Stream, map_stream
from geneformer_pretrain.data.parquet_cells import COLUMN, MAX_ROWS_PER_BATCH, CellBatch
from geneformer_pretrain.errors import DataError

if TYPE_CHECKING:
    from geneformer_pretrain.data.corpus import Corpus

STATE_FILE = "state.json"

# Looking up batch headers is bound by the latency of the disk, so several files are looked at side by side.
READERS = 8
OTHER_OPEN_FILES = 256
"""Room that a process leaves beside a corpus's files: sockets, libraries, checkpoints."""
ADVICE = "save the dataset again with Dataset.save_to_disk, or copy it again"


@dataclass(frozen=True)
class SavedFolder:
    """Files of a saved dataset.

    Attributes
    ----------
    folder
        Where they lie.
    names
        Arrow streams, in order.
    index_names
        Arrow streams whose column ``indices`` selects rows; usually none.
    identity
        The fingerprint that ``datasets`` gave it.
    """

    folder: Path
    names: list[str]
    index_names: list[str]
    identity: str

    @property
    def files(self) -> list[Path]:
        """Every file that decides the content."""
        return [self.folder / name for name in (STATE_FILE, *self.names, *self.index_names)]


def read_saved_folder(folder: Path) -> SavedFolder:
    """Read a folder's list of files.

    Raises
    ------
    DataError
        If it is not as ``save_to_disk`` writes it.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text())
        names = [entry["filename"] for entry in state["_data_files"]]
        indices = state.get("_indices_data_files") or state.get("_indices_files") or []
        return SavedFolder(folder, names, [entry["filename"] for entry in indices], state["_fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not as save_to_disk writes it ({error!r}); save the dataset again") from error


def map_saved_folder(saved: SavedFolder) -> list[Stream]:
    """Map all streams of a saved folder into memory.

    Raises
    ------
    DataError
        If a file is missing, damaged or of another type than the others, or if there is no row.
    """
    _allow_open_files(len(saved.names), saved.folder)
    with ThreadPoolExecutor(READERS) as pool:
        streams = list(pool.map(lambda name: map_stream(saved.folder / name, ADVICE), saved.names))
    for stream in streams[1:]:
        if stream.kind != streams[0].kind:
            raise DataError(
                f"{COLUMN} has type {streams[0].kind} in {streams[0].path} but {stream.kind} in "
                f"{stream.path}; cast the dataset to one type and save it again"
            )
    if not any(stream.num_rows for stream in streams):
        raise DataError(f"{saved.folder}: the dataset has no rows; correct the path")
    return streams


def _allow_open_files(number: int, folder: Path) -> None:
    """Raise this process's own limit of open files: each mapped file takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + number
    wanted = needed + OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if needed > wanted:
        raise DataError(
            f"{folder}: {number} files, and this system allows a process {hard} open ones (ulimit -Hn); "
            "save the dataset in fewer files: save_to_disk(..., num_shards=N)"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class SelectedCells:
    """Cells that the index of a saved folder selects, to be copied into the cache in its order.

    Raises
    ------
    DataError
        If the index cannot be read or leads outside of the dataset.
    """

    empty_files = 0

    def __init__(self, saved: SavedFolder, corpus: "Corpus") -> None:
        self._corpus = corpus
        self._path = saved.folder / f"{STATE_FILE} (selected rows)"
        try:
            tables = [ipc.open_stream(str(saved.folder / name)).read_all() for name in saved.index_names]
            self._indices = np.concatenate([table["indices"].to_numpy() for table in tables]).astype(np.int64)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{saved.folder}: its index of rows cannot be read ({error}); {ADVICE}") from error
        outside = np.flatnonzero((self._indices < 0) | (self._indices >= corpus.num_cells))
        if len(outside) or not len(self._indices):
            what = f"asks for row {self._indices[outside[0]]} of {corpus.num_cells}" if len(outside) else "is empty"
            raise DataError(f"{saved.folder}: its index of rows {what}; {ADVICE}")
        self.sources: Sequence[SourceFile] = [SourceFile(str(self._path), len(self._indices))]
        self.num_tokens = int(corpus.lengths[self._indices].sum(dtype=np.int64))

    def read(self) -> Iterator[CellBatch]:
        """Yield the cells in order."""
        for first in range(0, len(self._indices), MAX_ROWS_PER_BATCH):
            cells = [self._corpus.cell(index) for index in self._indices[first : first + MAX_ROWS_PER_BATCH].tolist()]
            offsets = np.cumsum([0, *map(len, cells)])
            yield CellBatch(self._path, first, np.concatenate(cells), offsets)
