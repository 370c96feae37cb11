"""When checkpoints are saved, and which is kept as the best."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from geneformer_pretrain.training import main as train
from geneformer_pretrain.training import saving, step
from geneformer_pretrain.training.validation import Validation
from tests.checkpoints import read_checkpoint
from tests.tiny import (
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    read_metrics,
    tiny_config,
    write_parquet,
)

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5}
BEST = 4


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make configurations of a run whose validation losses are LOSSES, or the next of those given."""
    write_parquet(tmp_path / "held_out.parquet", make_cells(10, seed=1))
    left = iter(LOSSES.values())
    others = {"validation_accuracy": 0.25, "validation_unigram_loss": 4.5}
    monkeypatch.setattr(Validation, "evaluate", lambda *_: {"validation_loss": next(left)} | others)

    def make(*more: str) -> Any:
        return tiny_config(
            tmp_path,
            "training.num_train_steps=8",
            "training.validate_every_n_steps=2",
            "training.save_every_n_steps=1",
            "training.keep_last_n=1",
            "training.keep_best=true",
            f"data.validation_path={tmp_path / 'held_out.parquet'}",
            *more,
        )

    return make


def steps(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in run.glob("step_*")}


def test_the_best_checkpoint_is_kept_and_exported(tmp_path: Path, validated: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    assert train.run(validated()) == 0
    assert steps(run) == {BEST, 8}
    saved = read_checkpoint(run / f"step_{BEST}")
    exported = load_file(run / "best_model/model.safetensors")
    assert exported
    assert all((exported[name] == saved[f"model.{name}"]).all() for name in exported)
    assert (run / "final_model/model.safetensors").read_bytes() != (run / "best_model/model.safetensors").read_bytes()


def test_the_best_checkpoint_survives_a_restart(tmp_path: Path, validated: Callable[..., Any]) -> None:
    assert train.run(validated("training.num_train_steps=6")) == 0
    assert steps(tmp_path / "run") == {BEST, 6}
    assert train.run(validated()) == 0
    assert steps(tmp_path / "run") == {BEST, 8}


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path, validated: Callable[..., Any]) -> None:
    import shutil

    assert train.run(validated("training.num_train_steps=6")) == 0
    shutil.rmtree(tmp_path / f"run/step_{BEST}")
    assert train.run(validated()) == 0
    assert steps(tmp_path / "run") == {8}


def test_without_the_key_only_the_newest_stay(tmp_path: Path, validated: Callable[..., Any]) -> None:
    assert train.run(validated("training.keep_best=false")) == 0
    assert steps(tmp_path / "run") == {8}
    assert not (tmp_path / "run/best_model").exists()


def test_minutes_decide_on_a_step_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute passes with each look at the clock; a save is requested by one step and made after the next."""
    clock = iter(range(0, 60 * 10**6, 60))
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    config = tiny_config(
        tmp_path,
        "training.num_train_steps=30",
        "training.save_every_n_steps=null",
        "training.save_every_minutes=6",
        "training.keep_last_n=99",
        "training.async_save=false",
    )
    assert train.run(config) == 0
    saved = sorted(steps(tmp_path / "run"))
    assert saved[-1] == 30
    assert 3 <= len(saved) <= 5
    assert saved[0] == 7  # due at the launch of step 6


def test_saves_and_validation_are_not_part_of_a_step(tmp_path: Path, validated: Callable[..., Any]) -> None:
    assert train.run(validated("training.async_save=false")) == 0
    records = read_metrics(tmp_path / "run")
    assert records[0]["includes_start"]
    assert not any("includes_start" in record for record in records[1:])
    assert all(record["save_seconds"] > 0 for record in records[1:])
    assert all(("validation_seconds" in record) == (record["step"] % 2 == 0) for record in records)
    for record in records:
        pauses = record.get("save_seconds", 0) + record.get("validation_seconds", 0)
        assert record["step_seconds"] == pytest.approx(record["seconds"] - pauses, abs=1e-6)
        assert 0 < record["packing_fill"] <= 1


def test_validation_does_not_count_what_is_left_of_a_step(
    tmp_path: Path, validated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device takes 50 ms for each step; validation has to wait for it, and takes no time of its own."""
    free_at = 0.0

    def wait(until: float) -> None:
        time.sleep(max(until - time.perf_counter(), 0.0))

    def launch(totals: Tensor) -> tuple[Tensor, Any]:
        nonlocal free_at
        free_at = max(free_at, time.perf_counter()) + 0.05
        return totals, SimpleNamespace(synchronize=partial(wait, free_at))

    evaluate = Validation.evaluate

    def evaluate_on_device(*args: Any) -> dict[str, float]:
        wait(free_at)
        return evaluate(*args)

    monkeypatch.setattr(step, "_to_host", launch)
    monkeypatch.setattr(Validation, "evaluate", evaluate_on_device)
    config = validated("training.save_every_n_steps=null", "training.keep_best=false")
    assert train.run(config) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "validation_seconds" in record] == [2, 4, 6, 8]
    assert min(record["step_seconds"] for record in records) > 0.04
    assert max(record.get("validation_seconds", 0.0) for record in records) < 0.04


@pytest.mark.parametrize("name", ["10m", "106m", "4b", "v2_104m", "v2_316m"])
def test_long_runs_save_by_the_clock(name: str) -> None:
    from geneformer_pretrain.config.compose import load_config

    training = load_config(name).training
    assert (training.save_every_minutes, training.save_every_n_steps) == (15, None)
