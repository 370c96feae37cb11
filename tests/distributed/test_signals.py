"""Signals to real processes: one checkpoint at a common step, a distinct exit code, and no loss."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.run.folder import write_exit
from geneformer_pretrain.run.signals import HANDLED, StopSignals
from geneformer_pretrain.training import main as train
from tests.checkpoints import read_checkpoint
from tests.forks import ROOT, Fork, is_running
from tests.tiny import overrides, read_cells, read_exit, read_metrics

ENDLESS = (
    "training.num_train_steps=100000",
    "training.save_every_n_steps=100000",
    "training.gradient_accumulation_steps=2",
    "training.lr_schedule=constant",
    "training.log_cell_ids=true",
    "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1",
)


def wait_until(ready: Callable[[], bool], what: str, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"still waiting for {what} after {timeout} s"
        time.sleep(0.05)


def has_steps(run: Path, count: int) -> Callable[[], bool]:
    def ready() -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= count

    return ready


def stopped_at(run: Path) -> int:
    """Step of the one checkpoint of a run that a signal stopped; everything in the folder agrees on it."""
    exit_json = read_exit(run)
    step: int = exit_json["step"]
    assert exit_json == {"reason": "signal", "exit_code": 75, "step": step}
    assert [path.name for path in run.glob("step_*")] == [f"step_{step}"]
    assert CheckpointStore(run, keep_last_n=1).find_latest() == run / f"step_{step}"
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 1))
    assert {logged for logged, _, _ in read_cells(run).values()} == set(range(1, step + 1))
    assert not (run / "final_model").exists()
    return step


@pytest.mark.parametrize(
    ("signum", "receiver"),
    [
        (signal.SIGTERM, "torchrun"),
        (signal.SIGINT, "torchrun"),
        pytest.param(signal.SIGHUP, "torchrun", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "torchrun", marks=pytest.mark.slow),
        (signal.SIGUSR1, "worker"),
    ],
)
def test_one_checkpoint_at_a_common_step(
    tmp_path: Path, start_torchrun: Any, signum: signal.Signals, receiver: str
) -> None:
    flags = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    process = start_torchrun(overrides(tmp_path, *ENDLESS), nproc=2, flags=flags)
    run = tmp_path / "run"
    wait_until(has_steps(run, 3), "the third step")
    workers = process.worker_pids()
    assert len(workers) == 2
    started = time.monotonic()
    if receiver == "torchrun":
        process.send_signal(signum)
    else:
        os.kill(workers[1], signum)
    ended = process.wait(25)
    assert ended.returncode != 0
    assert time.monotonic() - started < 25
    assert not [pid for pid in workers if is_running(pid)]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "train.py") not in ended.stdout
    step = stopped_at(run)
    assert step >= 3
    assert f"Stopped by a signal after step {step}" in ended.stdout


def test_a_signalled_process_exits_with_75_and_resumes_bitwise(tmp_path: Path) -> None:
    """Real processes throughout; the uninterrupted run is as long as the resumed one becomes."""
    given = overrides(tmp_path, *ENDLESS)
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = Fork(tmp_path / "output", train.main, given)
    try:
        wait_until(has_steps(run, 20), "step 20")
        process.send_signal(signal.SIGTERM)
    finally:
        ended = process.wait(timeout=30)
    assert ended.returncode == 75, ended.stderr
    assert "Traceback" not in ended.stderr
    last = f"training.num_train_steps={stopped_at(run) + 7}"
    for folder in (run, whole):
        ended = Fork(tmp_path / "output", train.main, [*given, last, f"training.checkpoint_dir={folder}"]).wait(90)
        assert ended.returncode == 0, ended.stderr
    assert {record["epoch"] for record in read_metrics(run)} > {0}
    assert [r["loss"] for r in read_metrics(run)] == [r["loss"] for r in read_metrics(whole)]
    assert (run / "cells/rank_0.jsonl").read_bytes() == (whole / "cells/rank_0.jsonl").read_bytes()
    step = read_exit(run)["step"]
    ours, expected = (read_checkpoint(folder / f"step_{step}") for folder in (run, whole))
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """Whatever the tests themselves were started under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_nohup_holds(no_nohup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None


def test_signals_are_remembered_and_handlers_given_back(no_nohup: None) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    for number in HANDLED:
        with StopSignals() as signals:
            assert signals.received is None
            os.kill(os.getpid(), number)
            assert signals.received is number
    assert [signal.getsignal(number) for number in HANDLED] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_control_c_interrupts_at_once(first: signal.Signals) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGTERM)  # a batch system repeats itself
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_to_write_exit_json_is_right(tmp_path: Path) -> None:
    """The others only fail because their connections to it broke."""
    write_exit(tmp_path, "error", 1, rank=1, error="ValueError: the cause")
    write_exit(tmp_path, "error", 1, rank=0, error="RuntimeError: connection closed by peer")
    content = json.loads((tmp_path / "exit.json").read_text())
    assert content == {"reason": "error", "exit_code": 1, "rank": 1, "error": "ValueError: the cause"}
