"""Promise 11: a loss or a gradient of one rank that is NaN or infinite."""

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injections import not_finite
from tests.faults.results import ENGINES, read_checkpoint, reported, same_tensors
from tests.tiny import overrides, read_cells

SHORT = (("loss", "inf", 1, "DDP"), ("gradient", "nan", 0, "FSDP2"))
ALL = tuple(itertools.product(("loss", "gradient"), ("nan", "inf", "-inf"), (0, 1), ENGINES))
CASES = [pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("where", "value", "rank", "engine"), CASES)
def test_all_ranks_skip_the_update(
    tmp_path: Path, start: Any, tally: Any, where: str, value: str, rank: int, engine: str
) -> None:
    """The checkpoints around the bad step are bitwise equal; step count and data go on."""
    row = tally(11, f"{value} in the {where} of one rank")
    settings = ("training.num_train_steps=4", "training.save_every_n_steps=1", "training.keep_last_n=9")
    settings += ("training.gradient_accumulation_steps=2", "training.log_cell_ids=true", ENGINES[engine])
    given, run = overrides(tmp_path, *settings), tmp_path / "run"
    row.injected += 1
    start(given, 2, partial(not_finite, bad_rank=rank, steps=[3], where=where, value=float(value))).complete()
    assert [record["skipped_steps"] for record in reported(run)] == [0, 0, 1, 1]
    assert [record["grad_norm"] is None for record in reported(run)] == [False, False, True, False]
    assert same_tensors(run / "step_3", run / "step_2")
    assert not same_tensors(run / "step_2", run / "step_1")
    assert not same_tensors(run / "step_4", run / "step_3")
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(run / "step_4").values())
    packs = [json.loads((run / f"step_{n}/manifest.json").read_text())["state"]["progress"] for n in (2, 3)]
    assert [each["next_pack"] for each in packs] == [8, 12]
    assert sorted(read_cells(run)) == list(range(16))
    row.survived += 1


@pytest.mark.parametrize("engine", [pytest.param("DDP", marks=pytest.mark.slow), "FSDP2"])
def test_too_many_in_a_row_stop_all_ranks(tmp_path: Path, start: Any, tally: Any, engine: str) -> None:
    """With the packs and cells of the last of them, on every rank."""
    row = tally(11, "as many in a row as training.max_skipped_steps: all stop")
    settings = ("training.num_train_steps=20", "training.max_skipped_steps=3", "training.log_cell_ids=true")
    given, run = overrides(tmp_path, *settings, ENGINES[engine]), tmp_path / "run"
    process = start(given, 2, partial(not_finite, bad_rank=1, steps=[2, 4, 5, 6], where="gradient", value=math.nan))
    row.injected += 1
    assert process.wait() == [1, 1]
    cells = read_cells(run)
    for rank in range(2):
        pack = 2 * 5 + rank
        said = process.output(rank)
        assert "Error: 3 updates in a row had gradients that are not finite (the last at step 6). Lower" in said
        assert f"This rank's packs of that step, each with its cells: [({pack}, {cells[pack][2]})]" in said
    row.survived += 1
