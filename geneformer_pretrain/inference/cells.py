"""Cells for inference: a corpus of tokens, or counts that are tokenized into one first."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from geneformer_pretrain.console import Progress, say
from geneformer_pretrain.data.corpus import Corpus, open_corpus
from geneformer_pretrain.data.sources import read_description
from geneformer_pretrain.data.vocabulary import require_gene_set
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import replacing
from geneformer_pretrain.inference.model import Model

TOKENIZED = "cells.parquet"
"""Cells that were tokenized on the way, in the folder of intermediate results."""

TOKEN_COLUMNS = ("input_ids", "length")
"""Columns of a corpus that say nothing about the cell itself."""


@dataclass(frozen=True)
class CountsOptions:
    """Options of `tokenize` that say where counts are in a file."""

    gene_id_column: str = "ensembl_id"
    n_counts_column: str | None = None
    filter_column: str | None = None
    layer: str | None = None
    raw: bool = False
    min_genes: int = 0
    allow_noninteger: bool = False
    allow_low_match: bool = False


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells with their tokens and columns, numbered from 0.

    Attributes
    ----------
    corpus
        The tokens.
    model
        Model that reads them.

    Raises
    ------
    DataError
        A cell is longer than the model's longest; names the first.
    """

    corpus: Corpus
    model: Model

    def __post_init__(self) -> None:
        most = self.model.max_tokens
        too_long = np.flatnonzero(self.lengths > most)
        if len(too_long):
            cell = int(too_long[0])
            raise DataError(
                f"{self.corpus.describe_cell(cell)}: {self.lengths[cell]:,} tokens; {self.model.path} knows up "
                f"to {most:,}, and {len(too_long):,} cells are longer. Tokenize them with the model's gene set."
            )

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return self.corpus.num_cells

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, int32 [num_cells]."""
        return self.corpus.lengths

    @cached_property
    def files(self) -> list["_File"]:
        """Files in the order of the cells."""
        return [_File(Path(source.path), source.rows) for source in self.corpus.sources]

    @cached_property
    def column_names(self) -> list[str]:
        """Columns beside the tokens."""
        return [name for name in self.files[0].schema.names if name not in TOKEN_COLUMNS]

    def require_columns(self, names: Sequence[str], option: str) -> None:
        """Raise DataError, naming the file, if a column is not there."""
        for name in names:
            lacking = next((file for file in self.files if name not in file.schema.names), None)
            if lacking is not None:
                known = ", ".join(self.column_names) or "none"
                raise DataError(f"{lacking.path}: no column {name!r} ({option}); it has: {known}.")

    def tokens(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some cells end to end, int32, and where each begins and ends, int64 [n + 1].

        Parameters
        ----------
        cells
            int64 [n], numbers of the cells.

        Raises
        ------
        DataError
            Padding or a token outside of the model's vocabulary; names the cell.
        """
        corpus = self.corpus
        offsets = np.zeros(len(cells) + 1, np.int64)
        np.cumsum(corpus.lengths[cells], out=offsets[1:])
        tokens = np.empty(offsets[-1], corpus.token_dtype)
        batches = np.searchsorted(corpus.batch_first_cell, cells, side="right") - 1
        first, place = 0, offsets.tolist()
        # Neighbours in one batch are copied together.
        breaks = np.flatnonzero((np.diff(cells) != 1) | (np.diff(batches) != 0)) + 1
        for last in [*breaks.tolist(), len(cells)]:
            batch, cell = int(batches[first]), int(cells[first])
            row = cell - int(corpus.batch_first_cell[batch])
            start = int(_view(int(corpus.batch_offsets[batch]), row, 1, corpus.offset_dtype)[0])
            count = place[last] - place[first]
            tokens[place[first] : place[last]] = _view(
                int(corpus.batch_values[batch]), start, count, corpus.token_dtype
            )
            first = last
        pad = self.model.gene_set.special_tokens["pad"]
        bad = (tokens >= self.model.vocab_size) | (tokens < 0) | (tokens == pad)
        if bad.any():
            self._refuse(cells, offsets, tokens, int(bad.argmax()))
        return tokens.astype(np.int32, copy=False), offsets

    def ids(self, cells: np.ndarray) -> pa.Array:
        """`cell_id` of some cells, or their numbers as text where there is no such column."""
        if "cell_id" not in self.column_names:
            return pa.array(map(str, cells.tolist()), pa.string())
        return self.table(["cell_id"], cells)["cell_id"].combine_chunks().cast(pa.string())

    def table(self, columns: Sequence[str], cells: np.ndarray) -> pa.Table:
        """Columns of some cells in ascending order: n rows.

        Raises
        ------
        DataError
            Files whose columns have other types.
        """
        tables, first = [], 0
        for file in self.files:
            low, high = np.searchsorted(cells, [first, first + file.rows])
            if high > low:
                tables.append(file.read(columns, cells[low:high] - first))
            first += file.rows
        try:
            return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        except pa.ArrowException as error:
            raise DataError(
                f"{self.files[0].path} and others: a column has several types ({error}); write it with one."
            ) from error

    def _refuse(self, cells: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, bad: int) -> None:
        place = int(np.searchsorted(offsets, bad, side="right")) - 1
        token = int(tokens[bad])
        reason = f"is outside of the model's {self.model.vocab_size:,} tokens"
        if token == self.model.gene_set.special_tokens["pad"]:
            reason = "is padding"
        raise DataError(
            f"{self.corpus.describe_cell(int(cells[place]))}: token {token} at position {bad - offsets[place]} "
            f"{reason}; tokenize the cells with the model's gene set."
        )


def _view(address: int, start: int, count: int, dtype: np.dtype) -> np.ndarray:
    size = dtype.itemsize
    return np.frombuffer(memoryview((ctypes.c_char * (count * size)).from_address(address + start * size)), dtype)


