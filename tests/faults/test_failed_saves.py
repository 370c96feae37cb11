"""Promise 8: saves that fail on one rank or because the disk is full."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injections import limit_files_in_saves
from tests.faults.results import (
    ENDLESS,
    ENGINES,
    assert_bitwise_equal,
    saved_after,
    steps_done,
    steps_good,
    steps_saved,
)
from tests.tiny import overrides, read_exit

SETTINGS = ("training.save_every_n_steps=3", "training.keep_last_n=9", ENGINES["FSDP2"], "training.async_save=true")


@pytest.mark.parametrize("failing", [(6, 9), pytest.param((3, 6, 12, 18), marks=pytest.mark.slow)], ids=str)
def test_failed_saves_are_survived(tmp_path: Path, start: Any, tally: Any, failing: tuple[int, ...]) -> None:
    """The system refuses to write the files of one rank; the next save succeeds, and training does not notice."""
    row = tally(8, "a save that fails on one rank")
    given, run = overrides(tmp_path, *ENDLESS, *SETTINGS, "training.num_train_steps=20"), tmp_path / "run"
    process = start(given, 2, partial(limit_files_in_saves, steps=failing))
    row.injected += len(failing)
    process.complete()
    assert steps_good(run) == [20, *(step for step in (18, 15, 12, 9, 6, 3) if step not in failing)]
    assert process.output().count("Saving failed (") == len(failing)
    assert "rank 1: " in process.output()
    assert "File too large" in process.output()
    start([*given, f"training.checkpoint_dir={tmp_path / 'whole'}"], 2).complete()
    assert_bitwise_equal(run, tmp_path / "whole")
    row.survived += len(failing)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_third_failure_in_a_row_stops_all_ranks(tmp_path: Path, start: Any, tally: Any, asynchronous: bool) -> None:
    row = tally(8, "three failing saves in a row, on one rank: all stop")
    more = f"training.async_save={asynchronous}"
    given, run = overrides(tmp_path, *ENDLESS, *SETTINGS, more), tmp_path / "run"
    process = start(given, 2, partial(limit_files_in_saves, steps=range(6, 1000)))
    row.injected += 1
    assert process.wait() == [1, 1]
    assert steps_saved(run) == steps_good(run) == [3]
    # The outcome of a save in the background is known at the next one.
    assert steps_done(run) == 12 + 3 * asynchronous
    assert "Error: saving " in process.output()
    assert "File too large" in process.output()
    assert "File too large" in read_exit(run)["error"]
    row.survived += 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, start: Any, tally: Any, small_disk: Path, times: int) -> None:
    """Not one byte left for checkpoints and logs; when there is room again, nothing is missing."""
    row = tally(8, "disk full for a while")
    run = small_disk / "run"
    given = overrides(tmp_path, *ENDLESS, "training.save_every_n_steps=20", "training.async_save=true")
    process = start([*given, f"training.checkpoint_dir={run}"], 2)
    for _ in range(times):
        process.wait_until(saved_after(run, max(steps_saved(run), default=0)), "a checkpoint")
        row.injected += 1
        failures = process.output().count("Saving failed (")

        def failed_again(failures: int = failures) -> bool:
            fill(small_disk / "filler")
            return process.output().count("Saving failed (") > failures

        process.wait_until(failed_again, "a failed save")
        assert steps_good(run)
        (small_disk / "filler").unlink()
        assert "cannot write to" in process.output()
        row.survived += 1
    process.wait_until(saved_after(run, steps_saved(run)[0]), "a checkpoint")
    process.send(0, signal.SIGTERM)
    assert process.wait() == [75, 75]
    end = f"training.num_train_steps={read_exit(run)['step'] + 4}"
    start([*given, end, f"training.checkpoint_dir={run}"], 2).complete()
    start([*given, end, f"training.checkpoint_dir={tmp_path / 'whole'}"], 2).complete()
    assert_bitwise_equal(run, tmp_path / "whole")


def fill(file: Path) -> None:
    """Write until there is no room left."""
    with file.open("ab", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(4096))
            except OSError:
                return
