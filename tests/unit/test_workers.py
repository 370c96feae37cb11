"""The fixture `run_workers`: how ranks are told apart, and how one that fails, dies or hangs is reported."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.forks import is_running
from tests.tiny import RunWorkers

pytestmark = pytest.mark.process


def sum_of_ranks(rank: int, size: int, sent: int) -> tuple[int, int, str, int]:
    total = torch.tensor([rank + sent])
    dist.all_reduce(total)
    return rank, size, os.environ["LOCAL_RANK"], int(total)


def break_one(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 is broken")
    time.sleep(1000)


def kill_one(rank: int, size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def hang(rank: int, size: int, folder: Path) -> None:
    """Both never end, nor does a process that one has started."""
    (folder / f"{rank}").write_text(str(os.getpid()))
    if rank == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        (folder / "child").write_text(str(child.pid))
    dist.barrier()
    time.sleep(1000)


def environment_of(rank: int, size: int) -> str | None:
    return os.environ.get("FOR_THE_RANKS")


def test_results_come_in_rank_order(run_workers: RunWorkers) -> None:
    assert run_workers(sum_of_ranks, 3, 10) == [(0, 3, "0", 33), (1, 3, "1", 33), (2, 3, "2", 33)]


def test_the_environment_of_the_test_reaches_the_ranks(
    run_workers: RunWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOR_THE_RANKS", "here")
    assert run_workers(environment_of, 1) == ["here"]
    monkeypatch.delenv("FOR_THE_RANKS")
    assert run_workers(environment_of, 1) == [None]


def test_a_broken_rank_raises_with_its_traceback(run_workers: RunWorkers) -> None:
    with pytest.raises(Exception, match=r"(?s)in break_one\n.*ValueError: rank 1 is broken"):
        run_workers(break_one, 2)


def test_a_killed_rank_is_named_with_its_signal(run_workers: RunWorkers) -> None:
    with pytest.raises(Exception, match="process 1 terminated with signal SIGKILL"):
        run_workers(kill_one, 2)


@pytest.fixture
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Look, after `run_workers` has cleaned up, for the processes that wrote their ids."""
    yield
    deadline = time.monotonic() + 10
    while any(map(is_running, (int((tmp_path / name).read_text()) for name in ("0", "1", "child")))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("nothing_stays")
def test_ranks_that_hang_are_killed_with_what_they_started(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run_workers = request.getfixturevalue("run_workers")  # set up after, so cleaned up before, `nothing_stays`
    run_workers(environment_of, 1)  # The process that ranks are forked from is up.
    with pytest.raises(AssertionError, match="hang on 2 ranks still ran after 2 s"):
        run_workers(hang, 2, tmp_path, timeout=2)
