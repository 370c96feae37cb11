"""Open a corpus of tokenized cells as views of memory-mapped Arrow buffers.

Parquet files are converted once into a compact Arrow cache (see ``arrow_cache``); a folder written by
``datasets.Dataset.save_to_disk`` is read in place. Either way a corpus is a list of Arrow streams, mapped
into memory. Opening reads the record batches' headers and the cells' offsets, never the tokens: these are
paged in when a loader asks for them.
"""

import glob
import json
import mmap
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import xxhash

from geneformer_pretrain.data.arrow_cache import (
    COLUMN,
    DATA_FILE,
    SourceFile,
    ensure_cache,
    fingerprint,
    require_column,
)

# Looking up batch headers is bound by the latency of the disk, so several files are looked at side by side.
READERS = 8
OTHER_OPEN_FILES = 256
"""Room that a process leaves beside a corpus's files: sockets, libraries, checkpoints."""
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
TOKEN_DTYPES = (np.uint16, np.int16, np.int32, np.int64)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized cells, numbered from 0 in the order of their files, in memory-mapped Arrow record batches.

    Cell r of batch b is ``values[offsets[r]:offsets[r + 1]]`` with ``values`` the array of ``token_dtype`` at
    address ``batch_values[b]`` and ``offsets`` the array of ``offset_dtype`` at address ``batch_offsets[b]``.
    The addresses are valid, and must only be read from, as long as the corpus lives.

    Attributes
    ----------
    num_cells, num_tokens
        Size of the corpus.
    lengths
        Tokens of each cell, int32 [num_cells].
    fingerprint
        Identifies the content: for parquet a hash of all tokens and lengths, for a saved folder a hash of its
        file names and sizes, all lengths and the fingerprint that ``datasets`` gave it.
    batch_first_cell
        Number of the first cell of each batch, then num_cells; int64 [num_batches + 1].
    batch_values
        Address of the value that offset 0 refers to, uint64 [num_batches].
    batch_offsets
        Address of the first cell's offset, uint64 [num_batches].
    token_dtype, offset_dtype
        Types at these addresses: uint16, int16, int32 or int64; int32 or int64.
    """

    num_cells: int
    num_tokens: int
    lengths: np.ndarray = field(repr=False)
    fingerprint: str
    batch_first_cell: np.ndarray = field(repr=False)
    batch_values: np.ndarray = field(repr=False)
    batch_offsets: np.ndarray = field(repr=False)
    token_dtype: np.dtype
    offset_dtype: np.dtype
    _batches: list["_Batch"] = field(repr=False)  # keeps the mapped files alive
    _sources: tuple[SourceFile, ...] = field(repr=False)

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Files in the order of the cells, with their rows."""
        return self._sources

    def cell(self, index: int) -> np.ndarray:
        """Return a copy of the tokens of one cell, int64 [length]; the slow reference path."""
        self._require_cell(index)
        batch = int(np.searchsorted(self.batch_first_cell, index, side="right")) - 1
        row = index - int(self.batch_first_cell[batch])
        return self._batches[batch].column.slice(row, 1).flatten().to_numpy().astype(np.int64)

    def describe_cell(self, index: int) -> str:
        """Return where a cell comes from, such as ``data/cells.parquet, row 17``, rows counted from 0."""
        self._require_cell(index)
        ends = np.cumsum([source.rows for source in self._sources])
        number = int(np.searchsorted(ends, index, side="right"))
        source = self._sources[number]
        return f"{source.path}, row {index - int(ends[number]) + source.rows}"

    def _require_cell(self, index: int) -> None:
        if not 0 <= index < self.num_cells:
            raise IndexError(f"cell {index} is not in the corpus of {self.num_cells} cells")


def open_corpus(
    path: str | Path, cache_dir: str | Path, *, vocab_size: int | None = None, show_progress: bool = False
) -> Corpus:
    """Open parquet files or a Hugging Face ``save_to_disk`` folder as a corpus.

    Parameters
    ----------
    path
        A parquet file, a folder with ``*.parquet`` files, a glob pattern (``**`` descends into folders), or a
        ``save_to_disk`` folder. Several parquet files are taken in the order of their names. The column
        ``input_ids`` holds lists of integers; other columns are ignored.
    cache_dir
        Folder for the Arrow cache of parquet files; not used for a saved folder.
    vocab_size
        If given, tokens of parquet files must be smaller. The tokens of a saved folder are not read here:
        whoever uses them has to check them.
    show_progress
        Draw a progress bar while parquet is converted.

    Returns
    -------
    Corpus
        The opened corpus, with at least one cell and no empty cells.

    Raises
    ------
    FileNotFoundError
        If nothing is found at ``path``.
    ValueError
        If a file cannot be used; the message names the file, the row and the value.
    """
    location = Path(path)
    if (location / "state.json").is_file():
        return _open_saved_folder(location)
    if (location / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in location.iterdir() if (child / "state.json").is_file())
        raise ValueError(f"{location}: holds several datasets; name one of its folders {splits}")
    files = _find_parquet(location)
    return _open_parquet(files, Path(cache_dir), vocab_size, show_progress)


