"""Map an Arrow stream into memory and find the addresses of its cells, without reading a token."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from geneformer_pretrain.data.parquet_cells import COLUMN, LFS_POINTER, require_column
from geneformer_pretrain.errors import DataError

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """A record batch's ``input_ids``; both fields must live as long as their addresses are used."""

    column: pa.Array
    offsets: np.ndarray
    values_address: int


@dataclass(frozen=True)
class Stream:
    """An Arrow stream, mapped into memory."""

    path: Path
    region: mmap.mmap
    kind: pa.DataType
    batches: list[StreamBatch]

    @property
    def num_rows(self) -> int:
        """Cells of the stream."""
        return sum(len(batch.column) for batch in self.batches)


def map_stream(path: Path, advice: str) -> Stream:
    """Map an Arrow stream into memory and look at its batches without touching their values."""
    if not path.is_file():
        raise DataError(f"{path}: the file is missing; {advice}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; {advice}")
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # pyarrow.memory_map would have the kernel read all of every batch ahead, that is, the whole corpus. So
    # would the kernel itself around each page fault, unless it knows that accesses are random.
    region.madvise(mmap.MADV_RANDOM)
    mapped = pa.py_buffer(region)
    if region[: len(LFS_POINTER)] == LFS_POINTER:
        raise DataError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    try:
        schema = ipc.open_stream(pa.BufferReader(mapped)).schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not an Arrow stream ({error}); {advice}") from error
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
        raise DataError(f"{path}: damaged after row {sum(map(len, columns))} ({error}); {advice}") from error
    # A stream cut between two batches reads like a shorter one; only the end marker tells them apart.
    end = source.tell()
    if region[end - len(END_OF_STREAM) : end] != END_OF_STREAM:
        raise DataError(f"{path}: the file breaks off after row {sum(map(len, columns))}; {advice}")
    batches = []
    num_rows = 0
    for column in columns:
        if len(column):
            batches.append(_look_at_batch(column, mapped, path, num_rows, advice))
        num_rows += len(column)
    return Stream(path, region, kind, batches)


def _read_offsets_ahead(column: pa.Array, region: mmap.mmap, mapped: pa.Buffer) -> None:
    """Have the kernel read the offsets in the background, while the next batch's header is looked up."""
    offsets = column.buffers()[1]
    if offsets is not None and mapped.address <= offsets.address < mapped.address + mapped.size:
        start = offsets.address - mapped.address
        page = start - start % mmap.PAGESIZE
        region.madvise(mmap.MADV_WILLNEED, page, start + offsets.size - page)


def _look_at_batch(column: pa.Array, mapped: pa.Buffer, path: Path, first_row: int, advice: str) -> StreamBatch:
    """Check a batch for nulls and for empty cells and find the addresses of its buffers."""
    try:
        column.validate()
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged after row {first_row} ({error}); {advice}") from error
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py()
        raise DataError(f"{path}, row {row}: {COLUMN} is null; drop the row and save again")
    if pa.types.is_fixed_size_list(column.type):
        boundaries = np.arange(column.offset, column.offset + len(column) + 1)
        offsets = (boundaries * column.type.list_size).astype(np.int32)
    else:
        dtype = np.int64 if pa.types.is_large_list(column.type) else np.int32
        offsets = np.frombuffer(column.buffers()[1], dtype)[column.offset :][: len(column) + 1]
    grows = offsets[1:] > offsets[:-1]
    if not grows.all():
        row = int(grows.argmin())
        raise DataError(
            f"{path}, row {first_row + row}: {COLUMN} has {offsets[row + 1] - offsets[row]} tokens; "
            "drop the row and save again"
        )
    values = column.values
    if values.null_count:
        position = pc.index(values.is_null(), True).as_py()
        row = int(np.searchsorted(offsets, position, side="right")) - 1
        raise DataError(f"{path}, row {first_row + row}: {COLUMN} holds a null; drop the row and save again")
    buffer = values.buffers()[-1]
    if not mapped.address <= buffer.address <= mapped.address + mapped.size - buffer.size:
        raise DataError(f"{path}: the Arrow stream is compressed; save it again without compression")
    item_bytes = values.type.bit_width // 8
    return StreamBatch(column, offsets, buffer.address + values.offset * item_bytes)
