"""Convert parquet files into a compact Arrow cache, once for every rank and every run.

The cache of a set of files is the folder ``cache_dir/KEY``. KEY changes with the files' paths, sizes and
modification times. The folder holds ``cells.arrow``, an Arrow stream of ``input_ids: list<uint16>`` (int32 if
a token needs it), and ``manifest.json``, which describes it. Both are written into ``KEY.tmp``, brought to
disk and renamed, so that a folder named KEY is always complete. A cache whose source has changed is no longer
used and may be deleted.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock
from tqdm import tqdm

from geneformer_pretrain.console import TolerantStream
from geneformer_pretrain.files import writing_to

COLUMN = "input_ids"
DATA_FILE = "cells.arrow"
MANIFEST_FILE = "manifest.json"
CACHE_VERSION = 1
INT32_MAX = np.iinfo(np.int32).max

# One batch is decoded at a time. Both limits bound its memory: the second one where long cells cluster.
TOKENS_PER_BATCH = 512 * 1024
MAX_ROWS_PER_BATCH = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """A file that cells come from, and how many."""

    path: str
    rows: int


@dataclass(frozen=True)
class CacheManifest:
    """What a finished cache holds; ``manifest.json`` has the same fields."""

    sources: tuple[SourceFile, ...]
    num_cells: int
    num_tokens: int
    max_token: int
    max_token_path: str
    max_token_row: int
    tokens_hash: str
    fingerprint: str
    data_bytes: int


@dataclass(frozen=True)
class _ParquetSource:
    path: Path
    rows: int
    tokens: int
    rows_per_batch: int


class _TokensNeedInt32(Exception):
    """A token does not fit into uint16."""


def fingerprint(identity: str, lengths_hash: str) -> str:
    """Return the fingerprint of a corpus from what identifies its tokens and the hash of its lengths."""
    return xxhash.xxh3_128_hexdigest(f"{identity} {lengths_hash}".encode())


def ensure_cache(files: Sequence[Path], cache_dir: Path, *, show_progress: bool = False) -> tuple[Path, CacheManifest]:
    """Return the Arrow cache of some parquet files, converting them first if there is none.

    Several processes may call this at once: one converts, the others wait. The memory needed is that of a few
    record batches, whatever the size of the files.

    Parameters
    ----------
    files
        Parquet files, in the order in which their cells are numbered.
    cache_dir
        Folder that holds the caches; created if needed.
    show_progress
        Draw a progress bar while converting.

    Returns
    -------
    tuple[Path, CacheManifest]
        The cache's folder and its description.

    Raises
    ------
    ValueError
        If a file is not readable as parquet, has no usable ``input_ids`` column, or holds a cell that cannot
        be trained on; the message names the file, the row and the value.
    OSError
        If the cache cannot be written.
    RuntimeError
        If a source file changed during the conversion.
    """
    key = _cache_key(files)
    folder = cache_dir / key
    with writing_to(cache_dir, "data.cache_dir"):
        manifest = _load_manifest(folder)
        if manifest is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir / f"{key}.lock"):
                manifest = _load_manifest(folder)  # another process may have finished while this one waited
                if manifest is None:
                    if folder.exists():
                        logger.warning("corpus cache %s is damaged: deleting it and converting again", folder)
                        shutil.rmtree(folder)
                    manifest = _convert(files, key, cache_dir, show_progress)
    return folder, manifest


def _cache_key(files: Sequence[Path]) -> str:
    state = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
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


def _convert(files: Sequence[Path], key: str, cache_dir: Path, show_progress: bool) -> CacheManifest:
    """Build the cache ``cache_dir/key``; the caller holds its lock."""
    sources = [_inspect(path) for path in files]
    _require_free_space(sources, cache_dir)
    temporary = cache_dir / f"{key}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
    try:
        temporary.mkdir()
        try:
            manifest = _write(sources, temporary, np.dtype(np.uint16), show_progress)
        except _TokensNeedInt32:
            manifest = _write(sources, temporary, np.dtype(np.int32), show_progress)
        if _cache_key(files) != key:
            raise ValueError(
                f"a source file changed while {cache_dir / key} was made from it: start again once "
                f"{', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} are complete"
            )
        with (temporary / MANIFEST_FILE).open("w") as file:
            json.dump(asdict(manifest), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        temporary.rename(cache_dir / key)
        _sync_folder(cache_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _inspect(path: Path) -> _ParquetSource:
    """Check a file's schema and size from its footer, so that hours of conversion are not begun in vain."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        advice = "replace the file or take it out of the corpus"
        if path.suffix in (".arrow", ".json"):
            advice = "of a dataset saved with save_to_disk, give the folder"
        raise ValueError(f"{path}: cannot be read as parquet ({error}); {advice}") from error
    require_column(schema, path)
    if metadata.num_rows == 0:
        raise ValueError(f"{path}: the file has no rows; take it out of the corpus")
    first = metadata.row_group(0)
    column = next(i for i in range(first.num_columns) if first.column(i).path_in_schema.split(".")[0] == COLUMN)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    tokens = [group.column(column).num_values for group in groups]
    densest = max(count / group.num_rows for count, group in zip(tokens, groups, strict=True) if group.num_rows)
    rows_per_batch = min(max(int(TOKENS_PER_BATCH / max(densest, 1)), 1), MAX_ROWS_PER_BATCH)
    return _ParquetSource(path, metadata.num_rows, sum(tokens), rows_per_batch)


