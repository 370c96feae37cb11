"""Lengths of cells, read from a corpus or simulated."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.planner.lengths import genecorpus, of_corpus, of_tokens


def test_lengths_of_each_kind_of_corpus(tmp_path: Path) -> None:
    cells = [[5, 6, 7], [8], [9, 10, 11, 12]]
    table = pa.table({"input_ids": pa.array(cells, pa.list_(pa.uint16())), "length": [3, 1, 4]})
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(table, folder / "part-0.parquet")
    pq.write_table(table.drop_columns("length"), folder / "part-1.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(tmp_path / "saved")
    for path, copies in (
        (folder, 2),
        (tmp_path / "**/part-*.parquet", 2),
        (folder / "part-1.parquet", 1),
        (tmp_path / "saved", 1),
    ):
        found = of_corpus(str(path))
        assert found.sample.tolist() == [3, 1, 4] * copies
        assert (found.cells, found.tokens) == (3 * copies, 8 * copies)
    cut = of_corpus(str(folder)).cut(3)
    assert (cut.tokens, cut.attended) == (pytest.approx(14), pytest.approx(19 / 7))


def test_a_column_length_that_cannot_be_is_not_believed(tmp_path: Path) -> None:
    cells = pa.array([[5, 6, 7], [8]], pa.list_(pa.int32()))
    for name, lengths in (("null", [3, None]), ("text", ["3", "x"]), ("less", [3, -1])):
        pq.write_table(pa.table({"input_ids": cells, "length": lengths}), tmp_path / f"{name}.parquet")
        assert of_corpus(str(tmp_path / f"{name}.parquet")).sample.tolist() == [3, 1]


def test_a_saved_folder_that_selects_rows_is_left_as_it_is(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8], [9, 10]]})
    saved.select([2, 0]).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    assert sorted(of_corpus(str(tmp_path / "saved")).sample.tolist()) == [2, 3]
    assert sorted(tmp_path.rglob("*")) == before


def test_corpora_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        of_corpus(str(tmp_path / "none"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        of_corpus(str(tmp_path / "bad.parquet"))
    pq.write_table(pa.table({"cells": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="input_ids"):
        of_corpus(str(tmp_path / "other.parquet"))
    pq.write_table(pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="has no rows"):
        of_corpus(str(tmp_path / "empty.parquet"))


def test_held_out_cells_are_left_out(tmp_path: Path) -> None:
    lengths = genecorpus(2048)
    whole, part = lengths.cut(1024), lengths.cut(1024, held_out=0.25)
    assert part.cells == 0.75 * whole.cells
    assert part.tokens == pytest.approx(0.75 * whole.tokens)
    assert part.attended == whole.attended


def test_simulated_lengths_are_genecorpus_like() -> None:
    short, long = genecorpus(2048), genecorpus(4096)
    assert np.median(short.sample) == pytest.approx(255, rel=0.01)
    assert (short.sample == 2048).mean() == pytest.approx(0.07, abs=0.002)
    assert long.sample.mean() == pytest.approx(1440, rel=0.01)
    half = of_tokens(7_600_000_000, 2048)
    assert (half.cells, half.tokens) == (13_700_000, 7_600_000_000)
