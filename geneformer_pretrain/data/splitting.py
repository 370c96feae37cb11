"""Split a corpus into a training and a held-out part, by a hash of each cell or by whole groups."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from geneformer_pretrain.console import Progress, amount
from geneformer_pretrain.data.arrow_cache import SourceFile
from geneformer_pretrain.data.parquet_cells import COLUMN, check_cells
from geneformer_pretrain.data.reading import as_text, column_types, read_rows
from geneformer_pretrain.data.sources import DESCRIPTION_FILE, FORMAT_VERSION, CorpusDescription
from geneformer_pretrain.errors import DataError

CELLS_PER_PART = 500_000
CELLS_PER_ROW_GROUP = 4096
PARTS = ("train", "held_out")
SHOWN_GROUPS = 5
"""Groups that a message lists."""

Chooser = Callable[[pa.Table, Path, int], np.ndarray]
"""Gives, for some rows of a file and the number of the first, which of them are held out: bool [rows]."""


def share(key: bytes) -> float:
    """Map a key to a number in [0, 1), the same on every machine."""
    return xxhash.xxh3_64_intdigest(key) / 2**64


def by_cell(fraction: float, has_ids: bool) -> Chooser:
    """Hold cells out by a hash of their ``cell_id``, or of their tokens where there is none."""

    def choose(rows: pa.Table, path: Path, first_row: int) -> np.ndarray:
        keys = _ids(rows) if has_ids else _tokens(rows, path, first_row)
        return np.fromiter((share(key) < fraction for key in keys), bool, len(rows))

    return choose


def _ids(rows: pa.Table) -> Iterator[bytes]:
    return (str(value).encode() for value in rows["cell_id"].to_pylist())


def _tokens(rows: pa.Table, path: Path, first_row: int) -> Iterator[bytes]:
    for chunk in rows[COLUMN].chunks:
        tokens, offsets = check_cells(chunk, path, first_row)
        first_row += len(chunk)
        same = tokens.astype("<i4")  # whatever type they are stored in
        yield from (same[start:end].tobytes() for start, end in pairwise(offsets))


def by_group(column: str, held_out: set[str]) -> Chooser:
    """Hold out whole groups, by a column's values."""
    return lambda rows, path, first_row: np.array([value in held_out for value in as_text(rows[column])], bool)


def choose_groups(
    sources: Sequence[SourceFile], column: str, fraction: float, names: Sequence[str] | None
) -> tuple[set[str], set[str]]:
    """Return all groups of a column and those to hold out: the ones named, or a fraction by a hash of the name.

    Raises
    ------
    DataError
        If there is no such group, or one of the two parts would have none.
    """
    groups: set[str] = set()
    for rows in read_rows(sources, [column]):
        groups |= set(as_text(rows[column]))
    held_out = set(names) if names is not None else {name for name in groups if share(name.encode()) < fraction}
    unknown = sorted(held_out - groups)
    if unknown:
        close = get_close_matches(unknown[0], groups, 1)
        meant = f"did you mean {close[0]}? It" if close else "it"
        listed = ", ".join(sorted(groups)[:SHOWN_GROUPS])
        more = f" and {len(groups) - SHOWN_GROUPS:,} more" if len(groups) > SHOWN_GROUPS else ""
        raise DataError(f"--hold-out: {column} has no value {unknown[0]!r}; {meant} has: {listed}{more}")
    if not held_out or held_out == groups:
        which = "none" if not held_out else "every one"
        raise DataError(
            f"--by {column}: {which} of its {amount(len(groups), 'group')} would be held out; name some with "
            "--hold-out, or change --fraction"
        )
    return groups, held_out