@dataclass(frozen=True)
class _File:
    """A file of a corpus: parquet, or an Arrow stream of a saved folder."""

    path: Path
    rows: int

    @cached_property
    def schema(self) -> pa.Schema:
        if self.path.suffix == ".arrow":
            return ipc.open_stream(pa.memory_map(str(self.path))).schema
        return pq.read_schema(self.path)

    def read(self, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Columns of some rows, of which only the row groups that hold them are read."""
        if self.path.suffix == ".arrow":
            reader = ipc.open_stream(pa.memory_map(str(self.path)))
            return reader.read_all().select(list(columns)).take(pa.array(rows))
        with pq.ParquetFile(self.path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            wanted = np.unique(np.searchsorted(ends, rows, side="right"))
            table = file.read_row_groups(wanted.tolist(), columns=list(columns))
        starts = ends[wanted] - np.array(sizes)[wanted]
        before = np.concatenate([[0], np.cumsum(np.array(sizes)[wanted])[:-1]])
        group = np.searchsorted(ends[wanted], rows, side="right")
        return table.take(pa.array(rows - starts[group] + before[group]))


def open_cells(
    paths: Sequence[str | Path], model: Model, folder: Path, options: CountsOptions, *, show_progress: bool
) -> Cells:
    """Open a corpus, or tokenize counts.

    Parameters
    ----------
    paths
        One corpus, as `data.open_corpus` takes it; or files, folders and globs of counts.
    model
        Model that will read them.
    folder
        Folder for intermediate results.
    options
        Where counts are in their files.

    Raises
    ------
    DataError
        Cells that the model cannot read.
    """
    corpora = [Path(path) for path in paths if is_corpus(path)]
    if not corpora:
        tokenized = folder / TOKENIZED
        if not tokenized.exists():
            _tokenize(paths, model, tokenized, options, show_progress)
        corpora = [tokenized]
    elif len(paths) > 1:
        raise DataError(f"{paths[0]}, {paths[1]}: name one corpus, or counts only; a glob takes several files.")
    else:
        _require_gene_set(corpora[0], model, is_main=show_progress)
    corpus = open_corpus(corpora[0], folder / "cache", vocab_size=model.vocab_size, show_progress=show_progress)
    return Cells(corpus, model)


def is_corpus(path: str | Path) -> bool:
    """True for parquet files and folders of a corpus, false for counts."""
    location = Path(path)
    if location.is_dir():
        marks = ("corpus.json", "state.json", "dataset_dict.json")
        return any((location / mark).is_file() for mark in marks) or any(location.glob("*.parquet"))
    return location.suffix == ".parquet"


def _require_gene_set(corpus: Path, model: Model, *, is_main: bool) -> None:
    """Check that a corpus was tokenized with the model's gene set; say so if the corpus does not name it.

    Raises
    ------
    DataError
        Naming the difference.
    """
    folder = corpus if corpus.is_dir() else corpus.parent
    description = read_description(folder)
    if description is not None:
        require_gene_set(description.gene_set, folder, model.gene_set)
    elif is_main:
        say(f"{corpus} does not name its gene set; its tokens are read as those of {model.gene_set.name}.")


def _tokenize(
    paths: Sequence[str | Path], model: Model, output: Path, options: CountsOptions, show_progress: bool
) -> None:
    """Tokenize counts into one parquet file, with ids and all columns of the cells."""
    from geneformer_pretrain.tokenization.counts import find_counts, open_counts
    from geneformer_pretrain.tokenization.tokenizer import tokenize_blocks

    writer: pq.ParquetWriter | None = None
    seen = kept = 0
    with replacing(output) as temporary, Progress(None, "tokenize", "cell", enabled=show_progress) as progress:
        try:
            for path in find_counts([str(path) for path in paths]):
                with open_counts(
                    path,
                    gene_id_column=options.gene_id_column,
                    layer=options.layer,
                    raw=options.raw,
                    allow_noninteger=options.allow_noninteger,
                ) as counts:
                    seen += counts.num_cells
                    for block in tokenize_blocks(
                        counts,
                        model.gene_set,
                        n_counts_column=options.n_counts_column,
                        filter_column=options.filter_column,
                        columns=counts.obs_columns,
                        min_genes=options.min_genes,
                        allow_low_match=options.allow_low_match,
                    ):
                        table = _table_of(block)
                        if writer is None:
                            writer = pq.ParquetWriter(temporary, table.schema)
                        try:
                            writer.write_table(table.cast(writer.schema))
                        except (pa.ArrowException, ValueError) as error:
                            raise DataError(
                                f"{path}: its obs columns differ from earlier files' ({error}); make them alike."
                            ) from error
                        kept += len(table)
                        progress.advance(len(table))
        finally:
            if writer is not None:
                writer.close()
        if not kept:
            raise DataError(f"{', '.join(map(str, paths))}: no cell is left of {seen:,}; relax the filters.")
    if kept < seen and show_progress:
        say(f"{seen - kept:,} of {seen:,} cells are left out by filters.")


def _table_of(block: Any) -> pa.Table:
    """A block of tokenized cells as rows of a corpus."""
    offsets = pa.array(block.offsets - block.offsets[0], pa.int32())
    tokens = pa.ListArray.from_arrays(offsets, pa.array(block.tokens))
    table = pa.table({"input_ids": tokens, "cell_id": pa.array(block.cell_ids, pa.string())})
    for field, column in zip(block.columns.schema, block.columns.columns, strict=True):
        if field.name in table.column_names or field.name in TOKEN_COLUMNS:
            continue
        if pa.types.is_dictionary(field.type):  # categories differ between files
            column = pc.cast(column, field.type.value_type)
        table = table.append_column(field.name, column)
    return table
