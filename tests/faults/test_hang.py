"""Runs that stand still: noticed in time, the rank at fault named, stacks written, nothing left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from geneformer_pretrain.distributed.watchdog import FINISHED, Heartbeat, diagnose, name_ranks
from tests.forks import is_running
from tests.tiny import overrides, read_exit, read_metrics

ROOT = Path(__file__).resolve().parents[2]
INJECT = str(ROOT / "tests/faults/inject.py")

TIMEOUT = 5
ENDLESS = (
    "training.num_train_steps=100000",
    "training.save_every_n_steps=10",
    "training.gradient_accumulation_steps=2",
    "training.lr_schedule=constant",
)


def wait_until(ready: Callable[[], bool], what: str, timeout: float = 90) -> float:
    """Wait, and return for how long."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() < started + timeout, f"still waiting for {what} after {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - started


def has_steps(run: Path, count: int) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= count


def pids_by_rank(process: Any) -> dict[int, int]:
    return {int(psutil.Process(pid).environ()["RANK"]): pid for pid in process.worker_pids()}


def last_error(output: str) -> str:
    """The one message about a hang."""
    (line,) = (line for line in output.splitlines() if "Error: No progress" in line)
    return line


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank(tmp_path: Path, start_torchrun: Any, run_torchrun: Any, tally: Any, stopped: int) -> None:
    """Found, named, killed; the run then goes on from its last checkpoint."""
    given = overrides(tmp_path, *ENDLESS)
    process = start_torchrun([*given, f"training.hang_timeout_seconds={TIMEOUT}"], nproc=2)
    run, other = tmp_path / "run", 1 - stopped
    wait_until(has_steps(run, 25), "step 25")
    workers = pids_by_rank(process)
    row = tally(12, "a stopped rank")
    row.injected += 1
    os.kill(workers[stopped], signal.SIGSTOP)
    noticed = wait_until((run / "exit.json").exists, "the report")
    assert TIMEOUT <= noticed < TIMEOUT + 10
    ended = process.wait(20)  # torchrun by itself takes 30 s to end a stopped worker
    assert ended.returncode != 0
    assert not [pid for pid in workers.values() if is_running(pid)]

    exit_json = read_exit(run)
    assert (exit_json["reason"], exit_json["exit_code"]) == ("hang", 76)
    assert (exit_json["silent"], exit_json["behind"]) == ([stopped], [])
    assert f"rank {stopped} (step " in exit_json["error"].split("The others")[0]
    assert exit_json["error"] in last_error(ended.stdout)
    assert "in train_step" not in ended.stdout  # no traceback of a broken connection hides the message
    assert f"exitcode  : 76 (pid: {workers[other]})" in ended.stdout
    (stacks,) = (run / "hang").iterdir()
    assert stacks.name == f"rank_{other}.txt"
    assert "in _train" in stacks.read_text()

    steps = read_metrics(run)[-1]["step"]
    last = f"training.num_train_steps={steps + 5}"
    resumed = run_torchrun([*given, last], nproc=2)
    start = int(resumed.stdout.split("Resumed from ")[1].split(": ")[1].split()[0])
    assert steps - 20 <= start <= steps  # one interval, and the save in flight
    assert [record["step"] for record in read_metrics(run)] == list(range(1, steps + 6))
    assert read_exit(run)["reason"] == "completed"
    row.survived += 1


def test_a_loader_that_blocks(tmp_path: Path, start_torchrun: Any, tally: Any) -> None:
    """Both ranks are alive and wait; the one that waits for its loader is named, and both leave their stacks."""
    row = tally(12, "a loader that blocks")
    row.injected += 1
    given = overrides(tmp_path, *ENDLESS, "training.hang_timeout_seconds=2")
    process = start_torchrun(given, nproc=2, flags=[INJECT, "block:1:23"])
    run = tmp_path / "run"
    wait_until((run / "exit.json").exists, "the report")
    ended = process.wait(45)
    exit_json = read_exit(run)
    assert (exit_json["reason"], exit_json["silent"], exit_json["behind"]) == ("hang", [], [1])
    finding = exit_json["error"].removeprefix("No progress for 2 s. ")
    assert finding.startswith("Behind: rank 1 (step 6, waiting for data). The others wait: rank 0 (step 6, ")
    assert finding in last_error(ended.stdout)
    assert sorted(path.name for path in (run / "hang").iterdir()) == ["rank_0.txt", "rank_1.txt"]
    assert "in faulty_build" in (run / "hang/rank_1.txt").read_text()
    assert "in train_step" not in ended.stdout
    row.survived += 1


def run_alone(fault: str, *given: str) -> subprocess.CompletedProcess[str]:
    """Run one process without torchrun."""
    return subprocess.run(
        [sys.executable, INJECT, fault, "train.py", *given],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_one_process_alone(tmp_path: Path) -> None:
    ended = run_alone("block:0:5", *overrides(tmp_path, *ENDLESS, "training.hang_timeout_seconds=1"))
    assert ended.returncode == 76, ended.stderr
    exit_json = read_exit(tmp_path / "run")
    assert (exit_json["reason"], exit_json["exit_code"]) == ("hang", 76)
    assert "All stand at the same place: rank 0 (step 3, waiting for data)." in last_error(ended.stderr)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_keeps_no_process(tmp_path: Path) -> None:
    """A named pipe that no one reads blocks its writer as a hung file system does; the message is out before."""
    given = overrides(tmp_path, *ENDLESS, "training.hang_timeout_seconds=1")
    (tmp_path / "run/hang").mkdir(parents=True)
    os.mkfifo(tmp_path / "run/hang/rank_0.txt")
    ended = run_alone("block:0:5", *given)
    assert ended.returncode == 76
    assert last_error(ended.stderr)
    assert not (tmp_path / "run/exit.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("pause", "timeout"), [(0.6, 1), (1.5, 0)])
def test_slow_is_not_hung(tmp_path: Path, pause: float, timeout: int) -> None:
    """Steps take longer than the timeout, no phase of them does; and 0 switches the watchdog off."""
    given = overrides(tmp_path, *ENDLESS, "training.num_train_steps=3", "training.num_workers=0")
    ended = run_alone(f"slow:{pause}", *given, f"training.hang_timeout_seconds={timeout}")
    assert ended.returncode == 0, ended.stderr
    assert min(record["seconds"] for record in read_metrics(tmp_path / "run")[1:]) > 2 * pause
    assert read_exit(tmp_path / "run")["reason"] == "completed"


@pytest.mark.slow
def test_a_suspended_run_goes_on(tmp_path: Path, start_torchrun: Any) -> None:
    """As when a scheduler stops a job for longer than the timeout, and lets it continue."""
    given = overrides(tmp_path, *ENDLESS, "training.hang_timeout_seconds=2")
    process = start_torchrun(given, nproc=2, flags=[INJECT, "slow:0.6"])
    run = tmp_path / "run"
    wait_until(has_steps(run, 3), "step 3")
    workers = process.worker_pids()
    time.sleep(0.4)  # into the middle of a phase
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    steps = len(read_metrics(run))
    time.sleep(5)
    assert len(read_metrics(run)) == steps
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    wait_until(has_steps(run, steps + 3), "steps after the pause")
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert read_exit(run)["reason"] == "signal"


def test_workers_of_a_killed_torchrun_save_and_leave(tmp_path: Path, start_torchrun: Any, tally: Any) -> None:
    """Left running, they would write into the folder of their successors."""
    process = start_torchrun(overrides(tmp_path, *ENDLESS, "training.save_every_n_steps=100000"), nproc=2)
    run = tmp_path / "run"
    wait_until(has_steps(run, 3), "step 3")
    workers = process.worker_pids()
    row = tally(10, "SIGKILL of torchrun")
    row.injected += 1
    process.popen.kill()
    process.popen.wait()
    wait_until(lambda: not any(map(is_running, workers)), "the end of the workers", 20)
    exit_json = read_exit(run)
    assert exit_json["reason"] == "signal"
    assert [path.name for path in run.glob("step_*")] == [f"step_{exit_json['step']}"]
    row.survived += 1


AT = Heartbeat(tick=5, beats=10, step=3, phase="saving", pid=1, agent="0")


def readings(*beats: int | None) -> tuple[dict[int, Heartbeat], dict[int, Heartbeat]]:
    """Two readings of ranks that are alive and have come that far; None has never been heard of."""
    before = {rank: replace(AT, beats=count) for rank, count in enumerate(beats) if count is not None}
    return before, {rank: replace(heartbeat, tick=9) for rank, heartbeat in before.items()}


def test_diagnosis() -> None:
    before, after = readings(10, 10, 10)
    assert diagnose(before, after, 3)[:2] == ([], [])
    assert diagnose(*readings(12, 11, 11), 3)[:2] == ([], [1, 2])
    assert diagnose(*readings(12, None, 11), 3)[:2] == ([1], [])
    after[2] = before[2]
    assert diagnose(before, after, 3)[:2] == ([2], [])
    before[2] = after[2] = replace(before[2], phase=FINISHED, beats=11)  # it has left: no heartbeat is due
    assert diagnose(before, after, 3)[:2] == ([], [0, 1])
    for unheard in ({}, before):
        silent, behind, finding = diagnose(unheard, unheard, 3)
        assert (silent, behind) == ([], [])
        assert "store does not answer" in finding


def test_long_lists_of_ranks_are_cut() -> None:
    assert name_ranks([4]) == "rank 4"
    assert name_ranks([1, 2]) == "ranks 1, 2"
    assert name_ranks(list(range(10))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
