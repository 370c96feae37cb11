"""Corpora written for a test, in any type and layout, and their cells read back as the gather kernel reads them."""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data.corpus import Corpus

Cells = list[list[int]]


@pytest.fixture(name="cache")
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def random_cells(count: int, seed: int = 0, vocab_size: int = 25_426) -> Cells:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, vocab_size, generator.integers(1, 40)).tolist() for _ in range(count)]


def write_parquet(path: Path, cells: Sequence[Any], kind: pa.DataType | None = None, row_group_size: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(cells, kind or pa.list_(pa.int64()))
    # The length column is wrong on purpose: lengths must come from the lists themselves.
    table = pa.table({"length": [999] * len(cells), "input_ids": column, "tissue": ["lung"] * len(cells)})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_streams(folder: Path, shards: list[list[pa.Array]], options: ipc.IpcWriteOptions | None = None) -> Path:
    """Write a saved folder by hand: a list of record batches for each shard."""
    folder.mkdir()
    names = [f"data-{number}.arrow" for number in range(len(shards))]
    for name, arrays in zip(names, shards, strict=True):
        schema = pa.schema([("tissue", pa.string()), ("input_ids", arrays[0].type)])
        with (folder / name).open("wb") as sink, ipc.new_stream(sink, schema, options=options) as writer:
            for array in arrays:
                tissues = pa.array(["lung"] * len(array), pa.string())
                writer.write_batch(pa.RecordBatch.from_arrays([tissues, array], schema=schema))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "abc"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


GENE_SET = {
    "name": "test",
    "fingerprint": "f00d",
    "vocab_size": 25_426,
    "special_tokens": {"pad": 0, "mask": 1},
    "max_tokens": 2048,
}


def write_corpus_folder(
    folder: Path,
    parts: list[Cells],
    columns: dict[str, list[Any]] | None = None,
    gene_set: dict[str, Any] = GENE_SET,
) -> Path:
    """Write a corpus folder as `tokenize` does.

    Parameters
    ----------
    parts
        Cells of each part.
    columns
        Further columns, over all cells.
    """
    folder.mkdir(parents=True)
    described, first = [], 0
    for number, cells in enumerate(parts):
        rows = slice(first, first + len(cells))
        table = pa.table(
            {
                "input_ids": pa.array(cells, pa.list_(pa.uint16())),
                "length": pa.array([len(cell) for cell in cells], pa.int32()),
                "cell_id": pa.array([f"cell-{i}" for i in range(first, first + len(cells))], pa.string()),
                **{name: values[rows] for name, values in (columns or {}).items()},
            }
        )
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
        described.append({"file": f"part-{number:05d}.parquet", "cells": len(cells), "tokens": sum(map(len, cells))})
        first += len(cells)
    content = {
        "format_version": 1,
        "gene_set": gene_set,
        "cells": first,
        "tokens": sum(part["tokens"] for part in described),
        "parts": described,
        "sources": [],
        "left_out": {},
    }
    (folder / "corpus.json").write_text(json.dumps(content))
    return folder


def view(address: int, count: int, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)


def cells_by_address(corpus: Corpus) -> Cells:
    """Read all cells the way the gather kernel does."""
    cells = []
    for batch in range(len(corpus.batch_values)):
        rows = int(corpus.batch_first_cell[batch + 1] - corpus.batch_first_cell[batch])
        offsets = view(int(corpus.batch_offsets[batch]), rows + 1, corpus.offset_dtype)
        values = view(int(corpus.batch_values[batch]), int(offsets[-1]), corpus.token_dtype)
        cells += [values[offsets[row] : offsets[row + 1]].tolist() for row in range(rows)]
    return cells


def assert_holds(corpus: Corpus, cells: Cells) -> None:
    assert corpus.num_cells == len(cells) == corpus.batch_first_cell[-1]
    assert corpus.num_tokens == sum(map(len, cells))
    assert corpus.lengths.dtype == np.int32
    assert corpus.lengths.tolist() == [len(cell) for cell in cells]
    assert [array.dtype for array in (corpus.batch_first_cell, corpus.batch_values, corpus.batch_offsets)] == [
        np.int64,
        np.uint64,
        np.uint64,
    ]
    assert cells_by_address(corpus) == cells
    assert [corpus.cell(number).tolist() for number in range(len(cells))] == cells
    assert corpus.cell(0).dtype == np.int64
