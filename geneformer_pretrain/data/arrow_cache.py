"""Convert cells into a compact Arrow cache, once for every rank, run and user.

The cache of a set of files is the folder ``cache_dir/KEY``. KEY changes with the files' paths, sizes and
modification times. The folder holds ``cells.arrow``, an Arrow stream of ``input_ids: list<uint16>`` (int32 if
a token needs it), and ``manifest.json``, which describes it. Both are written into ``KEY.tmp``, brought to
disk and renamed, so that a folder named KEY is always complete; a complete one is used without writing. A
cache whose source has changed is no longer used and may be deleted.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import xxhash
from tqdm import tqdm

from geneformer_pretrain.console import Progress
from geneformer_pretrain.data.parquet_cells import COLUMN, CellBatch, inspect_parquet, read_parquet, row_of
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import locked, naming, share_with_folder, sync_file, sync_folder, writing_to

DATA_FILE = "cells.arrow"
MANIFEST_FILE = "manifest.json"
CACHE_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """A file that cells come from, and the number of its cells."""

    path: str
    rows: int


@dataclass(frozen=True)
class CacheManifest:
    """Description of a finished cache; ``manifest.json`` has the same fields."""

    sources: tuple[SourceFile, ...]
    num_cells: int
    num_tokens: int
    max_token: int
    max_token_path: str
    max_token_row: int
    tokens_hash: str
    fingerprint: str
    data_bytes: int
    empty_files: int = 0


class CellReader(Protocol):
    """Checked cells of one corpus, to be converted."""

    sources: Sequence[SourceFile]
    num_tokens: int
    empty_files: int

    def read(self) -> Iterator[CellBatch]:
        """Yield the cells in order."""


class ParquetReader:
    """Cells of parquet files; files without rows are left out and counted.

    Raises
    ------
    DataError
        If a file cannot be read, or none has a row.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        found = [inspect_parquet(path) for path in paths]
        self.files = [file for file in found if file.rows]
        self.sources: Sequence[SourceFile] = [SourceFile(os.path.abspath(file.path), file.rows) for file in self.files]
        self.num_tokens = sum(file.tokens for file in self.files)
        self.empty_files = len(found) - len(self.files)
        if not self.files:
            others = f" (none of {len(paths):,} files has)" if len(paths) > 1 else ""
            raise DataError(f"{paths[0]}: has no rows{others}; a corpus needs at least one cell")

    def read(self) -> Iterator[CellBatch]:
        """Yield the cells in order."""
        return read_parquet(self.files)


class _TokensNeedInt32(Exception):
    """A token does not fit into uint16."""


def fingerprint(identity: str, lengths_hash: str) -> str:
    """Return the fingerprint of a corpus from what identifies its tokens and the hash of its lengths."""
    return xxhash.xxh3_128_hexdigest(f"{identity} {lengths_hash}".encode())


def ensure_cache(
    files: Sequence[Path], open_reader: Callable[[], CellReader], cache_dir: Path, *, show_progress: bool = False
) -> tuple[Path, CacheManifest]:
    """Return the Arrow cache of some files, converting them first if there is none.

    Several processes may call this at once: one converts, the others wait. The memory needed is that of a few
    record batches, whatever the size of the files.

    Parameters
    ----------
    files
        All files that decide the content.
    open_reader
        Opens their cells; called only where there is no cache yet.
    cache_dir
        Folder that holds the caches; created if needed.
    show_progress
        Show the progress of a conversion.

    Returns
    -------
    tuple[Path, CacheManifest]
        The cache's folder and its description.

    Raises
    ------
    DataError
        If a file or cell cannot be used, or a file changed during the conversion.
    OutputError
        If the cache cannot be written.
    """
    key = _cache_key(files)
    folder = cache_dir / key
    with writing_to(cache_dir, "data.cache_dir"), naming(cache_dir):
        manifest = _load_manifest(folder)
        if manifest is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(cache_dir / f"{key}.lock"):
                manifest = _load_manifest(folder)  # another process may have finished while this one waited
                if manifest is None:
                    if folder.exists():
                        log.warning("corpus cache %s is damaged: deleting it and converting again", folder)
                        shutil.rmtree(folder)
                    manifest = _convert(files, open_reader(), key, cache_dir, show_progress)
    return folder, manifest


