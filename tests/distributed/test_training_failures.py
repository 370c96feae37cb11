"""Gradients that are not finite, skipped by all ranks; saves that fail; other files that cannot be written."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from geneformer_pretrain.checkpoint import store as checkpoint
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.batch import Batch
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import CheckpointSaveError, TrainingError
from geneformer_pretrain.run import logs
from geneformer_pretrain.training import main as train
from geneformer_pretrain.training.step import PendingStep, TrainStep
from geneformer_pretrain.training.trainer import Trainer
from tests.tiny import (
    RunWorkers,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_cells,
    read_exit,
    read_metrics,
    tiny_config,
)

# --- gradients that are not finite ------------------------------------------------------------------------


class Injecting(TrainStep):
    """Poisons the gradient of given packs, and compares weights and optimizer around each update."""

    bad_packs: Sequence[int] = ()
    poison = float("nan")

    def snapshot(self) -> list[Tensor]:
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [tensor.detach().clone() for tensor in [*self.engine.model.parameters(), *states]]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss_sum, masked = super().forward(batch)
        if batch.pack in self.bad_packs:
            loss_sum.register_hook(lambda gradient: gradient * self.poison)
        return loss_sum, masked

    def run(self, batches: Any, step: int, requests: Any = ()) -> PendingStep:
        before = self.snapshot()
        pending = super().run(batches, step, requests)
        same = all(map(torch.equal, before, self.snapshot()))
        self.unchanged = [*getattr(self, "unchanged", []), same]
        return pending


def train_with_bad_gradients(rank: int, size: int, given: list[str], again: list[str]) -> dict[str, Any]:
    world = World(rank, rank, size, torch.device("cpu"))
    trainer = Trainer(load_config(overrides=given), world)
    trainer.step.__class__ = Injecting
    trainer.step.bad_packs = (5,)  # step 2 (packs 4 to 7), rank 1
    trainer.fit()
    result: dict[str, Any] = {"unchanged": trainer.step.unchanged, "progress": vars(trainer.progress)}
    dist.barrier()
    trainer = Trainer(load_config(overrides=again), world)
    trainer.step.__class__ = Injecting
    trainer.step.poison = float("inf")
    trainer.step.bad_packs = (0, 9, 13, 17)  # steps 1 (rank 0), 3, 4 and 5 (rank 1)
    with pytest.raises(TrainingError) as error:
        trainer.fit()
    return result | {"error": str(error.value), "last_packs": range(16 + rank, 20, 2)}


def test_all_ranks_skip_a_gradient_that_is_not_finite(tmp_path: Path, run_workers: RunWorkers) -> None:
    skip, stop = tmp_path / "skip", tmp_path / "stop"
    settings = (
        "training.num_train_steps=4",
        "training.gradient_accumulation_steps=2",
        "training.log_cell_ids=true",
    )
    given = overrides(tmp_path, *settings, f"training.checkpoint_dir={skip}")
    again = [
        *given,
        "training.num_train_steps=9",
        "training.max_skipped_steps=3",
        f"training.checkpoint_dir={stop}",
    ]
    results = run_workers(train_with_bad_gradients, 2, given, again)
    for result in results:
        assert result["unchanged"] == [False, True, False, False]
        assert result["progress"]["step"] == 4
        assert result["progress"]["next_pack"] == 16
        assert result["progress"]["skipped_steps"] == 1
    records = read_metrics(skip)
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert [record["grad_norm"] is None for record in records] == [False, True, False, False]
    assert all(record["loss"] > 0 for record in records)
    assert sorted(read_cells(skip)) == list(range(16))

    # One step in between was good, so only steps 3, 4 and 5 were skipped in a row.
    cells_of_pack = {pack: cells for pack, (_, _, cells) in read_cells(stop).items()}
    for result in results:
        assert "3 updates in a row" in result["error"]
        assert "step 5" in result["error"]
        for pack in result["last_packs"]:
            assert f"({pack}, {cells_of_pack[pack]})" in result["error"]


# --- saves that fail --------------------------------------------------------------------------------------


def fail_saves(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """Let the disk be full when the manifests of these steps are written."""
    original = checkpoint.write_manifest

    def write(folder: Path, body: dict[str, Any]) -> None:
        if body["step"] in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, body)

    monkeypatch.setattr(checkpoint, "write_manifest", write)


def saving_run(folder: Path, asynchronous: bool) -> Config:
    settings = ("training.num_train_steps=9", "training.save_every_n_steps=1", "training.keep_last_n=9")
    return tiny_config(folder, *settings, f"training.async_save={asynchronous}")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("failing", [(2,), (3, 4), (8,), (2, 4, 6, 8)])
def test_failed_saves_are_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Sequence[int], asynchronous: bool
) -> None:
    fail_saves(monkeypatch, failing)
    assert train.run(saving_run(tmp_path, asynchronous)) == 0
    saved = {int(path.name.removeprefix("step_")) for path in (tmp_path / "run").glob("step_*")}
    assert saved == set(range(1, 10)) - set(failing)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_too_many_failed_saves_in_a_row_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_saves(monkeypatch, range(2, 10))
    with pytest.raises(CheckpointSaveError, match="No space left on device"):
        train.run(saving_run(tmp_path, asynchronous))
    # The saves of steps 2, 3 and 4; the outcome of one in the background is known at the next.
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4 + asynchronous
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_1"]
    assert "No space left on device" in read_exit(tmp_path / "run")["error"]


def test_failed_last_save_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_saves(monkeypatch, (9,))
    with pytest.raises(CheckpointSaveError, match="No space left on device"):
        train.run(saving_run(tmp_path, True))


# --- other files that cannot be written -------------------------------------------------------------------


def fail_to_write(rank: int, size: int, runs: Sequence[list[str]]) -> list[str]:
    """Start each run on this rank; return the messages of the errors that end them."""
    messages = []
    for given in runs:
        with pytest.raises(TrainingError) as error:
            Trainer(load_config(overrides=given), World(rank, rank, size, torch.device("cpu"))).fit()
        messages.append(str(error.value))
    return messages


def test_where_rank_0_cannot_write_all_ranks_stop(tmp_path: Path, run_workers: RunWorkers) -> None:
    record, metrics = (tmp_path / name for name in ("record", "metrics"))
    for folder in (record / "config.yaml.tmp", metrics / "metrics.jsonl"):
        folder.mkdir(parents=True)
    given = overrides(tmp_path)
    runs = [[*given, f"training.checkpoint_dir={folder}"] for folder in (record, metrics)]
    first, second = run_workers(fail_to_write, 2, runs)
    assert first == second
    cannot = "rank 0: training.checkpoint_dir: cannot write to"
    reasons = [
        f"{cannot} {record}/config.yaml.tmp (Is a directory)",
        f"{cannot} {metrics}/metrics.jsonl (Is a directory)",
    ]
    for message, reason in zip(first, reasons, strict=True):
        assert message.startswith(reason)
        assert "rank 1" not in message


def test_where_another_rank_cannot_write_all_ranks_stop(tmp_path: Path, run_workers: RunWorkers) -> None:
    log = tmp_path / "run" / "cells" / "rank_1.jsonl"
    log.mkdir(parents=True)
    first, second = run_workers(fail_to_write, 2, [overrides(tmp_path, "training.log_cell_ids=true")])
    assert first == second
    assert first[0].startswith(f"rank 1: training.checkpoint_dir: cannot write to {log} (Is a directory)")


def test_a_bug_in_what_is_written_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "write_run_record", lambda *_: {}["missing"])
    with pytest.raises(TrainingError, match="KeyError: 'missing'"):
        train.run(tiny_config(tmp_path))
    assert "Traceback" in caplog.text
