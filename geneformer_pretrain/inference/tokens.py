"""Tokens of a corpus, read where they lie: parquet files in order, a saved folder through its memory map.

Training draws cells at random and converts parquet files for that. Inference reads them once, in order, so it decodes
each batch of rows when it gets there. Every rank decodes its own share while its device works.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import c_char
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from geneformer_pretrain.console import amount
from geneformer_pretrain.data.arrow_cache import ParquetReader, SourceFile, fingerprint
from geneformer_pretrain.data.corpus import Corpus, open_corpus
from geneformer_pretrain.data.parquet_cells import COLUMN, ParquetFile, check_cells
from geneformer_pretrain.data.saved_folder import STATE_FILE, read_saved_folder
from geneformer_pretrain.data.sources import find_parquet, read_description
from geneformer_pretrain.errors import DataError, require_readable

LENGTH = "length"
"""Column with the tokens of each cell, which saves decoding all of them beforehand."""

READERS = 8
"""Row groups whose lengths are read side by side."""

READ_BUFFER = 1 << 20
"""Bytes; without it Arrow would hold whole row groups."""


class Tokens(Protocol):
    """Tokens of cells that are numbered from 0 in the order of their files.

    Attributes
    ----------
    lengths
        Tokens of each cell, int32 [cells].
    fingerprint
        Identifies the content.
    sources
        Files, in order, and their rows.
    """

    lengths: np.ndarray
    fingerprint: str
    sources: Sequence[SourceFile]

    def describe_cell(self, cell: int) -> str:
        """File and row of a cell, rows counted from 0."""

    def read(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of cells in ascending order, end to end.

        Raises
        ------
        DataError
            A file that is damaged or not as it was, naming it and the row.
        """


def open_tokens(path: Path) -> Tokens:
    """Open a corpus as `data.open_corpus` takes it.

    Parameters
    ----------
    path
        Corpus folder, parquet files or saved folder.

    Raises
    ------
    DataError
        Nothing is found there, a file cannot be used, or an index selects rows of a saved folder.
    """
    if (path / STATE_FILE).is_file() and read_saved_folder(path).index_names:
        raise DataError(
            f"{path}: an index selects its rows; apply Dataset.flatten_indices and save_to_disk the result."
        )
    if (path / STATE_FILE).is_file() or (path / "dataset_dict.json").is_file():
        return MappedTokens(open_corpus(path, path))  # without an index there is nothing to convert
    description = read_description(path)
    found = ParquetTokens(find_parquet(path) if description is None else description.parts)
    if description is not None:
        listed = sum(part["cells"] for part in description.content["parts"])
        if listed != len(found.lengths):
            raise DataError(
                f"{path}: its parts hold {amount(len(found.lengths), 'cell')}, and corpus.json lists {listed:,}; copy "
                "the folder again, or tokenize again."
            )
    return found


class MappedTokens:
    """Tokens of a saved folder, memory-mapped."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.lengths, self.fingerprint = corpus.lengths, corpus.fingerprint
        self.sources: Sequence[SourceFile] = corpus.sources

    def describe_cell(self, cell: int) -> str:
        """File and row of a cell, rows counted from 0."""
        return self._corpus.describe_cell(cell)

    def read(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of cells in ascending order, end to end."""
        corpus = self._corpus
        ends = np.cumsum(corpus.lengths[cells], dtype=np.int64).tolist()
        tokens = np.empty(ends[-1] if ends else 0, corpus.token_dtype)
        batches = np.searchsorted(corpus.batch_first_cell, cells, side="right") - 1
        begin = 0
        for first, last in _runs(cells, batches):
            batch = int(batches[first])
            row = int(cells[first] - corpus.batch_first_cell[batch])
            start = int(_view(int(corpus.batch_offsets[batch]), row, 1, corpus.offset_dtype)[0])
            end = ends[last - 1]
            tokens[begin:end] = _view(int(corpus.batch_values[batch]), start, end - begin, corpus.token_dtype)
            begin = end
        return tokens


