"""Promise 16: steps whose gradient norm lies far above the usual, with `training.skip_outlier_steps`."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injections import outlying
from tests.faults.results import ENGINES, assert_bitwise_equal, reported, same_tensors
from tests.tiny import overrides

SETTINGS = (
    "training.skip_outlier_steps=6",
    "training.save_every_n_steps=1",
    "training.keep_last_n=20",
    "training.gradient_accumulation_steps=2",
    "training.lr_schedule=constant",
    "training.log_cell_ids=true",
)
SPIKES = (8, 9, 12)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_skip_the_update_also_after_a_restart(tmp_path: Path, start: Any, tally: Any, engine: str) -> None:
    """With a history of five steps, and a restart between the first two spikes that changes nothing."""
    row = tally(16, f"gradients a thousand times too large, {engine}")
    given, run = overrides(tmp_path, *SETTINGS, ENGINES[engine]), tmp_path / "run"
    spikes = partial(outlying, steps=SPIKES, factor=1000.0, history=5)
    row.injected += 3
    for steps in (8, 14):
        start([*given, f"training.num_train_steps={steps}"], 2, spikes).complete()
    assert [record["outlier_steps"] for record in reported(run)] == [0] * 7 + [1, 2, 2, 2, 3, 3, 3]
    assert not any(record["skipped_steps"] for record in reported(run))
    for step in range(2, 15):
        unchanged = same_tensors(run / f"step_{step}", run / f"step_{step - 1}")
        assert unchanged is (step in SPIKES), step
    whole = [*given, "training.num_train_steps=14", f"training.checkpoint_dir={tmp_path / 'whole'}"]
    start(whole, 2, spikes).complete()
    assert_bitwise_equal(run, tmp_path / "whole")
    row.survived += 3
