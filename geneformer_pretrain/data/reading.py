"""Read a corpus from its own files, one after the other: tokens alone, or rows with all their columns."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from geneformer_pretrain.data.arrow_cache import CellReader, ParquetReader, SourceFile
from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.data.parquet_cells import CellBatch
from geneformer_pretrain.data.saved_folder import STATE_FILE, read_saved_folder
from geneformer_pretrain.data.sources import find_parquet, read_description
from geneformer_pretrain.errors import DataError, require_readable

ROWS_PER_BATCH = 2048


class SavedCells:
    """Cells of a saved folder, read in place."""

    empty_files = 0

    def __init__(self, folder: Path) -> None:
        if read_saved_folder(folder).index_names:
            raise DataError(
                f"{folder}: an index selects its rows; apply Dataset.flatten_indices and save_to_disk the result"
            )
        self._corpus = open_corpus(folder, folder)
        self.sources: Sequence[SourceFile] = self._corpus.sources
        self.num_tokens = self._corpus.num_tokens

    def read(self) -> Iterator[CellBatch]:
        """Yield the cells in order."""
        first_cells = self._corpus.batch_first_cell
        for number in range(len(first_cells) - 1):
            tokens, offsets = self._corpus.batch(number)
            yield CellBatch(self._corpus.folder, int(first_cells[number]), tokens, offsets)


def open_cells(path: str | Path) -> CellReader:
    """Open the cells of a corpus for one pass, without a cache.

    Parameters
    ----------
    path
        As for ``open_corpus``.

    Raises
    ------
    DataError
        If nothing is found there or a file cannot be used.
    """
    location = Path(path)
    if (location / STATE_FILE).is_file():
        return SavedCells(location)
    description = read_description(location)
    return ParquetReader(find_parquet(path) if description is None else description.parts)


def column_types(source: SourceFile) -> dict[str, pa.DataType]:
    """Return the type of each column of a file, those in the names of its folders (``tissue=lung``) included."""
    schema = pq.read_schema(source.path) if _is_parquet(source) else ipc.open_stream(source.path).schema
    require_one_of_each(schema.names, source.path)
    return dict(zip(schema.names, schema.types, strict=True)) | dict.fromkeys(_partition(source), pa.string())


def require_one_of_each(names: Sequence[str], path: object) -> None:
    """Raise DataError, naming the file, if two columns have the same name."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(f"{path}: has several columns called {twice!r}; give each a name of its own")


def read_rows(sources: Sequence[SourceFile], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of several files in order, some thousand at a time.

    Raises
    ------
    DataError
        If a file has no such column, or is damaged.
    """
    for source in sources:
        available = column_types(source)
        missing = [name for name in columns if name not in available]
        if missing:
            raise DataError(f"{source.path}: no column {missing[0]!r}, only {', '.join(available)}; name one of these")
        in_names = {name: value for name, value in _partition(source).items() if name in columns}
        inside = [name for name in columns if name not in in_names]
        row = 0
        try:
            for batch in _batches(source, inside):
                given = {name: pa.array([value] * batch.num_rows) for name, value in in_names.items()}
                yield pa.table({name: given[name] if name in given else batch[name] for name in columns})
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            require_readable(error, source.path)
            raise DataError(f"{source.path}: damaged after row {row} ({error}); copy the file again") from error


def _batches(source: SourceFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if _is_parquet(source):
        with pq.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield from file.iter_batches(ROWS_PER_BATCH, columns=list(columns), use_threads=False)
    else:
        with pa.memory_map(source.path) as file:
            for batch in ipc.open_stream(file):
                yield batch.select(list(columns))


def _is_parquet(source: SourceFile) -> bool:
    return not source.path.endswith(".arrow")


def _partition(source: SourceFile) -> dict[str, str]:
    """Columns that the folders' names give, as Hive writes them."""
    folders = [part for part in source.path.split(os.sep)[:-1] if "=" in part]
    return {name: value for name, _, value in (part.partition("=") for part in folders)}


def as_text(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column's values as strings, those that are missing as ``"missing"``."""
    return np.array(["missing" if value is None else str(value) for value in column.to_pylist()], object)
