"""Opening corpora: the views against the source's own rows, every refusal, and the life of the cache."""

import ctypes
import json
import logging
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data import arrow_cache
from geneformer_pretrain.data.corpus import Corpus, open_corpus

ROOT = Path(__file__).resolve().parents[2]

Cells = list[list[int]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


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


def save_dataset(folder: Path, cells: Cells, num_shards: int, kind: str = "int64") -> Path:
    features = datasets.Features({"length": datasets.Value("int64"), "input_ids": datasets.List(datasets.Value(kind))})
    columns = {"length": [999] * len(cells), "input_ids": cells}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder, num_shards=num_shards)
    return folder


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


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List the folders that are converted into while the test runs."""
    folders: list[Path] = []
    write = arrow_cache._write

    def counted(*arguments: Any) -> arrow_cache.CacheManifest:
        folders.append(arguments[1])
        return write(*arguments)

    monkeypatch.setattr(arrow_cache, "_write", counted)
    return folders


# --- parquet ---------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(arrow_cache, "TOKENS_PER_BATCH", 200)
    cells = random_cells(300)
    corpus = open_corpus(write_parquet(tmp_path / "cells.parquet", cells, row_group_size=100), cache)
    assert len(corpus.batch_values) > 10
    assert_holds(corpus, cells)


def test_slices_of_record_batches_are_checked_from_their_own_start() -> None:
    cells = [[9, 9], [9], [1, 2], [3], [4, 5]]
    tokens, offsets = arrow_cache._check_cells(pa.array(cells)[2:], Path("cells.parquet"), 0)
    assert tokens.tolist() == [1, 2, 3, 4, 5]
    assert offsets.tolist() == [0, 2, 3, 5]


def test_fingerprint_is_of_the_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(name: str, cells: Cells, **options: Any) -> str:
        return open_corpus(write_parquet(tmp_path / name, cells, **options), cache).fingerprint

    cells = [[5, 6], [7, 8, 9], [2]]
    expected = fingerprint("a.parquet", cells)
    assert fingerprint("b.parquet", cells, kind=pa.large_list(pa.int16()), row_group_size=1) == expected
    monkeypatch.setattr(arrow_cache, "MAX_ROWS_PER_BATCH", 1)
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
        with pytest.raises(ValueError, match=r"b\.parquet, row 2: token 41 .* vocabulary of 41.* at least 42"):
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
        ([], None, r"has no rows"),
    ],
)
@pytest.mark.parametrize("row_group_size", [1, 100])
def test_unusable_cells(
    tmp_path: Path, cache: Path, cells: list[Any], kind: pa.DataType | None, message: str, row_group_size: int
) -> None:
    write_parquet(tmp_path / "1.parquet", random_cells(5))
    write_parquet(tmp_path / "2.parquet", cells, kind, row_group_size)
    with pytest.raises(ValueError, match=rf"2\.parquet.*{message}.*; "):
        open_corpus(tmp_path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_row_numbers_count_across_record_batches(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_cache, "MAX_ROWS_PER_BATCH", 10)
    cells = random_cells(40)
    cells[33][-1] = -7
    with pytest.raises(ValueError, match=r"row 33: token -7 "):
        open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache)
    cells[33][-1] = 60_000
    with pytest.raises(ValueError, match=r"row 33: token 60000 "):
        open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache, vocab_size=50_000)


def test_missing_column_lists_the_others(tmp_path: Path, cache: Path) -> None:
    pq.write_table(pa.table({"tokens": [[1]], "length": [1]}), tmp_path / "cells.parquet")
    with pytest.raises(ValueError, match=r"cells\.parquet: no column 'input_ids', only \['tokens', 'length'\]"):
        open_corpus(tmp_path / "cells.parquet", cache)


def test_paths_that_lead_nowhere(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet: no such file or folder"):
        open_corpus(tmp_path / "nowhere.parquet", cache)
    with pytest.raises(FileNotFoundError, match="pattern matches no file"):
        open_corpus(tmp_path / "*.parquet", cache)
    write_parquet(tmp_path / "sub/deeper/cells.parquet", [[1]])
    with pytest.raises(FileNotFoundError, match=r"holds neither .*/\*\*/\*\.parquet"):
        open_corpus(tmp_path / "sub", cache)
    assert open_corpus(tmp_path / "sub/**/*.parquet", cache).num_cells == 1


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
    with pytest.raises(ValueError, match=r"cells\.parquet: .*; (replace|make or download)"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


# --- the cache -------------------------------------------------------------------------------------------


def test_cache_is_used_again_until_the_source_changes(tmp_path: Path, cache: Path, conversions: list[Path]) -> None:
    path = write_parquet(tmp_path / "cells.parquet", [[1, 2], [3]])
    first = open_corpus(path, cache)
    again = open_corpus(path, cache)
    assert len(conversions) == 1
    assert again.fingerprint == first.fingerprint
    status = path.stat()
    write_parquet(path, [[1, 2], [4]])
    assert path.stat().st_size == status.st_size
    assert_holds(open_corpus(path, cache), [[1, 2], [4]])
    assert len(conversions) == 2
    assert_holds(first, [[1, 2], [3]])


def test_cells_outlive_the_deleted_cache(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(200)
    corpus = open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache)
    shutil.rmtree(cache)
    assert_holds(corpus, cells)


@pytest.mark.parametrize("damage", ["data cut", "data missing", "manifest garbled", "manifest missing"])
def test_damaged_cache_is_rebuilt_loudly(
    tmp_path: Path, cache: Path, damage: str, conversions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_parquet(tmp_path / "cells.parquet", [[1, 2], [3]])
    open_corpus(path, cache)
    (data,) = cache.glob("*/cells.arrow")
    manifest = data.with_name("manifest.json")
    if damage == "data cut":
        os.truncate(data, data.stat().st_size - 8)
    elif damage == "manifest garbled":
        os.truncate(manifest, 40)
    else:
        (data if damage == "data missing" else manifest).unlink()
    with caplog.at_level(logging.WARNING):
        assert_holds(open_corpus(path, cache), [[1, 2], [3]])
    assert len(conversions) == 2
    assert str(data.parent) in caplog.text
    assert "damaged" in caplog.text


def test_cache_with_other_lengths_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_parquet(tmp_path / "cells.parquet", [[1, 2, 3], [4]])
    open_corpus(path, cache)
    (data,) = cache.glob("*/cells.arrow")
    offsets = np.array([0, 3, 4], np.int32).tobytes()
    content = data.read_bytes()
    assert content.count(offsets) == 1
    data.write_bytes(content.replace(offsets, np.array([0, 2, 4], np.int32).tobytes()))
    with pytest.raises(ValueError, match=rf"damaged; delete the folder {data.parent}"):
        open_corpus(path, cache)


def test_source_that_changes_during_the_conversion(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "cells.parquet", [[1, 2], [3]])
    write = arrow_cache._write

    def write_while_source_changes(*arguments: Any) -> arrow_cache.CacheManifest:
        manifest = write(*arguments)
        os.utime(path, ns=(0, 0))
        return manifest

    monkeypatch.setattr(arrow_cache, "_write", write_while_source_changes)
    with pytest.raises(RuntimeError, match=r"changed while .*cells\.parquet are complete"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "cells.parquet", random_cells(50))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OSError, match=r"^data\.cache_dir: .*cache needs 0\.0 GB and 0\.0 GB are free"):
            open_corpus(path, cache)
    monkeypatch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=r"^data\.cache_dir: .*No space left on device.*free space"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_processes_that_start_together_convert_once(tmp_path: Path, cache: Path) -> None:
    script = """