def require_corpus(path: str | Path) -> None:
    """Check that there is something to open, without opening it.

    Raises
    ------
    FileNotFoundError
        If nothing is found at ``path``.
    """
    location = Path(path)
    if not any((location / name).is_file() for name in ("state.json", "dataset_dict.json")):
        _find_parquet(location)


def _find_parquet(location: Path) -> list[Path]:
    if location.is_file():
        return [location]
    if location.is_dir():
        files = sorted(child for child in location.glob("*.parquet") if not child.name.startswith("."))
        below = f"for parquet files in folders below it, give {location}/**/*.parquet"
        if not files:
            raise FileNotFoundError(
                f"{location}: holds neither *.parquet files nor a dataset saved with save_to_disk; {below}"
            )
        folder = next((file for file in files if file.is_dir()), None)
        if folder is not None:
            raise FileNotFoundError(f"{location}: {folder.name} in it is a folder, not a file; {below}")
        return files
    if not glob.has_magic(str(location)):
        raise FileNotFoundError(f"{location}: no such file or folder; correct the path")
    files = [Path(name) for name in sorted(glob.glob(str(location), recursive=True)) if os.path.isfile(name)]
    if not files:
        raise FileNotFoundError(f"{location}: the pattern matches no file; correct the path")
    return files


def _open_parquet(files: list[Path], cache_dir: Path, vocab_size: int | None, show_progress: bool) -> Corpus:
    folder, manifest = ensure_cache(files, cache_dir, show_progress=show_progress)
    if vocab_size is not None and manifest.max_token >= vocab_size:
        raise ValueError(
            f"{manifest.max_token_path}, row {manifest.max_token_row}: token {manifest.max_token} is outside "
            f"the vocabulary of {vocab_size}; set data.vocab_path to the vocabulary that the cells were made with and "
            f"model.vocab_size to its size (at least {manifest.max_token + 1}), or tokenize the cells again"
        )
    advice = f"delete the folder {folder} and start again"
    corpus = _assemble([_map_stream(folder / DATA_FILE, advice)], manifest.sources, manifest.tokens_hash)
    if corpus.fingerprint != manifest.fingerprint:
        raise ValueError(f"{folder / DATA_FILE}: the corpus cache is damaged; {advice}")
    return corpus


def _open_saved_folder(folder: Path) -> Corpus:
    state_file = folder / "state.json"
    try:
        state = json.loads(state_file.read_text())
        names = [entry["filename"] for entry in state["_data_files"]]
        identity = state["_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state_file}: not as save_to_disk writes it ({error!r}); save the dataset again") from error
    for key in ("_indices_files", "_indices_data_files"):
        if state.get(key):
            raise ValueError(
                f"{state_file}: {key} selects rows, which is not supported; "
                "apply Dataset.flatten_indices and save_to_disk the result"
            )
    advice = "save the dataset again with Dataset.save_to_disk, or copy it again"
    _allow_open_files(len(names), folder)
    with ThreadPoolExecutor(READERS) as pool:
        streams = list(pool.map(lambda name: _map_stream(folder / name, advice), names))
    for stream in streams[1:]:
        if stream.kind != streams[0].kind:
            raise ValueError(
                f"{COLUMN} has type {streams[0].kind} in {streams[0].path} but {stream.kind} in "
                f"{stream.path}; cast the dataset to one type and save it again"
            )
    sources = tuple(SourceFile(str(stream.path), stream.num_rows) for stream in streams)
    if not any(source.rows for source in sources):
        raise ValueError(f"{folder}: the dataset has no rows; correct the path")
    files = [[name, len(stream.region), stream.num_rows] for name, stream in zip(names, streams, strict=True)]
    return _assemble(streams, sources, json.dumps([identity, files]))


def _allow_open_files(number: int, folder: Path) -> None:
    """Raise this process's own limit of open files: each mapped file takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + number
    wanted = needed + OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if needed > wanted:
        raise ValueError(
            f"{folder}: {number} files, and this system allows a process {hard} open ones (ulimit -Hn); "
            "save the dataset in fewer files: save_to_disk(..., num_shards=N)"
        )
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True, slots=True)
class _Batch:
    """A record batch's ``input_ids``; both fields must live as long as their addresses are used."""

    column: pa.Array
    offsets: np.ndarray
    values_address: int


@dataclass(frozen=True)
class _Stream:
    path: Path
    region: mmap.mmap
    kind: pa.DataType
    batches: list[_Batch]

    @property
    def num_rows(self) -> int:
        return sum(len(batch.column) for batch in self.batches)