class PartWriter:
    """Writes the rows of one side of a split to ``part-*.parquet``.

    Parameters
    ----------
    folder
        Made here.
    schema
        Columns of every part; rows are cast to it.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir()
        self.folder, self.schema = folder, schema
        self.parts: list[dict[str, Any]] = []
        self._waiting = schema.empty_table()
        self._writer: pq.ParquetWriter | None = None

    @property
    def cells(self) -> int:
        """Cells written."""
        return sum(part["cells"] for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(part["tokens"] for part in self.parts)

    def write(self, rows: pa.Table) -> None:
        """Add rows."""
        self._waiting = pa.concat_tables([self._waiting, rows.cast(self.schema)])
        if len(self._waiting) >= CELLS_PER_ROW_GROUP:
            self._write_waiting()

    def close(self) -> None:
        """Write what is left."""
        self._write_waiting()
        self._close_part()

    def _write_waiting(self) -> None:
        rows, self._waiting = self._waiting, self.schema.empty_table()
        while len(rows):
            if self._writer is None:
                name = f"part-{len(self.parts):05d}.parquet"
                self.parts.append({"file": name, "cells": 0, "tokens": 0})
                self._writer = pq.ParquetWriter(self.folder / name, self.schema, compression="zstd")
            part = self.parts[-1]
            some = rows.slice(0, CELLS_PER_PART - part["cells"])
            self._writer.write_table(some)
            part["cells"] += len(some)
            part["tokens"] += sum(len(chunk.flatten()) for chunk in some[COLUMN].chunks)
            rows = rows.slice(len(some))
            if part["cells"] == CELLS_PER_PART:
                self._close_part()

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def split(sources: Sequence[SourceFile], choose: Chooser, output: Path) -> tuple[PartWriter, PartWriter]:
    """Copy each row of a corpus, all columns, to ``output/train`` or ``output/held_out``, in the order of the corpus.

    Raises
    ------
    DataError
        If the files' columns do not fit together, or one of the two parts would be empty.
    """
    names = list(column_types(sources[0]))
    writers: list[PartWriter] = []
    with Progress(sum(source.rows for source in sources), "split the corpus", "cell") as progress:
        for source, first_row, rows in _rows(sources, names):
            if not writers:
                writers = [PartWriter(output / name, rows.schema) for name in PARTS]
            held_out = choose(rows, Path(source.path), first_row)
            for writer, chosen in zip(writers, (~held_out, held_out), strict=True):
                try:
                    writer.write(rows.filter(pa.array(chosen)))
                except pa.ArrowInvalid as error:
                    raise DataError(
                        f"the columns of the corpus's files have different types ({error}); write them with one type"
                    ) from error
            progress.advance(len(rows))
    for writer, name in zip(writers, PARTS, strict=True):
        writer.close()
        if not writer.cells:
            raise DataError(
                f"no cell would be in {name}: the corpus has {amount(progress.done, 'cell')}; change --fraction"
            )
    train, held_out_part = writers
    return train, held_out_part


def _rows(sources: Sequence[SourceFile], names: Sequence[str]) -> Iterator[tuple[SourceFile, int, pa.Table]]:
    """Yield rows with their file and the number of the first of them in it."""
    for source in sources:
        first_row = 0
        for rows in read_rows([source], names):
            yield source, first_row, rows
            first_row += len(rows)


def describe_part(writer: PartWriter, description: CorpusDescription, origin: dict[str, Any]) -> None:
    """Write the ``corpus.json`` of one side of a split, and its copy of the gene set if the corpus has one.

    Parameters
    ----------
    description
        Of the corpus that was split.
    origin
        How it was split.
    """
    carried = {name: value for name, value in description.content.items() if name != "parts"}
    content = {
        "format_version": FORMAT_VERSION,
        "gene_set": carried["gene_set"],
        "cells": writer.cells,
        "tokens": writer.tokens,
        "parts": writer.parts,
        "sources": carried.get("sources", []),
        "left_out": {},
        "split": origin | {"corpus": carried},
    }
    (writer.folder / DESCRIPTION_FILE).write_text(json.dumps(content, indent=1) + "\n")
    genes = description.parts[0].parent / "gene_set"
    if genes.is_dir():
        shutil.copytree(genes, writer.folder / "gene_set")
