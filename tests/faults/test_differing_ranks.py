"""Promise 9, and two runs at once: ranks that are not one run are refused before the first step."""

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.model import resolve as resolving
from tests.faults.injections import other_version
from tests.faults.results import ENDLESS, has_step, resumed_from, saved_after, steps_done, steps_saved
from tests.tiny import make_cells, overrides, read_exit, write_parquet


def run_with_differing_ranks(difference: str, tmp_path: Path, start: Callable[..., Any]) -> tuple[Any, Path, str]:
    """Start 2 ranks that differ in one thing; return the run, its folder and what has to be said."""
    given, run = overrides(tmp_path), tmp_path / "run"
    homes = [tmp_path / "home0", tmp_path / "home1"]
    for number, home in enumerate(homes):
        write_parquet(home / "cells.parquet", make_cells(60, seed=number))
    match difference:
        case "folder":
            process = start([*given, "training.checkpoint_dir=run"], 2, folders=homes)
            theirs, ours = homes[1] / "run", homes[0] / "run"
            told = f"rank 1: training.checkpoint_dir: {theirs} is not the folder that rank 0 sees as {ours}."
            return process, ours, told
        case "corpus":
            process = start([*given, "data.path=cells.parquet", "data.cache_dir=cache"], 2, folders=homes)
            return process, run, "corpus is '"
        case "held-out corpus":
            process = start([*given, "data.validation_path=cells.parquet"], 2, folders=homes)
            return process, run, "held-out corpus is '"
        case "seed":
            process = start(given, 2, more=[(), ("training.seed=7",)])
            return process, run, "training.seed is 0 on rank 0, 7 on rank 1"
        case "model":
            process = start(given, 2, more=[(), ("model.num_hidden_layers=1",)])
            return process, run, "model.num_hidden_layers is 2 on rank 0, 1 on rank 1"
        case _:
            return start(given, 2, partial(other_version, package=difference)), run, "'0.0.1' on rank 1"


SHORT, FULL = ("folder", "seed", "held-out corpus"), ("model", "corpus", "torch", "source code")


@pytest.mark.parametrize("difference", [*SHORT, *(pytest.param(each, marks=pytest.mark.slow) for each in FULL)])
def test_ranks_that_differ_are_refused(tmp_path: Path, start: Any, tally: Any, difference: str) -> None:
    row = tally(9, f"ranks that differ in {difference}")
    process, run, message = run_with_differing_ranks(difference, tmp_path, start)
    row.injected += 1
    assert process.wait() == [1, 1]
    assert message in process.output()
    assert process.output().count("Error") == 1
    assert "Traceback" not in process.output()
    assert not process.output(1)  # What all ranks agree on, one of them says.
    assert not steps_done(run)
    assert not steps_saved(run)
    row.survived += 1


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, start: Any, tally: Any, times: int) -> None:
    """Until the first one is gone, be it by SIGKILL: the lock is the system's, not a file that stays."""
    row = tally(9, "a second run in the folder of a running one")
    given, run = overrides(tmp_path, *ENDLESS), tmp_path / "run"
    for _ in range(times):
        first = start(given, 2)
        first.wait_for_training()
        first.wait_until(saved_after(run, 0), "a checkpoint")
        before = steps_done(run)
        second = start([*given, "training.seed=7"], 2)
        row.injected += 1
        assert second.wait() == [1, 1]
        assert f"{run} is in use by process {first.ranks[0].pid} on {socket.gethostname()}" in second.output()
        assert not (run / "exit.json").exists()
        first.wait_until(has_step(run, before + 3), "further steps")
        for rank in range(2):
            first.send(rank, signal.SIGKILL)
        first.wait(like_torchrun=True)
        row.survived += 1
    newest = steps_saved(run)[0]
    end = f"training.num_train_steps={newest + 2}"
    third = start([*given, end], 2)
    third.complete()
    assert resumed_from(third.output()) == newest
    assert read_exit(run)["reason"] == "completed"
    assert not (run / ".lock").exists()


def test_a_first_run_that_fails_leaves_no_folder(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path, "data.path=none.parquet"), 2)
    assert process.wait() == [1, 1]
    assert not os.path.lexists(tmp_path / "run")


def on_other_gpus(rank: int, kernel: Kernel = Kernel.torch) -> None:
    """Let the second rank resolve as on another GPU, and choose its kernels."""
    resolve = resolving.resolve

    def resolve_there(*given: Any) -> Resolved:
        name, chosen = [("NVIDIA H100", Kernel.torch), ("NVIDIA A100", kernel)][rank]
        return replace(resolve(*given), device=name, attention_kernel=chosen)

    resolving.resolve = resolve_there


def test_gpus_of_different_kinds_train_together(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, on_other_gpus)
    process.complete()
    assert process.output().count("WARNING the ranks have different GPUs: NVIDIA A100, NVIDIA H100") == 1
    assert "different GPUs" not in process.output(1)


def test_gpus_that_need_different_kernels_are_refused(tmp_path: Path, start: Any, tally: Any) -> None:
    """Each kernel draws dropout in its own way."""
    row = tally(9, "ranks that differ in attention kernel")
    row.injected += 1
    process = start(overrides(tmp_path), 2, partial(on_other_gpus, kernel=Kernel.triton))
    assert process.wait() == [1, 1]
    assert "attention_kernel is 'torch' on rank 0, 'triton' on rank 1" in process.output()
    row.survived += 1