def _view(address: int, start: int, count: int, dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize
    return np.frombuffer(memoryview((c_char * (count * size)).from_address(address + start * size)), dtype)


def _runs(cells: np.ndarray, batches: np.ndarray) -> Iterator[tuple[int, int]]:
    """Places of neighbouring cells of one batch, which are copied together."""
    breaks = np.flatnonzero((np.diff(cells) != 1) | (np.diff(batches) != 0)) + 1
    first = 0
    for last in [*breaks.tolist(), len(cells)]:
        yield first, last
        first = last


@dataclass(frozen=True)
class _Batch:
    """Decoded cells from number `first` on."""

    first: int
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def last(self) -> int:
        """Number beyond its last cell."""
        return self.first + len(self.offsets) - 1


class ParquetTokens:
    """Tokens of parquet files, decoded from the front; a jump over whole row groups skips them.

    The column `length` is used for the lengths of a row group if its sum is the number of tokens there, as the footer
    says, and compared with the cells when they are read. The files' times of change are part of the fingerprint, since
    a file may be replaced by one of the same size.
    Only one thread may read at a time.

    Parameters
    ----------
    paths
        The files, in the order of their cells; those without rows are left out.

    Raises
    ------
    DataError
        A file that cannot be used.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        reader = ParquetReader(paths)
        self._files: list[ParquetFile] = reader.files
        self.sources = reader.sources
        self._footers = [pq.read_metadata(file.path) for file in self._files]
        sizes = [_row_group_sizes(footer) for footer in self._footers]
        filled = [np.flatnonzero(some) for some in sizes]
        self._file_of_group = np.repeat(np.arange(len(sizes)), [len(some) for some in filled])
        self._number_of_group = np.concatenate(filled)
        self._first_cell = np.concatenate([[0], np.cumsum(np.concatenate(sizes)[np.concatenate(sizes) > 0])])
        with ThreadPoolExecutor(READERS) as readers:
            self.lengths = np.concatenate(list(readers.map(self._read_lengths, range(len(self._file_of_group)))))
        states = [(file.path.stat(), file) for file in self._files]
        identity = [(file.path.name, state.st_size, state.st_mtime_ns, file.rows) for state, file in states]
        self.fingerprint = fingerprint(str(identity), xxhash.xxh3_128_hexdigest(self.lengths.data))
        self._batches: Iterator[_Batch] = iter(())
        self._batch = _Batch(0, np.empty(0, np.int32), np.zeros(1, np.int64))

    def describe_cell(self, cell: int) -> str:
        """File and row of a cell, rows counted from 0."""
        group = self._group_of(cell)
        file = self._file_of_group[group]
        return f"{self._files[file].path}, row {cell - self._first_cell_of_file(file)}"

    def read(self, cells: np.ndarray) -> np.ndarray:
        """Tokens of cells in ascending order, end to end."""
        tokens = np.empty(int(self.lengths[cells].sum(dtype=np.int64)), np.int32)
        place = filled = 0
        while place < len(cells):
            batch = self._batch_of(int(cells[place]))
            last = int(np.searchsorted(cells, batch.last))
            rows = cells[place:last] - batch.first
            for begin, end in _runs(rows, np.zeros_like(rows)):
                some = batch.tokens[batch.offsets[rows[begin]] : batch.offsets[rows[end - 1] + 1]]
                tokens[filled : filled + len(some)] = some
                filled += len(some)
            place = last
        return tokens

    def _batch_of(self, cell: int) -> _Batch:
        """The decoded batch that holds a cell."""
        near = self._group_of(cell) - self._group_of(max(self._batch.last - 1, 0))
        if cell < self._batch.first or near > 1 or not self._batch.last:
            self._batches = self._decode(self._group_of(cell))
            self._batch = next(self._batches)
        while cell >= self._batch.last:
            self._batch = next(self._batches)
        return self._batch

    def _group_of(self, cell: int) -> int:
        return int(np.searchsorted(self._first_cell, cell, side="right")) - 1

    def _first_cell_of_file(self, file: int) -> int:
        return int(self._first_cell[np.searchsorted(self._file_of_group, file)])

    def _decode(self, group: int) -> Iterator[_Batch]:
        """Yield the batches from a row group on."""
        cell = int(self._first_cell[group])
        for number in range(int(self._file_of_group[group]), len(self._files)):
            source = self._files[number]
            first = self._first_cell_of_file(number)
            inside = self._number_of_group[(self._file_of_group == number) & (self._first_cell[:-1] >= cell)]
            with self._open(number) as file:
                for batch in file.iter_batches(
                    source.rows_per_batch, row_groups=inside.tolist(), columns=[COLUMN], use_threads=False
                ):
                    tokens, offsets = check_cells(batch.column(0), source.path, cell - first)
                    self._require_lengths(np.diff(offsets), cell)
                    yield _Batch(cell, tokens, offsets)
                    cell += batch.num_rows

    def _require_lengths(self, found: np.ndarray, first: int) -> None:
        differs = np.flatnonzero(found != self.lengths[first : first + len(found)])
        if len(differs):
            cell = first + int(differs[0])
            raise DataError(
                f"{self.describe_cell(cell)}: {COLUMN} has {amount(int(found[differs[0]]), 'token')}, and {LENGTH} "
                f"says {self.lengths[cell]:,}; tokenize the cells again, or drop the column {LENGTH}."
            )

    def _read_lengths(self, group: int) -> np.ndarray:
        """Tokens of each cell of a row group, int32."""
        place, number = int(self._file_of_group[group]), int(self._number_of_group[group])
        source = self._files[place]
        row = int(self._first_cell[group]) - self._first_cell_of_file(place)
        with self._open(place) as file:
            schema = file.schema_arrow
            if LENGTH in schema.names and pa.types.is_integer(schema.field(LENGTH).type):
                column = file.read_row_group(number, columns=[LENGTH], use_threads=False)[LENGTH]
                lengths = column.to_numpy() if not column.null_count else np.zeros(1, np.int64)
                if lengths.min() > 0 and lengths.sum(dtype=np.float64) == _num_tokens(self._footers[place], number):
                    return lengths.astype(np.int32)
            found = []
            for batch in file.iter_batches(
                source.rows_per_batch, row_groups=[number], columns=[COLUMN], use_threads=False
            ):
                _, offsets = check_cells(batch.column(0), source.path, row)
                found.append(np.diff(offsets).astype(np.int32))
                row += batch.num_rows
            return np.concatenate(found)

    @contextmanager
    def _open(self, number: int) -> Iterator[pq.ParquetFile]:
        """Open a file, whose footer is not read again."""
        path, footer = self._files[number].path, self._footers[number]
        try:
            with pq.ParquetFile(path, metadata=footer, pre_buffer=False, buffer_size=READ_BUFFER) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            require_readable(error, path)
            raise DataError(f"{path}: damaged ({error}); make or download the file again.") from error


def _row_group_sizes(footer: pq.FileMetaData) -> np.ndarray:
    return np.array([footer.row_group(number).num_rows for number in range(footer.num_row_groups)], np.int64)


def _num_tokens(footer: pq.FileMetaData, number: int) -> int:
    """Tokens of a row group; empty cells and nulls count as one each."""
    group = footer.row_group(number)
    columns = (group.column(place) for place in range(group.num_columns))
    return next(int(column.num_values) for column in columns if column.path_in_schema.split(".")[0] == COLUMN)
