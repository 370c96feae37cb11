"""Tokens read from parquet in place, against the cells that were written."""

import errno
import json
import shutil

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
        tokens = open_tokens(folder)
    assert tokens.lengths.tolist() == [len(cell) for cell in cells]
    for _ in range(4):
        chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(cells) - 1)))), np.int64)
        assert tokens.read(chosen).tolist() == [token for cell in chosen for token in cells[cell]]
    rows = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    cell = data.draw(st.integers(0, len(cells) - 1))
    assert tokens.describe_cell(cell) == "{}/{}.parquet, row {}".format(folder, *rows[cell])


def test_fingerprint_follows_the_files_not_the_place(tmp_path):
    write(tmp_path / "one", [9], 4, True)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    write(tmp_path / "three", [9], 4, True, seed=1)
    found = [open_tokens(tmp_path / place).fingerprint for place in ("one", "two", "three")]
    assert found[0] == found[1] != found[2]
    write(tmp_path / "two", [9], 4, True)
    assert open_tokens(tmp_path / "two").fingerprint != found[0]


def test_lengths_that_lie(tmp_path):
    table = pa.table({"input_ids": [[5, 6], [7, 8, 9]], "length": [3, 2]})
    pq.write_table(table, tmp_path / "cells.parquet")
    tokens = open_tokens(tmp_path)
    with pytest.raises(DataError, match=r"cells\.parquet, row 0: input_ids has 2 tokens, and length says 3"):
        tokens.read(np.arange(2))


@pytest.mark.parametrize("column", [[3000, 3000], [2, 0], [5, 0], [6, -1], [None, 5], [2**62, 2**62]])
def test_column_length_of_another_meaning(tmp_path, column):
    pq.write_table(pa.table({"input_ids": [[5, 6], [7, 8, 9]], "length": column}), tmp_path / "cells.parquet")
    tokens = open_tokens(tmp_path)
    assert tokens.lengths.tolist() == [2, 3]
    assert tokens.read(np.arange(2)).tolist() == [5, 6, 7, 8, 9]


def test_footers_are_read_a_few_times_whatever_the_number_of_row_groups(tmp_path, monkeypatch):
    """Opening would otherwise take time that grows with the square of the row groups."""
    cells = write(tmp_path, [40, 40], 1, True)
    plain, footers = pq.ParquetFile, []

    def opened(path, *, metadata=None, **options):
        footers.append(metadata)
        return plain(path, metadata=metadata, **options)

    monkeypatch.setattr("geneformer_pretrain.inference.tokens.pq.ParquetFile", opened)
    tokens = open_tokens(tmp_path)
    for cell in (3, 70, 20):
        assert tokens.read(np.array([cell])).tolist() == cells[cell]
    assert len(footers) > 80
    assert sum(footer is None for footer in footers) <= 4  # inspection, and read_metadata


@pytest.mark.parametrize(("number", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.ESTALE, "start again")])
def test_a_system_that_fails_does_not_blame_the_file(tmp_path, monkeypatch, number, remedy):
    write(tmp_path, [4], 2, True)
    tokens = open_tokens(tmp_path)

    def fail(*_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr("geneformer_pretrain.inference.tokens.pq.ParquetFile", fail)
    with pytest.raises(DataError, match=rf"0\.parquet: cannot be read now .*{remedy}"):
        tokens.read(np.arange(4))


def test_damaged_while_it_is_read(tmp_path):
    write(tmp_path / "corpus", [400], 50, True)
    tokens = open_tokens(tmp_path / "corpus")
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
        open_tokens(tmp_path / "corpus")
