"""Promises 1 and 7: ranks that are killed, at random moments and at the worst ones."""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injections import crash_at_second_save
from tests.faults.results import (
    ENDLESS,
    ENGINES,
    SAVE_EVERY,
    assert_bitwise_equal,
    has_step,
    resumed_from,
    steps_done,
    steps_good,
    steps_saved,
)
from tests.tiny import overrides

PLACES = ("before the commit", "before pruning", "before deleting", "while deleting")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_of_any_rank_at_any_moment(tmp_path: Path, start: Any, tally: Any, engine: str, kills: int) -> None:
    """Every start goes on from the newest checkpoint, and in the end nothing differs from a run left alone."""
    anywhere = tally(1, f"SIGKILL of a random rank at a random moment, {engine}")
    in_a_save = tally(1, f"SIGKILL of a random rank at a random moment, {engine}: those inside of a save")
    choose = random.Random(kills)
    given, run = overrides(tmp_path, *ENDLESS, ENGINES[engine]), tmp_path / "run"
    for number in range(kills):
        newest = max(steps_good(run), default=None)
        process = start(given, 2)
        kind = ("in a save", "in a step", "in a save", "at the start")[number % 4]
        if kind == "at the start":
            time.sleep(choose.uniform(0, 0.8))
        else:
            steps = steps_done(run) if newest is None else newest
            wanted = steps + choose.randint(1, 2 * SAVE_EVERY)
            process.wait_for_training()
            process.wait_until(has_step(run, wanted), f"step {wanted}")
            if kind == "in a save":
                process.wait_until(lambda: any(run.glob("step_*.tmp")), "a save")
            time.sleep(choose.uniform(0, 0.01))
        process.ranks[choose.randrange(2)].kill()
        anywhere.injected += 1
        assert -signal.SIGKILL in process.wait(like_torchrun=True)
        inside = any(run.glob("step_*.tmp"))
        in_a_save.injected += inside

        assert steps_good(run) == steps_saved(run)
        assert steps_done(run) - max(steps_good(run), default=0) <= 2 * SAVE_EVERY
        if resumed_from(process.output()) is not None or kind != "at the start":
            assert resumed_from(process.output()) == newest
        anywhere.survived += 1
        in_a_save.survived += inside

    end = f"training.num_train_steps={max(steps_good(run), default=0) + 4}"
    start([*given, end], 2).complete()
    start([*given, end, f"training.checkpoint_dir={tmp_path / 'whole'}"], 2).complete()
    assert_bitwise_equal(run, tmp_path / "whole")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "places", [PLACES[-1:], pytest.param(PLACES * 3, marks=pytest.mark.slow)], ids=["once", "repeatedly"]
)
def test_crashes_while_committing_and_pruning(
    tmp_path: Path, start: Any, tally: Any, engine: str, places: tuple[str, ...]
) -> None:
    """Saves run in the background and each supersedes the one before."""
    given = overrides(tmp_path, *ENDLESS, ENGINES[engine], "training.keep_last_n=1", "training.async_save=true")
    run = tmp_path / "run"
    for place in places:
        row = tally(7, f"crash {place}, again and again, {engine}")
        process = start(given, 2, partial(crash_at_second_save, place=place))
        row.injected += 1
        assert process.wait(like_torchrun=True)[0] == -signal.SIGKILL
        assert steps_good(run)
        assert steps_good(run) == steps_saved(run)
        row.survived += 1
    end = f"training.num_train_steps={steps_good(run)[0] + 4}"
    newest = steps_good(run)[0]
    process = start([*given, end], 2)
    process.complete()
    assert resumed_from(process.output()) == newest
    assert not [*run.glob("*.tmp"), *run.glob("*.trash"), *run.glob("*.replaced")]
    start([*given, end, f"training.checkpoint_dir={tmp_path / 'whole'}"], 2).complete()
    assert_bitwise_equal(run, tmp_path / "whole")
