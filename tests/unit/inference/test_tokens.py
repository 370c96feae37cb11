"""Tokens read from parquet in place, against the cells that were written."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.data import parquet_cells
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.tokens import open_tokens


def write(folder, sizes, group_rows, with_length, seed=0):
    """Files of some rows each; returns all cells."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    cells = []
    for number, rows in enumerate(sizes):
        some = [rng.integers(0, 30_000, rng.integers(1, 40)).tolist() for _ in range(rows)]
        columns = {"input_ids": pa.array(some, pa.list_(pa.uint16()))}
        if with_length:
            columns["length"] = pa.array([len(cell) for cell in some], pa.int32())
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=group_rows)
        cells += some
    return cells


@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(any),
    group_rows=st.integers(1, 12),
    batch_rows=st.integers(1, 6),
    with_length=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_cells_in_any_order_of_requests(tmp_path_factory, sizes, group_rows, batch_rows, with_length, data):
    folder = tmp_path_factory.mktemp("files")
    cells = write(folder, sizes, group_rows, with_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_cells, "MAX_ROWS_PER_BATCH", batch_rows)
        tokens = open_tokens(folder, folder / "cache", show_progress=False)
    assert tokens.lengths.tolist() == [len(cell) for cell in cells]
    for _ in range(4):
        chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(cells) - 1)))), np.int64)
        assert tokens.read(chosen).tolist() == [token for cell in chosen for token in cells[cell]]
    rows = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    cell = data.draw(st.integers(0, len(cells) - 1))
    assert tokens.describe_cell(cell) == "{}/{}.parquet, row {}".format(folder, *rows[cell])


def test_nothing_is_written(tmp_path):
    write(tmp_path / "corpus", [5], 2, True)
    tokens = open_tokens(tmp_path / "corpus", tmp_path / "cache", show_progress=False)
    tokens.read(np.arange(5))
    assert not (tmp_path / "cache").exists()


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    for place, seed in (("one", 0), ("two", 0), ("three", 1)):
        write(tmp_path / place, [9], 4, True, seed)
    found = [
        open_tokens(tmp_path / place, tmp_path, show_progress=False).fingerprint for place in ("one", "two", "three")
    ]
    assert found[0] == found[1] != found[2]


def test_lengths_that_lie(tmp_path):
    table = pa.table({"input_ids": [[5, 6], [7, 8, 9]], "length": [2, 2]})
    pq.write_table(table, tmp_path / "cells.parquet")
    tokens = open_tokens(tmp_path, tmp_path, show_progress=False)
    with pytest.raises(DataError, match=r"cells\.parquet, row 1: input_ids has 3 tokens, and length says 2"):
        tokens.read(np.arange(2))
    pq.write_table(table.set_column(1, "length", [[2, 0]]), tmp_path / "cells.parquet")
    with pytest.raises(DataError, match="row 1: length is 0"):
        open_tokens(tmp_path, tmp_path, show_progress=False)


def test_damaged_while_it_is_read(tmp_path):
    write(tmp_path / "corpus", [400], 50, True)
    tokens = open_tokens(tmp_path / "corpus", tmp_path, show_progress=False)
    path = tmp_path / "corpus" / "0.parquet"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"0\.parquet: damaged"):
        tokens.read(np.arange(400))


def test_corpus_that_lacks_cells(tmp_path):
    write(tmp_path / "corpus", [5], 2, True)
    names = ("name", "fingerprint", "vocab_size", "special_tokens", "max_tokens")
    genes = dict(zip(names, ("toy", "f", 9, {}, 48), strict=True))
    (tmp_path / "corpus" / "corpus.json").write_text(
        json.dumps({"format_version": 1, "gene_set": genes, "parts": [{"file": "0.parquet", "cells": 6}]})
    )
    with pytest.raises(DataError, match=r"hold 5 cells, and corpus\.json lists 6"):
        open_tokens(tmp_path / "corpus", tmp_path, show_progress=False)