def _map_stream(path: Path, advice: str) -> _Stream:
    """Map an Arrow stream into memory and look at its batches without touching their values."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the file is missing; {advice}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; {advice}")
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # pyarrow.memory_map would have the kernel read all of every batch ahead, that is, the whole corpus. So
    # would the kernel itself around each page fault, unless it knows that accesses are random.
    region.madvise(mmap.MADV_RANDOM)
    mapped = pa.py_buffer(region)
    try:
        schema = ipc.open_stream(pa.BufferReader(mapped)).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not an Arrow stream ({error}); {advice}") from error
    kind = require_column(schema, path)
    only = ipc.IpcReadOptions(included_fields=[schema.get_field_index(COLUMN)], use_threads=False)
    source = pa.BufferReader(mapped)
    reader = ipc.open_stream(source, options=only)
    columns: list[pa.Array] = []
    try:
        for record_batch in reader:
            columns.append(record_batch.column(0))
            _read_offsets_ahead(columns[-1], region, mapped)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {sum(map(len, columns))} ({error}); {advice}") from error
    # A stream cut between two batches reads like a shorter one; only the end marker tells them apart.
    end = source.tell()
    if region[end - len(END_OF_STREAM) : end] != END_OF_STREAM:
        raise ValueError(f"{path}: the file breaks off after row {sum(map(len, columns))}; {advice}")
    batches = []
    num_rows = 0
    for column in columns:
        if len(column):
            batches.append(_look_at_batch(column, mapped, path, num_rows, advice))
        num_rows += len(column)
    return _Stream(path, region, kind, batches)


def _read_offsets_ahead(column: pa.Array, region: mmap.mmap, mapped: pa.Buffer) -> None:
    """Have the kernel read the offsets in the background, while the next batch's header is looked up."""
    offsets = column.buffers()[1]
    if offsets is not None and mapped.address <= offsets.address < mapped.address + mapped.size:
        start = offsets.address - mapped.address
        page = start - start % mmap.PAGESIZE
        region.madvise(mmap.MADV_WILLNEED, page, start + offsets.size - page)


def _look_at_batch(column: pa.Array, mapped: pa.Buffer, path: Path, first_row: int, advice: str) -> _Batch:
    """Check a batch for nulls and for empty cells and find the addresses of its buffers."""
    try:
        column.validate()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: damaged after row {first_row} ({error}); {advice}") from error
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py()
        raise ValueError(f"{path}, row {row}: {COLUMN} is null; drop the row and save again")
    if pa.types.is_fixed_size_list(column.type):
        boundaries = np.arange(column.offset, column.offset + len(column) + 1)
        offsets = (boundaries * column.type.list_size).astype(np.int32)
    else:
        dtype = np.int64 if pa.types.is_large_list(column.type) else np.int32
        offsets = np.frombuffer(column.buffers()[1], dtype)[column.offset :][: len(column) + 1]
    grows = offsets[1:] > offsets[:-1]
    if not grows.all():
        row = int(grows.argmin())
        raise ValueError(
            f"{path}, row {first_row + row}: {COLUMN} has {offsets[row + 1] - offsets[row]} tokens; "
            "drop the row and save again"
        )
    values = column.values
    if values.null_count:
        position = pc.index(values.is_null(), True).as_py()
        row = int(np.searchsorted(offsets, position, side="right")) - 1
        raise ValueError(f"{path}, row {first_row + row}: {COLUMN} holds a null; drop the row and save again")
    buffer = values.buffers()[-1]
    if not mapped.address <= buffer.address <= mapped.address + mapped.size - buffer.size:
        raise ValueError(f"{path}: the Arrow stream is compressed; save it again without compression")
    item_bytes = values.type.bit_width // 8
    return _Batch(column, offsets, buffer.address + values.offset * item_bytes)


def _assemble(streams: list[_Stream], sources: tuple[SourceFile, ...], identity: str) -> Corpus:
    """Join the batches of all streams; lengths come from the offsets."""
    token_dtype = np.dtype(streams[0].kind.value_type.to_pandas_dtype())
    if token_dtype not in TOKEN_DTYPES:
        names = [np.dtype(dtype).name for dtype in TOKEN_DTYPES]
        raise ValueError(
            f"{streams[0].path}: the tokens in {COLUMN} have type {token_dtype}; cast them to one of {names}"
        )
    batches = [batch for stream in streams for batch in stream.batches]
    batch_first_cell = np.zeros(len(batches) + 1, np.int64)
    np.cumsum([len(batch.column) for batch in batches], out=batch_first_cell[1:])
    lengths = np.empty(batch_first_cell[-1], np.int32)
    for batch, first in zip(batches, batch_first_cell.tolist(), strict=False):
        end = first + len(batch.column)
        np.subtract(batch.offsets[1:], batch.offsets[:-1], out=lengths[first:end], casting="same_kind")
    # A corpus that fits into memory ends up there: sooner, if the kernel reads ahead. A larger one would only
    # push itself out.
    physical_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(len(stream.region) for stream in streams) < physical_memory // 2:
        for stream in streams:
            stream.region.madvise(mmap.MADV_NORMAL)
    return Corpus(
        num_cells=len(lengths),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        lengths=lengths,
        fingerprint=fingerprint(identity, xxhash.xxh3_128_hexdigest(lengths.data)),
        batch_first_cell=batch_first_cell,
        batch_values=np.array([batch.values_address for batch in batches], np.uint64),
        batch_offsets=np.array([batch.offsets.ctypes.data for batch in batches], np.uint64),
        token_dtype=token_dtype,
        offset_dtype=batches[0].offsets.dtype,
        _batches=batches,
        _sources=sources,
    )
