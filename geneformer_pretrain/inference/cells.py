"""Cells of a corpus for inference: their tokens, cut as the model reads them, and their other columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from geneformer_pretrain.console import amount, say
from geneformer_pretrain.data.reading import require_one_of_each
from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.inference.model import Model
from geneformer_pretrain.inference.tokens import Tokens, open_tokens

MIN_TOKENS = 3
"""Fewest tokens that cells may be cut to: <cls>, a gene and <eos>."""

TOKEN_COLUMNS = ("input_ids", "length")
"""Columns of a corpus that say nothing about the cell itself."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells with their tokens and columns, numbered from 0.

    Attributes
    ----------
    source
        The tokens.
    model
        Model that reads them.
    max_tokens
        Longer cells are cut to it: their last genes are left out.
    """

    source: Tokens
    model: Model
    max_tokens: int

    @property
    def num_cells(self) -> int:
        """Number of cells."""
        return len(self.source.lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, int32 [num_cells]."""
        return np.minimum(self.source.lengths, np.int32(self.max_tokens))

    @cached_property
    def files(self) -> list["_File"]:
        """Files in the order of the cells."""
        return [_File(Path(source.path), source.rows) for source in self.source.sources]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns beside the tokens, of all files.

        Raises
        ------
        DataError
            Two columns of one name, or a column of types that no common one holds.
        """
        schemas = [
            pa.schema([field for field in file.schema if field.name not in TOKEN_COLUMNS]) for file in self.files
        ]
        for file, schema in zip(self.files, schemas, strict=True):
            require_one_of_each(schema.names, file.path)
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{self.files[0].path} and others: a column has several types ({error}); write it with one."
            ) from error

    @property
    def column_names(self) -> list[str]:
        """Columns beside the tokens."""
        return list(self.schema.names)

    def require_columns(self, names: Sequence[str], option: str) -> None:
        """Raise DataError, naming the file, if a column is not there, or holds lists or others that are no names."""
        for name in names:
            is_other = name not in TOKEN_COLUMNS
            lacking = next((file for file in self.files if not (is_other and name in file.schema.names)), None)
            if lacking is not None:
                known = ", ".join(self.column_names) or "none"
                raise DataError(f"{lacking.path}: no column {name!r} ({option}); it has: {known}.")
            for file in self.files:
                kind = file.schema.field(name).type
                if not _has_text(kind):
                    raise DataError(
                        f"{file.path}: column {name!r} ({option}) holds {kind} values; name a column of text or "
                        "numbers, or write it as text."
                    )

    def tokens(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of some cells end to end, int32, and where each begins and ends, int64 [n + 1].

        Parameters
        ----------
        cells
            int64 [n], numbers of the cells, ascending.

        Raises
        ------
        DataError
            Padding or a token outside of the model's vocabulary, or a cell without genes; names the cell.
        """
        tokens = self.source.read(cells)
        offsets = np.concatenate([[0], np.cumsum(self.source.lengths[cells], dtype=np.int64)])
        pad = self.model.gene_set.special_tokens["pad"]
        bad = (tokens >= self.model.vocab_size) | (tokens < 0) | (tokens == pad)
        if bad.any():
            self._refuse(cells, offsets, tokens, int(bad.argmax()))
        is_special = self.model.is_special
        empty = is_special[tokens[offsets[:-1]]] & is_special[tokens[offsets[1:] - 1]] & (np.diff(offsets) <= 2)
        if empty.any():
            where = self.source.describe_cell(int(cells[empty.argmax()]))
            raise DataError(f"{where}: has no genes; drop the row.")
        tokens = tokens.astype(np.int32, copy=False)
        return self._cut(tokens, offsets) if np.diff(offsets).max(initial=0) > self.max_tokens else (tokens, offsets)

    def _cut(self, tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut cells to `max_tokens`; where one ends with <eos>, that stays its last token."""
        lengths = np.diff(offsets)
        kept = np.minimum(lengths, self.max_tokens)
        places = np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
        shorter = tokens[places < np.repeat(kept, lengths)]
        ends = np.cumsum(kept)
        if (eos := self.model.gene_set.special_tokens.get("eos")) is not None:
            last = tokens[offsets[1:] - 1]
            shorter[ends[last == eos] - 1] = eos
        return shorter, np.concatenate([[0], ends])

    def ids(self, cells: np.ndarray) -> pa.Array:
        """`cell_id` of some cells, or their numbers as text where there is no such column."""
        if "cell_id" not in self.column_names:
            return pa.array(map(str, cells.tolist()), pa.string())
        return self.table(["cell_id"], cells)["cell_id"].combine_chunks().cast(pa.string())

    def table(self, columns: Sequence[str], cells: np.ndarray) -> pa.Table:
        """Columns of some cells in ascending order: n rows, null where a file lacks the column."""
        tables, first = [], 0
        for file in self.files:
            low, high = np.searchsorted(cells, [first, first + file.rows])
            if high > low:
                tables.append(file.read(columns, cells[low:high] - first))
            first += file.rows
        schema = pa.schema([self.schema.field(name) for name in columns])
        return pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive").combine_chunks()

    def names(self, column: str, cells: np.ndarray) -> pa.Array:
        """Values of a column that names groups of some cells; null where there is none, NaN or an empty text."""
        values = self.table([column], cells)[column].combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_floating(values.type):
            return pc.if_else(pc.is_nan(values), None, values)
        is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        return pc.if_else(pc.equal(values, ""), None, values) if is_text else values

    def _refuse(self, cells: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, bad: int) -> None:
        place = int(np.searchsorted(offsets, bad, side="right")) - 1
        token = int(tokens[bad])
        reason = f"is outside of the model's {self.model.vocab_size:,} tokens"
        if token == self.model.gene_set.special_tokens["pad"]:
            reason = "is padding"
        raise DataError(
            f"{self.source.describe_cell(int(cells[place]))}: token {token} at position {bad - offsets[place]} "
            f"{reason}; tokenize the cells with the model's gene set."
        )


def _has_text(kind: pa.DataType) -> bool:
    """True for values with a text of their own, unlike lists, structs and bytes."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return False
    try:
        pa.nulls(0, kind).cast(pa.string())
    except pa.ArrowException:
        return False
    return True


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


def open_cells(corpus: Path, model: Model, *, max_tokens: int | None = None, is_main: bool = True) -> Cells:
    """Open a corpus for a model.

    Parameters
    ----------
    corpus
        See `find_corpus`.
    model
        Model that will read it.
    max_tokens
        Longer cells are cut; by default those longer than the cells that the model was trained on.
    is_main
        Print what is worth knowing.

    Raises
    ------
    DataError
        A corpus that cannot be read, or cells that are longer than the model's longest.
    ConfigError
        `max_tokens` beyond what the model can read.
    """
    source = open_tokens(corpus)
    return Cells(source, model, _max_tokens(source, model, max_tokens, is_main=is_main))


def _max_tokens(source: Tokens, model: Model, given: int | None, *, is_main: bool) -> int:
    """Tokens that cells are cut to: as asked for, or as in the model's training."""
    if given is not None and not MIN_TOKENS <= given <= model.max_tokens:
        raise ConfigError(
            f"--max-tokens {given}: choose from {MIN_TOKENS} to {model.max_tokens:,}, the model's longest cell."
        )
    longer = np.flatnonzero(source.lengths > model.max_tokens)
    if len(longer) and given is None:
        cell = int(longer[0])
        raise DataError(
            f"{source.describe_cell(cell)}: {source.lengths[cell]:,} tokens; {model.path} knows up to "
            f"{model.max_tokens:,}; cells that are longer: {len(longer):,}. Tokenize them with the model's gene set, "
            f"or add --max-tokens {model.max_tokens} to leave out their last genes."
        )
    most = model.trained_tokens if given is None else given
    cut = int((source.lengths > most).sum())
    if cut and is_main:
        why = "the model was trained on no longer ones; --max-tokens changes it" if given is None else "--max-tokens"
        cells = amount(len(source.lengths), "cell")
        say(f"{cut:,} of {cells} {'is' if cut == 1 else 'are'} cut to the first {most:,} tokens ({why}).")
    return most