import sys, time
from geneformer_pretrain.data import arrow_cache
from geneformer_pretrain.data.corpus import open_corpus
path, cache, log = sys.argv[1:]
write = arrow_cache._write
def slow(*arguments):
    with open(log, "a") as file:
        file.write("converted\\n")
    time.sleep(1)
    return write(*arguments)
arrow_cache._write = slow
print(open_corpus(path, cache).fingerprint)
"""
    path = write_parquet(tmp_path / "cells.parquet", random_cells(50))
    log = tmp_path / "log"
    processes = [start(script, path, cache, log) for _ in range(3)]
    fingerprints = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert log.read_text() == "converted\n"
    assert fingerprints == {open_corpus(path, cache).fingerprint}


def test_killed_conversion_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    script = """
import os, signal, sys
from geneformer_pretrain.data import arrow_cache
from geneformer_pretrain.data.corpus import open_corpus
arrow_cache.MAX_ROWS_PER_BATCH = 10
check = arrow_cache._check_cells
def check_or_die(column, path, first_row):
    if first_row >= 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return check(column, path, first_row)
arrow_cache._check_cells = check_or_die
open_corpus(*sys.argv[1:])
"""
    cells = random_cells(100)
    path = write_parquet(tmp_path / "cells.parquet", cells)
    process = start(script, path, cache)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".tmp"]
    assert_holds(open_corpus(path, cache), cells)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_conversion_does_not_hold_the_corpus_in_memory(tmp_path: Path, cache: Path) -> None:
    script = """