def require_column(schema: pa.Schema, path: Path) -> pa.DataType:
    """Return the type of the ``input_ids`` column, after checking that it is a list of integers."""
    if COLUMN not in schema.names:
        raise ValueError(
            f"{path}: no column {COLUMN!r}, only {schema.names}; rename the column that holds the token ids"
        )
    if schema.names.count(COLUMN) > 1:
        raise ValueError(f"{path}: has several columns {COLUMN!r}; keep one of them")
    kind = schema.field(COLUMN).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise ValueError(
            f"{path}: column {COLUMN!r} has type {kind}, not a list of integers; store one list of token ids a row"
        )
    return kind


def _require_free_space(sources: Sequence[_ParquetSource], cache_dir: Path) -> None:
    need = sum(2 * source.tokens + 4 * source.rows for source in sources)
    free = shutil.disk_usage(cache_dir).free
    if need > free:
        needed, left = (tqdm.format_sizeof(size, "B") for size in (need, free))
        reason = f"the corpus cache needs {needed} and {left} are free"
        raise OSError(errno.ENOSPC, reason, str(cache_dir))


def _write(sources: Sequence[_ParquetSource], folder: Path, dtype: np.dtype, show_progress: bool) -> CacheManifest:
    """Write the cells of all files to ``folder/cells.arrow`` and describe them."""
    schema = pa.schema([(COLUMN, pa.list_(pa.from_numpy_dtype(dtype)))])
    tokens_hash, lengths_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    num_tokens, max_token, max_token_path, max_token_row = 0, -1, "", -1
    num_cells = sum(source.rows for source in sources)
    with (folder / DATA_FILE).open("wb") as sink:
        with (
            ipc.new_stream(sink, schema) as writer,
            tqdm(
                total=num_cells,
                desc="convert corpus",
                unit="cell",
                disable=not show_progress,
                file=TolerantStream(2),
            ) as progress,
        ):
            for path, row, tokens, offsets in _read(sources):
                largest = int(tokens.max())
                if largest > np.iinfo(dtype).max:
                    raise _TokensNeedInt32
                if largest > max_token:
                    max_token, max_token_path = largest, os.path.abspath(path)
                    max_token_row = row + _row_of(int(tokens.argmax()), offsets)
                tokens = np.ascontiguousarray(tokens, dtype)
                tokens_hash.update(tokens.data)
                lengths_hash.update(np.diff(offsets).astype(np.int32).data)
                cells = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
                writer.write_batch(pa.RecordBatch.from_arrays([cells], schema=schema))
                num_tokens += len(tokens)
                progress.update(len(cells))
        sink.flush()
        os.fsync(sink.fileno())
        data_bytes = sink.tell()
    return CacheManifest(
        sources=tuple(SourceFile(os.path.abspath(source.path), source.rows) for source in sources),
        num_cells=num_cells,
        num_tokens=num_tokens,
        max_token=max_token,
        max_token_path=max_token_path,
        max_token_row=max_token_row,
        tokens_hash=tokens_hash.hexdigest(),
        fingerprint=fingerprint(tokens_hash.hexdigest(), lengths_hash.hexdigest()),
        data_bytes=data_bytes,
    )


def _read(sources: Sequence[_ParquetSource]) -> Iterator[tuple[Path, int, np.ndarray, np.ndarray]]:
    """Yield batches of checked cells: their file, their first row in it, tokens and boundaries."""
    for source in sources:
        row = 0
        try:
            # A small read buffer without pre-buffering keeps Arrow from holding whole row groups.
            with pq.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20) as file:
                for batch in file.iter_batches(source.rows_per_batch, columns=[COLUMN], use_threads=False):
                    yield source.path, row, *_check_cells(batch.column(0), source.path, row)
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{source.path}: damaged after row {row} ({error}); make or download the file again"
            ) from error


def _check_cells(column: pa.Array, path: Path, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch's tokens [num_tokens] and the cells' boundaries in them, int64 [num_rows + 1]."""
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py()
        raise ValueError(f"{path}, row {row}: {COLUMN} is null; drop the row")
    if pa.types.is_fixed_size_list(column.type):
        offsets = np.arange(len(column) + 1, dtype=np.int64) * column.type.list_size
    else:
        offsets = column.offsets.to_numpy().astype(np.int64)
        offsets -= offsets[0]
    lengths = np.diff(offsets)
    if lengths.min() == 0:
        raise ValueError(f"{path}, row {first_row + int(lengths.argmin())}: {COLUMN} is empty; drop the row")
    values = column.flatten()
    if values.null_count:
        position = pc.index(values.is_null(), True).as_py()
        row = first_row + _row_of(position, offsets)
        raise ValueError(f"{path}, row {row}: {COLUMN} holds a null; remove it or drop the row")
    tokens = values.to_numpy()
    if tokens.min() < 0 or tokens.max() > INT32_MAX:
        position = int(np.argmax((tokens < 0) | (tokens > INT32_MAX)))
        row = first_row + _row_of(position, offsets)
        raise ValueError(
            f"{path}, row {row}: token {tokens[position]} is not in [0, {INT32_MAX}]; tokenize the cell again"
        )
    return tokens, offsets


def _row_of(position: int, offsets: np.ndarray) -> int:
    return int(np.searchsorted(offsets, position, side="right")) - 1


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
