"""Promise 17: `training.keep_best` through kills at any point of a save, restarts and changes of the engine."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.faults.injections import IMPROVES_EVERY, validation_by_step
from tests.faults.results import ENDLESS, ENGINES, assert_bitwise_equal, same_tensors, steps_good, steps_saved
from tests.faults.test_kills import PLACES
from tests.tiny import make_cells, overrides, read_exit, read_metrics, write_parquet

CASES = {"DDP": ["DDP"], "FSDP2": ["FSDP2"], "engines in turn": ["DDP", "FSDP2"]}


def last_best(step: int) -> int:
    """Step with the lowest validation loss up to this one."""
    return step - (step - 2) % IMPROVES_EVERY if step >= 2 else 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "engines in turn" else pytest.mark.slow) for case in CASES]
)
def test_the_best_checkpoint_survives_kills(tmp_path: Path, start: Any, tally: Any, case: str) -> None:
    """One checkpoint and the best are kept; after each kill the newest names the best, and it is there and good."""
    row, choose = tally(17, f"kill in a save of a run that keeps its best checkpoint, {case}"), random.Random(0)
    write_parquet(tmp_path / "held_out.parquet", make_cells(20, seed=1))
    settings = (
        "training.keep_best=true",
        "training.keep_last_n=1",
        "training.validate_every_n_steps=1",
        f"data.validation_path={tmp_path / 'held_out.parquet'}",
    )
    given, run = overrides(tmp_path, *ENDLESS, *settings), tmp_path / "run"
    engines = [ENGINES[name] for name in CASES[case]]
    for number, place in enumerate([*PLACES, None, None]):
        process = start([*given, engines[number % len(engines)]], 2, partial(validation_by_step, place=place))
        row.injected += 1
        if place is None:
            saved = max(steps_good(run))
            process.wait_until(lambda saved=saved: max(steps_saved(run)) > saved + 1, "two saves")
            process.wait_until(lambda: any(run.glob("step_*.tmp")), "a save")
            time.sleep(choose.uniform(0, 0.01))
            process.ranks[choose.randrange(2)].kill()
        assert -signal.SIGKILL in process.wait(like_torchrun=True)
        assert steps_good(run) == steps_saved(run)
        newest = steps_good(run)[0]
        progress = json.loads((run / f"step_{newest}/manifest.json").read_text())["state"]["progress"]
        assert progress["best_step"] == last_best(newest)
        assert progress["best_step"] in steps_good(run)
        row.survived += 1

    end = steps_good(run)[0] + 4
    end += last_best(end) == end  # with its last save, a best step would not yet let go of the one before
    best, last = last_best(end), f"training.num_train_steps={end}"
    start([*given, engines[-1], last], 2, validation_by_step).complete()
    assert steps_good(run) == sorted({end, best}, reverse=True)
    assert read_exit(run) == {
        "reason": "completed",
        "exit_code": 0,
        "step": end,
        "best_step": best,
        "best_loss": 1 / best,
    }
    assert [record["best_step"] for record in read_metrics(run)] == [last_best(step) for step in range(1, end + 1)]

    whole = tmp_path / "whole"
    start([*given, engines[-1], last, f"training.checkpoint_dir={whole}"], 2, validation_by_step).complete()
    exported = [load_file(folder / "best_model/model.safetensors") for folder in (run, whole)]
    if len(engines) == 1:
        assert_bitwise_equal(run, whole)
        assert same_tensors(run / f"step_{best}", whole / f"step_{best}")
        assert all((exported[0][name] == exported[1][name]).all() for name in exported[1])
    for name, weight in exported[1].items():
        if not name.endswith("self.key.bias"):  # softmax ignores it: its gradient is rounding noise
            assert_close(exported[0][name], weight, atol=1e-3, rtol=1e-2)
    assert same_tensors_as_exported(run / "best_model", run / f"step_{best}")


def same_tensors_as_exported(model: Path, checkpoint: Path) -> bool:
    from tests.checkpoints import read_checkpoint

    saved, exported = read_checkpoint(checkpoint), load_file(model / "model.safetensors")
    return all((exported[name] == saved[f"model.{name}"]).all() for name in exported)


def test_another_held_out_corpus_gives_another_best(tmp_path: Path, start: Any) -> None:
    """Losses on other cells cannot be compared: the earlier best step is let go of, in words."""
    for name, seed in (("held_out", 1), ("other", 2)):
        write_parquet(tmp_path / f"{name}.parquet", make_cells(20, seed=seed))
    settings = ("training.keep_best=true", "training.keep_last_n=1", "training.validate_every_n_steps=1")
    given, run = overrides(tmp_path, *settings, "training.save_every_n_steps=1"), tmp_path / "run"

    def train(name: str, steps: int, more: str = "data.validation_cells=null") -> str:
        corpus = f"data.validation_path={tmp_path / name}.parquet"
        process = start([*given, corpus, f"training.num_train_steps={steps}", more], 1, validation_by_step)
        process.complete()
        return process.output()

    train("held_out", 2)
    assert "no longer kept" not in train("held_out", 3)
    assert steps_good(run) == [3, 2]
    said = train("held_out", 4, "data.validation_cells=9")
    assert "The held-out cells or their masks changed: step 2 is no longer kept as the best." in said
    assert steps_good(run) == [4]
    assert "step 4 is no longer kept" in train("other", 8)
    assert steps_good(run) == [8, 7]
    assert read_exit(run)["best_step"] == 7
