"""Opening parquet: the views against the source's own rows, and every refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data import parquet_cells
from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.errors import DataError
from tests.corpora import (
    Cells,
    assert_holds,
    cache_folder,  # noqa: F401 - the fixture `cache`
    random_cells,
    write_parquet,
    write_streams,
)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int16()),
        pa.list_(pa.uint16()),
        pa.list_(pa.int32()),
        pa.list_(pa.int64()),
        pa.list_(pa.uint64()),
        pa.large_list(pa.int64()),
        pa.large_list(pa.uint16()),
    ],
    ids=str,
)
def test_parquet_of_any_integer_list_type(tmp_path: Path, cache: Path, kind: pa.DataType) -> None:
    cells = random_cells(50)
    corpus = open_corpus(write_parquet(tmp_path / "cells.parquet", cells, kind), cache)
    assert_holds(corpus, cells)
    assert corpus.token_dtype == np.uint16
    assert corpus.offset_dtype == np.int32


def test_fixed_size_lists(tmp_path: Path, cache: Path) -> None:
    cells = np.random.default_rng(0).integers(0, 9, (30, 5)).tolist()
    path = write_parquet(tmp_path / "cells.parquet", cells, pa.list_(pa.int32(), 5))
    assert_holds(open_corpus(path, cache), cells)
    arrays = [pa.array(cells[:20], pa.list_(pa.int64(), 5)), pa.array(cells[20:], pa.list_(pa.int64(), 5))]
    assert_holds(open_corpus(write_streams(tmp_path / "saved", [arrays]), cache), cells)


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.int32), (2**31 - 1, np.int32)])
def test_token_width_follows_the_largest_token(tmp_path: Path, cache: Path, largest: int, dtype: Any) -> None:
    cells = [[1, 2], [3], [4, largest, 0]]
    corpus = open_corpus(write_parquet(tmp_path / "cells.parquet", cells, row_group_size=1), cache)
    assert_holds(corpus, cells)
    assert corpus.token_dtype == dtype


def test_folder_and_glob_take_files_in_name_order(tmp_path: Path, cache: Path) -> None:
    cells = {name: random_cells(20 + i, seed=i) for i, name in enumerate(["b", "a", "sub/c"])}
    for name, kind in zip(cells, (pa.int16(), pa.int64(), pa.uint16()), strict=True):
        write_parquet(tmp_path / f"in/{name}.parquet", cells[name], pa.list_(kind))
    (tmp_path / "in/notes.txt").write_text("not a corpus")
    (tmp_path / "in/.hidden.parquet").write_text("not a corpus")
    assert_holds(open_corpus(tmp_path / "in", cache), cells["a"] + cells["b"])
    assert_holds(open_corpus(str(tmp_path / "in/[ab].parquet"), cache), cells["a"] + cells["b"])
    corpus = open_corpus(tmp_path / "in/**/*.parquet", cache)
    assert_holds(corpus, cells["a"] + cells["b"] + cells["sub/c"])
    assert corpus.describe_cell(0) == f"{tmp_path}/in/a.parquet, row 0"
    assert corpus.describe_cell(20) == f"{tmp_path}/in/a.parquet, row 20"
    assert corpus.describe_cell(21) == f"{tmp_path}/in/b.parquet, row 0"
    assert corpus.describe_cell(corpus.num_cells - 1) == f"{tmp_path}/in/sub/c.parquet, row 21"
    for outside in (-1, corpus.num_cells):
        with pytest.raises(IndexError, match=f"cell {outside} "):
            corpus.describe_cell(outside)


def test_several_record_batches(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_cells, "TOKENS_PER_BATCH", 200)
    cells = random_cells(300)
    corpus = open_corpus(write_parquet(tmp_path / "cells.parquet", cells, row_group_size=100), cache)
    assert len(corpus.batch_values) > 10
    assert_holds(corpus, cells)


def test_slices_of_record_batches_are_checked_from_their_own_start() -> None:
    cells = [[9, 9], [9], [1, 2], [3], [4, 5]]
    tokens, offsets = parquet_cells.check_cells(pa.array(cells)[2:], Path("cells.parquet"), 0)
    assert tokens.tolist() == [1, 2, 3, 4, 5]
    assert offsets.tolist() == [0, 2, 3, 5]


def test_fingerprint_is_of_the_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str, cells: Cells, **options: Any) -> str:
        return open_corpus(write_parquet(tmp_path / name, cells, **options), cache).fingerprint

    cells = [[5, 6], [7, 8, 9], [2]]
    expected = fingerprint("a.parquet", cells)
    assert fingerprint("b.parquet", cells, kind=pa.large_list(pa.int16()), row_group_size=1) == expected
    monkeypatch.setattr(parquet_cells, "MAX_ROWS_PER_BATCH", 1)
    assert fingerprint("c.parquet", cells) == expected
    assert fingerprint("d.parquet", [[5, 6, 7], [8, 9], [2]]) != expected
    assert fingerprint("e.parquet", [[7, 8, 9], [5, 6], [2]]) != expected
    assert fingerprint("f.parquet", [[5, 6], [7, 8, 9], [3]]) != expected


def test_token_outside_the_vocabulary(tmp_path: Path, cache: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [[7], [8]])
    write_parquet(tmp_path / "b.parquet", [[3, 4], [5], [1, 2, 41], [41]])
    write_parquet(tmp_path / "c.parquet", [[41], [9]])
    assert open_corpus(tmp_path, cache, vocab_size=42).num_cells == 8
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"b\.parquet, row 2: token 41 .* of 41; .*data\.vocab_path .*at least 42"):
            open_corpus(tmp_path, cache, vocab_size=41)


# --- parquet that is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "kind", "message"),
    [
        ([[1], [2], None, [3]], None, r"row 2: input_ids is null"),
        ([[1], [2, None], [3]], None, r"row 1: input_ids holds a null"),
        ([[1], [2], [3], []], None, r"row 3: input_ids is empty"),
        ([[1], [2, 3], [4, -5]], None, r"row 2: token -5 is not in"),
        ([[1], [2**31]], None, r"row 1: token 2147483648 is not in"),
        ([[1], [2**63]], pa.list_(pa.uint64()), r"row 1: token 9223372036854775808 is not in"),
        ([[1.0]], pa.list_(pa.float32()), r"type list<.*float>, not a list of integers"),
        ([["a"]], pa.list_(pa.string()), r"type list<.*string>, not a list of integers"),
        ([1, 2], pa.int64(), r"type int64, not a list of integers"),
        (["1 2"], pa.string(), r"type string, not a list of integers"),
    ],
)
@pytest.mark.parametrize("row_group_size", [1, 100])
def test_unusable_cells(
    tmp_path: Path, cache: Path, cells: list[Any], kind: pa.DataType | None, message: str, row_group_size: int
) -> None:
    write_parquet(tmp_path / "1.parquet", random_cells(5))
    write_parquet(tmp_path / "2.parquet", cells, kind, row_group_size)
    with pytest.raises(DataError, match=rf"2\.parquet.*{message}.*; "):
        open_corpus(tmp_path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_row_numbers_count_across_record_batches(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_cells, "MAX_ROWS_PER_BATCH", 10)
    cells = random_cells(40)
    cells[33][-1] = -7
    with pytest.raises(DataError, match=r"row 33: token -7 "):
        open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache)
    cells[33][-1] = 60_000
    with pytest.raises(DataError, match=r"row 33: token 60000 "):
        open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache, vocab_size=50_000)


def test_missing_column_lists_the_others(tmp_path: Path, cache: Path) -> None:
    pq.write_table(pa.table({"tokens": [[1]], "length": [1]}), tmp_path / "cells.parquet")
    with pytest.raises(DataError, match=r"cells\.parquet: no column 'input_ids', only \['tokens', 'length'\]"):
        open_corpus(tmp_path / "cells.parquet", cache)


def test_paths_that_lead_nowhere(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet: no such file or folder"):
        open_corpus(tmp_path / "nowhere.parquet", cache)
    with pytest.raises(DataError, match="pattern matches no file"):
        open_corpus(tmp_path / "*.parquet", cache)
    write_parquet(tmp_path / "sub/deeper/cells.parquet", [[1]])
    with pytest.raises(DataError, match=r"holds neither .*/\*\*/\*\.parquet"):
        open_corpus(tmp_path / "sub", cache)
    assert open_corpus(tmp_path / "sub/**/*.parquet", cache).num_cells == 1
    write_parquet(tmp_path / "spark/a.parquet", [[1]])
    write_parquet(tmp_path / "spark/b.parquet/part-0.parquet", [[1]])
    with pytest.raises(DataError, match=r"spark: b\.parquet in it is a folder, .*/\*\*/\*\.parquet"):
        open_corpus(tmp_path / "spark", cache)
    assert open_corpus(tmp_path / "spark/**/*.parquet", cache).num_cells == 2


@pytest.mark.parametrize("damage", ["no bytes", "text", "truncated", "garbled page"])
def test_unreadable_parquet(tmp_path: Path, cache: Path, damage: str) -> None:
    path = write_parquet(tmp_path / "cells.parquet", random_cells(500), row_group_size=100)
    content = path.read_bytes()
    damaged = {
        "no bytes": b"",
        "text": b"input_ids\n1 2 3\n" * 100,
        "truncated": content[:-100],
        "garbled page": content[:1000] + b"\xff" * 3000 + content[4000:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"cells\.parquet: .*; (replace|make or download)"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