import sys, threading
from geneformer_pretrain.data.corpus import open_corpus
def resident():
    with open("/proc/self/status") as file:
        return int(file.read().split("RssAnon:")[1].split()[0]) / 1024
start = peak = resident()
done = threading.Event()
def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())
thread = threading.Thread(target=sample)
thread.start()
corpus = open_corpus(*sys.argv[1:])
done.set()
thread.join()
print(corpus.num_tokens, peak - start)
"""
    rows, length = 32_000, 1_000
    tokens = np.random.default_rng(0).integers(2, 25_426, rows * length)
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), length).cast(pa.list_(pa.int64()))
    path = tmp_path / "cells.parquet"
    pq.write_table(pa.table({"input_ids": column}), path, row_group_size=rows)
    process = start(script, path, cache)
    num_tokens, megabytes = map(float, process.communicate(timeout=60)[0].split())
    assert num_tokens == rows * length
    assert megabytes < 0.6 * tokens.nbytes / 2**20


def test_progress_bar(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parquet(tmp_path / "cells.parquet", random_cells(50))
    open_corpus(path, cache)
    assert capsys.readouterr().err == ""
    open_corpus(path, tmp_path / "other", show_progress=True)
    assert "50/50" in capsys.readouterr().err


# --- save_to_disk folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int16", "uint16", "int32", "int64"])
def test_saved_folder_is_read_in_place(tmp_path: Path, cache: Path, kind: str) -> None:
    cells = random_cells(2500)
    if kind == "int16":
        cells = [[token // 2 for token in cell] for cell in cells]
    folder = save_dataset(tmp_path / "saved", cells, 3, kind)
    corpus = open_corpus(folder, cache)
    assert_holds(corpus, cells)
    assert corpus.token_dtype == np.dtype(kind)
    assert corpus.describe_cell(0) == f"{tmp_path}/saved/data-00000-of-00003.arrow, row 0"
    assert corpus.describe_cell(834) == f"{tmp_path}/saved/data-00001-of-00003.arrow, row 0"
    assert corpus.describe_cell(2499) == f"{tmp_path}/saved/data-00002-of-00003.arrow, row 832"
    assert not cache.exists()


def test_saved_selection_is_what_was_selected(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(60)
    dataset = datasets.Dataset.from_dict({"input_ids": cells}).select([5, 3, 59, 3])
    dataset.save_to_disk(tmp_path / "saved")
    assert_holds(open_corpus(tmp_path / "saved", cache), [cells[5], cells[3], cells[59], cells[3]])


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())], ids=str)
def test_sliced_and_empty_record_batches(tmp_path: Path, cache: Path, kind: pa.DataType) -> None:
    cells = random_cells(30)
    whole = pa.array(cells, kind)
    shards = [[whole[:0], whole[:7], whole[7:7]], [whole[:0]], [whole[7:8], whole[8:]]]
    corpus = open_corpus(write_streams(tmp_path / "saved", shards), cache)
    assert_holds(corpus, cells)
    assert len(corpus.batch_values) == 3
    assert corpus.describe_cell(7) == f"{tmp_path}/saved/data-2.arrow, row 0"
    assert corpus.offset_dtype == (np.int64 if pa.types.is_large_list(kind) else np.int32)


def test_saved_fingerprint(tmp_path: Path, cache: Path) -> None:
    first = save_dataset(tmp_path / "first", [[1, 2], [3]], 1)
    fingerprint = open_corpus(first, cache).fingerprint
    shutil.copytree(first, tmp_path / "copy")
    assert open_corpus(tmp_path / "copy", cache).fingerprint == fingerprint
    other = save_dataset(tmp_path / "tokens", [[1, 2], [4]], 1)  # told apart by the dataset's own fingerprint
    assert open_corpus(other, cache).fingerprint != fingerprint
    shards = [
        [pa.array([[1, 2], [3]])],
        [pa.array([[1], [2, 3]])],
        [pa.array([[1, 2], [3]], pa.list_(pa.int64()))],
    ]
    a, b, c = (
        open_corpus(write_streams(tmp_path / f"{i}", [shard]), cache).fingerprint for i, shard in enumerate(shards)
    )
    assert a == c != b


def empty_cell(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]])], [pa.array([[1]]), pa.array([[2], [], [3]])]])


def null_cell(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1], None])]])


def null_token(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1], [2, 3]]), pa.array([[4], [5, None]])]])


def empty_dataset(folder: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": pa.array([], pa.list_(pa.int64())).to_pylist()}).cast(
        datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
    ).save_to_disk(folder)


def only_empty_cells(folder: Path) -> None:
    write_streams(folder, [[pa.array([[], []], pa.list_(pa.int64()))]])


def floats(folder: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1.5]]}).save_to_disk(folder)


def other_column(folder: Path) -> None:
    datasets.Dataset.from_dict({"tokens": [[1]], "length": [1]}).save_to_disk(folder)


def unsupported_integers(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]], pa.list_(pa.uint32()))]])


def mixed_types(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]], pa.list_(kind))] for kind in (pa.int32(), pa.int32(), pa.int64())])


def compressed(folder: Path) -> None:
    options = ipc.IpcWriteOptions(compression="zstd")
    write_streams(folder, [[pa.array([[1] * 5000] * 100)]], options)


def missing_shard(folder: Path) -> None:
    (save_dataset(folder, [[1], [2]], 2) / "data-00001-of-00002.arrow").unlink()


def zero_bytes(folder: Path) -> None:
    os.truncate(save_dataset(folder, [[1], [2]], 1) / "data-00000-of-00001.arrow", 0)


def cut_in_a_batch(folder: Path) -> None:
    path = write_streams(folder, [[pa.array([[1, 2, 3]] * 50)] * 3]) / "data-0.arrow"
    os.truncate(path, path.stat().st_size - 600)


def cut_between_batches(folder: Path) -> None:
    path = write_streams(folder, [[pa.array([[1, 2, 3]] * 50)] * 3]) / "data-0.arrow"
    os.truncate(path, path.stat().st_size - 8)


def not_arrow(folder: Path) -> None:
    (write_streams(folder, [[pa.array([[1]])]]) / "data-0.arrow").write_bytes(b"input_ids 1 2 3\n" * 9)


def decreasing_offsets(folder: Path) -> None:
    replace_offsets(folder, [0, 7, 2, 9])


def negative_offset(folder: Path) -> None:
    replace_offsets(folder, [-4, 2, 7, 9])


def offsets_beyond_the_values(folder: Path) -> None:
    replace_offsets(folder, [0, 2, 7, 900])


def replace_offsets(folder: Path, offsets: list[int]) -> None:
    path = write_streams(folder, [[pa.array([[1, 2], [1, 2, 3, 4, 5], [6, 7]])]]) / "data-0.arrow"
    old, new = (np.array(numbers, np.int32).tobytes() for numbers in ([0, 2, 7, 9], offsets))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))


def indices(folder: Path) -> None:
    state_file = save_dataset(folder, [[1], [2]], 1) / "state.json"
    state = json.loads(state_file.read_text()) | {"_indices_files": [{"filename": "indices.arrow"}]}
    state_file.write_text(json.dumps(state))


def no_fingerprint(folder: Path) -> None:
    state_file = save_dataset(folder, [[1], [2]], 1) / "state.json"
    state_file.write_text(json.dumps({"_data_files": []}))


def garbled_state(folder: Path) -> None:
    os.truncate(save_dataset(folder, [[1], [2]], 1) / "state.json", 30)


def several_splits(folder: Path) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[1]]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(folder)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (empty_cell, ValueError, r"data-1\.arrow, row 2: input_ids has 0 tokens; drop"),
        (only_empty_cells, ValueError, r"data-0\.arrow, row 0: input_ids has 0 tokens; drop"),
        (null_cell, ValueError, r"data-0\.arrow, row 1: input_ids is null; drop"),
        (null_token, ValueError, r"data-0\.arrow, row 3: input_ids holds a null; drop"),
        (empty_dataset, ValueError, r"saved: the dataset has no rows; correct|has type null"),
        (floats, ValueError, r"0001\.arrow: column 'input_ids' has type list<.*double>, not .*; store"),
        (
            other_column,
            ValueError,
            r"0001\.arrow: no column 'input_ids', only \['tokens', 'length'\]; rename",
        ),
        (unsupported_integers, ValueError, r"data-0\.arrow: .* type uint32; cast them to one of \['uint16'"),
        (mixed_types, ValueError, r"int32.* in .*data-0\.arrow but .*int64.* in .*data-2\.arrow; cast"),
        (compressed, ValueError, r"data-0\.arrow: the Arrow stream is compressed; save it again"),
        (missing_shard, FileNotFoundError, r"data-00001-of-00002\.arrow: the file is missing; save"),
        (zero_bytes, ValueError, r"data-00000-of-00001\.arrow: the file is empty; save"),
        (cut_in_a_batch, ValueError, r"data-0\.arrow: damaged after row 100 .*; save"),
        (cut_between_batches, ValueError, r"data-0\.arrow: the file breaks off after row 150; save"),
        (not_arrow, ValueError, r"data-0\.arrow: not an Arrow stream .*; save"),
        (decreasing_offsets, ValueError, r"data-0\.arrow, row 1: input_ids has -5 tokens; drop"),
        (negative_offset, ValueError, r"data-0\.arrow: damaged after row 0 .*; save"),
        (offsets_beyond_the_values, ValueError, r"data-0\.arrow: damaged after row 0 .*; save"),
        (indices, ValueError, r"state\.json: _indices_files .*; apply Dataset\.flatten_indices"),
        (no_fingerprint, ValueError, r"state\.json: .*_fingerprint.*; save"),
        (garbled_state, ValueError, r"state\.json: .*JSONDecodeError.*; save"),
        (several_splits, ValueError, r"saved: holds several datasets; .*\['test', 'train'\]"),
    ],
)
def test_unusable_saved_folder(
    tmp_path: Path, cache: Path, make: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    make(tmp_path / "saved")
    with pytest.raises(error, match=message):
        open_corpus(tmp_path / "saved", cache)


@pytest.mark.parametrize("hard", [4096, 64])
def test_more_shards_than_a_process_may_open_files(tmp_path: Path, cache: Path, hard: int) -> None:
    """The soft limit is raised; what the hard one forbids is an error with a remedy."""
    folder = write_streams(tmp_path / "saved", [[pa.array([[2, 3]])]] * 100)
    script = (
        "import resource, sys\n"
        "from geneformer_pretrain.data.corpus import open_corpus\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))\n"
        "print(open_corpus(sys.argv[1], sys.argv[2]).num_cells)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    if hard > 100:
        assert done.stdout.strip() == "100", done.stderr
    else:
        assert "100 files, and this system allows a process 64 open ones" in done.stderr


def resident_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as region:
        content = np.frombuffer(region, np.uint8)
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)))
        assert libc.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)) == 0
        del content
        return int((pages & 1).sum()) * mmap.PAGESIZE


def test_opening_does_not_read_the_tokens(tmp_path: Path, cache: Path) -> None:
    batch = pa.array(np.ones((500, 500), np.int64).tolist())
    folder = write_streams(tmp_path / "saved", [[batch] * 16])
    path = folder / "data-0.arrow"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path) > 0:
        pytest.skip("this file system keeps files in memory")
    corpus = open_corpus(folder, cache)
    assert corpus.num_tokens == 16 * 500 * 500
    assert resident_bytes(path) < path.stat().st_size / 20
