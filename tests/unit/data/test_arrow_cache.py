"""The cache that parquet is converted into: when it is used, rebuilt or refused, and what a conversion costs."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data import arrow_cache
from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.errors import DataError, OutputError
from tests.corpora import (
    Cells,
    assert_holds,
    cache_folder,  # noqa: F401 - the fixture `cache`
    random_cells,
    write_parquet,
)
from tests.users import OTHER_USER, as_other_user, public_folder


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


def test_cache_is_not_empty_again_until_the_source_changes(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
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
    with pytest.raises(DataError, match=rf"damaged; delete the folder {data.parent}"):
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
    with pytest.raises(DataError, match=r"changed while .*cells\.parquet are complete"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_counts_are_not_called_damaged(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "cells.h5ad").write_bytes(b"\x89HDF" * 10)
    with pytest.raises(ValueError, match=r"cells\.h5ad: .*look like counts: .*`geneformer-pretrain tokenize`"):
        open_corpus(tmp_path / "cells.h5ad", cache)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json"])
def test_a_file_of_a_saved_folder_is_not_called_damaged(tmp_path: Path, cache: Path, name: str) -> None:
    for file in ("state.json", name):
        (tmp_path / file).write_text("{}" * 10)
    with pytest.raises(
        ValueError, match=rf"{name}: cannot be read as parquet .*saved with save_to_disk, give the folder"
    ):
        open_corpus(tmp_path / name, cache)


def test_a_second_column_of_the_same_name_is_refused(tmp_path: Path, cache: Path) -> None:
    cells = pa.array([[1, 2], [3]])
    pq.write_table(pa.Table.from_arrays([cells, cells], ["input_ids", "input_ids"]), tmp_path / "cells.parquet")
    with pytest.raises(DataError, match=r"cells\.parquet: has several columns 'input_ids'; keep one"):
        open_corpus(tmp_path / "cells.parquet", cache)


def test_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "cells.parquet", random_cells(50))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(OutputError, match=r"^data\.cache_dir: .*cache needs \d\.\d\dkB and 10\.0B are free"):
            open_corpus(path, cache)
    monkeypatch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OutputError, match=r"^data\.cache_dir: .*No space left on device.*free space"):
        open_corpus(path, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_processes_that_start_together_convert_once(tmp_path: Path, cache: Path) -> None:
    script = """
import sys, time
from geneformer_pretrain.data import arrow_cache, parquet_cells
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
from geneformer_pretrain.data import arrow_cache, parquet_cells
from geneformer_pretrain.data.corpus import open_corpus
parquet_cells.MAX_ROWS_PER_BATCH = 10
check = parquet_cells.check_cells
def check_or_die(column, path, first_row):
    if first_row >= 50:
        os.kill(os.getpid(), signal.SIGKILL)
    return check(column, path, first_row)
parquet_cells.check_cells = check_or_die
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


def test_progress(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("geneformer_pretrain.console.PLAIN_INTERVAL", 0.0)
    path = write_parquet(tmp_path / "cells.parquet", random_cells(50))
    open_corpus(path, cache)
    assert capsys.readouterr().err == ""
    open_corpus(path, tmp_path / "other", show_progress=True)
    assert "convert the corpus: 50 of 50 cells" in capsys.readouterr().err


def test_files_without_rows_are_left_out_and_counted(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(9)
    write_parquet(tmp_path / "in/part-0.parquet", [])
    write_parquet(tmp_path / "in/part-1.parquet", cells)
    pq.write_table(pa.table({}), tmp_path / "in/part-2.parquet")  # as pandas writes an empty frame
    for _ in range(2):  # the second time from the cache
        corpus = open_corpus(tmp_path / "in", cache)
        assert_holds(corpus, cells)
        assert corpus.empty_files == 2
        assert corpus.describe_cell(0) == f"{tmp_path}/in/part-1.parquet, row 0"
    (tmp_path / "in/part-1.parquet").unlink()
    with pytest.raises(DataError, match=r"part-0\.parquet: has no rows \(none of 2 files has\)"):
        open_corpus(tmp_path / "in", cache)


def open_and_compare(path: Path, cache: Path, cells: Cells) -> None:
    assert_holds(open_corpus(path, cache), cells)


def fail_to_convert(path: Path, cache: Path) -> None:
    with pytest.raises(OutputError, match=r"data\.cache_dir: cannot write to .*Permission denied"):
        open_corpus(path, cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user_reads_a_complete_cache_and_writes_where_the_folder_allows_it() -> None:
    with public_folder() as shared:
        cells, cache = random_cells(20), shared / "cache"
        first, second = (write_parquet(shared / name / "cells.parquet", cells) for name in "ab")
        cache.mkdir()
        open_corpus(first, cache)
        as_other_user(open_and_compare, first, cache, cells)
        as_other_user(fail_to_convert, second, cache)
        cache.chmod(0o777)
        as_other_user(open_and_compare, second, cache, cells)
        for manifest in cache.glob("*/manifest.json"):
            os.truncate(manifest, 5)
        # What one user made, another one can make again.
        as_other_user(open_and_compare, second, cache, cells, user=OTHER_USER + 1)


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, cache: Path, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(error, os.strerror(error))))
    cells = random_cells(5)
    assert_holds(open_corpus(write_parquet(tmp_path / "cells.parquet", cells), cache), cells)
    assert "no locks on this file system" in caplog.text