def _cache_key(files: Sequence[Path]) -> str:
    try:
        state = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: the file is missing; copy the corpus again, or save it again") from error
    return xxhash.xxh3_128_hexdigest(json.dumps([CACHE_VERSION, state]).encode())


def _load_manifest(folder: Path) -> CacheManifest | None:
    """Return the description of a complete cache; None if it is missing or not as it was written."""
    try:
        fields = json.loads((folder / MANIFEST_FILE).read_text())
        data_bytes = (folder / DATA_FILE).stat().st_size
        sources = tuple(SourceFile(**source) for source in fields.pop("sources"))
        manifest = CacheManifest(sources=sources, **fields)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return manifest if data_bytes == manifest.data_bytes else None


def _convert(
    files: Sequence[Path], reader: CellReader, key: str, cache_dir: Path, show_progress: bool
) -> CacheManifest:
    """Build the cache ``cache_dir/key``; the caller holds its lock."""
    _require_free_space(reader, cache_dir)
    temporary = cache_dir / f"{key}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
    try:
        temporary.mkdir()
        share_with_folder(temporary)
        try:
            manifest = _write(reader, temporary, np.dtype(np.uint16), show_progress)
        except _TokensNeedInt32:
            manifest = _write(reader, temporary, np.dtype(np.int32), show_progress)
        if _cache_key(files) != key:
            raise DataError(
                f"a source file changed while {cache_dir / key} was made from it: start again once "
                f"{', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} are complete"
            )
        with (temporary / MANIFEST_FILE).open("w") as file:
            json.dump(asdict(manifest), file, indent=1)
            sync_file(file)
        for name in (DATA_FILE, MANIFEST_FILE):
            share_with_folder(temporary / name)
        sync_folder(temporary)
        temporary.rename(cache_dir / key)
        sync_folder(cache_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _require_free_space(reader: CellReader, cache_dir: Path) -> None:
    need = 2 * reader.num_tokens + 4 * sum(source.rows for source in reader.sources)
    free = shutil.disk_usage(cache_dir).free
    if need > free:
        needed, left = (tqdm.format_sizeof(size, "B") for size in (need, free))
        reason = f"the corpus cache needs {needed} and {left} are free"
        raise OSError(errno.ENOSPC, reason, str(cache_dir))


def _write(reader: CellReader, folder: Path, dtype: np.dtype, show_progress: bool) -> CacheManifest:
    """Write all cells to ``folder/cells.arrow`` and describe them."""
    schema = pa.schema([(COLUMN, pa.list_(pa.from_numpy_dtype(dtype)))])
    tokens_hash, lengths_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    num_tokens, max_token, max_token_path, max_token_row = 0, -1, "", -1
    num_cells = sum(source.rows for source in reader.sources)
    with (folder / DATA_FILE).open("wb") as sink:
        with (
            ipc.new_stream(sink, schema) as writer,
            Progress(num_cells, "convert the corpus", "cell", enabled=show_progress) as progress,
        ):
            for path, row, tokens, offsets in reader.read():
                largest = int(tokens.max())
                if largest > np.iinfo(dtype).max:
                    raise _TokensNeedInt32
                if largest > max_token:
                    max_token, max_token_path = largest, os.path.abspath(path)
                    max_token_row = row + row_of(int(tokens.argmax()), offsets)
                tokens = np.ascontiguousarray(tokens, dtype)
                tokens_hash.update(tokens.data)
                lengths_hash.update(np.diff(offsets).astype(np.int32).data)
                cells = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
                writer.write_batch(pa.RecordBatch.from_arrays([cells], schema=schema))
                num_tokens += len(tokens)
                progress.advance(len(cells))
        sync_file(sink)
        data_bytes = sink.tell()
    return CacheManifest(
        sources=tuple(reader.sources),
        num_cells=num_cells,
        num_tokens=num_tokens,
        max_token=max_token,
        max_token_path=max_token_path,
        max_token_row=max_token_row,
        tokens_hash=tokens_hash.hexdigest(),
        fingerprint=fingerprint(tokens_hash.hexdigest(), lengths_hash.hexdigest()),
        data_bytes=data_bytes,
        empty_files=reader.empty_files,
    )
