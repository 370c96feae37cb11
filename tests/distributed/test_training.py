"""Runs that are stopped, resumed, moved between engines and numbers of ranks, against one that is not.

All with dropout, gradient accumulation and an epoch's end on the way.
"""

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.batch import Batch
from geneformer_pretrain.data.dataset import VALIDATION_SEED
from geneformer_pretrain.data.masking import MaskRule, mask_cell
from geneformer_pretrain.distributed.world import World, distributed_world
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training import main as train
from geneformer_pretrain.training.step import PendingStep, TrainStep
from geneformer_pretrain.training.trainer import Trainer
from tests.checkpoints import read_checkpoint
from tests.tiny import (
    RunWorkers,
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_cells,
    read_exit,
    read_metrics,
    tiny_config,
    write_parquet,
)

# Large initial weights, so that dropout matters from the first step.
DROPOUT = (
    "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1",
    "model.initializer_range=0.2",
)


STEPS, PACKS_PER_STEP, NUM_CELLS = 6, 12, 300


def long_run(folder: Path, *more: str) -> list[str]:
    """Overrides of a run of 6 steps of 12 packs, whose corpus has about 50 packs."""
    return overrides(
        folder,
        *DROPOUT,
        f"training.num_train_steps={STEPS}",
        "training.learning_rate=1e-2",
        "training.save_every_n_steps=2",
        "training.keep_last_n=10",
        "training.log_cell_ids=true",
        "training.validate_every_n_steps=2",
        f"data.validation_path={folder / 'held_out.parquet'}",
        *more,
        num_cells=NUM_CELLS,
    )


def into(folder: Path, size: int, *more: str) -> list[str]:
    """Overrides that name the results' folder and share the 12 packs among `size` ranks."""
    return [
        f"training.checkpoint_dir={folder}",
        f"training.gradient_accumulation_steps={PACKS_PER_STEP // size}",
        *more,
    ]


def train_all(rank: int, size: int, runs: Sequence[list[str]]) -> list[str | None]:
    """Train each run on this rank; return the message of the error that ended it, or None."""
    outcomes: list[str | None] = []
    for given in runs:
        try:
            Trainer(load_config(overrides=given), World(rank, rank, size, torch.device("cpu"))).fit()
            outcomes.append(None)
        except ConfigError as error:
            outcomes.append(str(error))
        dist.barrier()
    return outcomes


def cut_off(run: Path, copy: Path, step: int) -> Path:
    """Copy of a run as if it had been killed after saving `step`, with logs that went on for longer."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final_model")
    for folder in copy.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    assert (copy / f"step_{step}").is_dir()
    return copy


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def assert_same_run(run: Path, reference: Path) -> None:
    """Same packs, cells and counts; same losses, norms and weights up to the order of summation."""
    assert read_cells(run) == read_cells(reference)
    for ours, expected in zip(read_metrics(run), read_metrics(reference), strict=True):
        assert ours["step"] == expected["step"]
        for exact in ("cells", "tokens", "masked_tokens", "epoch", "learning_rate", "skipped_steps"):
            assert ours[exact] == expected[exact], exact
        for close in ("loss", "grad_norm", "validation_loss"):
            assert (close in ours) == (close in expected)
            assert ours.get(close, 0) == pytest.approx(expected.get(close, 0), rel=2e-5), (
                close,
                ours["step"],
            )
    weights = load_file(reference / "final_model/model.safetensors")
    for name, weight in load_file(run / "final_model/model.safetensors").items():
        # Softmax ignores the keys' bias: its gradient is rounding noise, which AdamW blows up.
        if name.endswith("self.key.bias"):
            continue
        assert_close(weight, weights[name], atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the corpora and `one`, the uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("training")
    write_parquet(folder / "held_out.parquet", make_cells(70, seed=1))
    assert train.run(load_config(overrides=long_run(folder, *into(folder / "one", 1)))) == 0
    return folder


def test_the_reference_run_is_a_hard_case(folder: Path) -> None:
    """It ends an epoch within a step, and its dropout matters."""
    records = read_cells(folder / "one")
    assert sorted(records) == list(range(STEPS * PACKS_PER_STEP))
    first = [cell for _, epoch, cells in records.values() if epoch == 0 for cell in cells]
    assert sorted(first) == list(range(NUM_CELLS))
    epochs_of_step = {step: set() for step in range(1, STEPS + 1)}
    for step, epoch, _ in records.values():
        epochs_of_step[step].add(epoch)
    assert {0, 1} in epochs_of_step.values()
    no_dropout = ["model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0"]
    shorter = ["training.num_train_steps=1", f"training.checkpoint_dir={folder / 'no_dropout'}"]
    train.run(load_config(overrides=long_run(folder, *into(folder, 1), *no_dropout, *shorter)))
    without, (with_dropout, *_) = read_metrics(folder / "no_dropout")[0], read_metrics(folder / "one")
    assert without["loss"] != pytest.approx(with_dropout["loss"], rel=1e-4)
    assert without["grad_norm"] != pytest.approx(with_dropout["grad_norm"], rel=1e-2)


def test_ranks_and_engines_give_the_same_run(folder: Path, tmp_path: Path, run_workers: RunWorkers) -> None:
    """1 process = 2 = 4 = FSDP2; and one run on 2 (DDP), 4 (FSDP2, 2 replicas), 1 (DDP), 3 (FSDP2) ranks in turn.

    Recomputing activations changes nothing.
    """
    fsdp2, recompute = "training.use_fsdp2=true", "training.recompute_every_n_layers=1"
    kept = "training.reshard_after_forward=false"
    runs = [into(tmp_path / "ddp_2", 2), into(tmp_path / "fsdp2_2", 2, fsdp2, recompute)]
    assert run_workers(train_all, 2, [long_run(folder, *run) for run in runs]) == [[None, None]] * 2
    for name in ("ddp_2", "fsdp2_2"):
        assert_same_run(tmp_path / name, folder / "one")
    assert list((tmp_path / "fsdp2_2/step_6").glob("rank_1.safetensors"))

    on_four = cut_off(tmp_path / "ddp_2", tmp_path / "on_four", 2)
    uneven = tmp_path / "uneven"
    train.run(tiny_config(folder, f"training.checkpoint_dir={uneven}", "training.gradient_accumulation_steps=6"))
    runs = [
        long_run(folder, *into(on_four, 4, fsdp2, "training.shard_group_size=2", kept)),
        long_run(folder, *into(tmp_path / "ddp_4", 4, recompute)),
        overrides(folder, f"training.checkpoint_dir={uneven}", "training.num_train_steps=4"),
        long_run(folder, *into(tmp_path / "groups_of_3", 4, fsdp2, "training.shard_group_size=3")),
    ]
    outcomes = run_workers(train_all, 4, runs)
    assert_same_run(tmp_path / "ddp_4", folder / "one")
    assert_same_run(on_four, folder / "one")
    for *fine, refused, no_groups in outcomes:
        assert fine == [None, None]
        assert "6 packs per step, which 4 processes cannot share evenly" in refused
        assert "Processes that can: 1, 2, 3, 6." in refused
        assert "training.shard_group_size=3 does not divide the 4 processes" in no_groups
        assert "1, 2, 4" in no_groups
    assert sorted(path.name for path in uneven.glob("step_*")) == ["step_2"]

    on_one = cut_off(on_four, tmp_path / "on_one", 4)
    assert train.run(load_config(overrides=long_run(folder, *into(on_one, 1)))) == 0
    assert_same_run(on_one, folder / "one")

    on_three = cut_off(on_one, tmp_path / "on_three", 4)
    # What the configuration says about accumulation gives way to the packs per step of the run.
    resumed = long_run(folder, *into(on_three, 2, fsdp2, kept))
    assert run_workers(train_all, 3, [resumed]) == [[None]] * 3
    assert_same_run(on_three, folder / "one")


def test_validation_loss_equals_an_independent_computation(folder: Path) -> None:
    """At the interval's steps; the mean over all masked tokens of the held-out cells, by stock BERT."""
    records = read_metrics(folder / "one")
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4, 6]
    model = transformers.BertForMaskedLM.from_pretrained(folder / "one/final_model").eval()
    rule = MaskRule(seed=VALIDATION_SEED, probability=0.15, vocab_size=101, num_special_tokens=2, mask_token_id=1)
    total, count = 0.0, 0
    for number, cell in enumerate(make_cells(70, seed=1)):
        masked, labels = map(torch.from_numpy, mask_cell(torch.tensor(cell[:32]).numpy(), number, 0, rule))
        with torch.no_grad():
            logits = model(masked[None]).logits[0]
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert count > 100
    assert records[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


# --- one process: bitwise ---------------------------------------------------------------------------------


def short_run(folder: Path, *more: str) -> list[str]:
    """9 steps of 2 packs; an epoch has about 10."""
    settings = (
        "training.num_train_steps=9",
        "training.gradient_accumulation_steps=2",
        "training.save_every_n_steps=2",
    )
    return overrides(folder, *DROPOUT, *settings, "training.log_cell_ids=true", *more)


def assert_bitwise_equal(run: Path, reference: Path, step: int) -> None:
    assert losses(run) == losses(reference)
    assert (run / "cells/rank_0.jsonl").read_bytes() == (reference / "cells/rank_0.jsonl").read_bytes()
    ours, expected = (read_checkpoint(path / f"step_{step}") for path in (run, reference))
    assert ours.keys() == expected.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    states = [json.loads((path / f"step_{step}/manifest.json").read_text())["state"] for path in (run, reference)]
    assert states[0] == states[1]
    exports = [(path / "final_model/model.safetensors").read_bytes() for path in (run, reference)]
    assert exports[0] == exports[1]


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGTERM to this process in the middle of the step after `step`."""
    original = TrainStep.run

    def run(self: TrainStep, batches: Iterator[Batch], done: int, *more: Any) -> PendingStep:
        if done == step and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, done, *more)

    sent: list[bool] = []
    monkeypatch.setattr(TrainStep, "run", run)


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_stopped_and_resumed_run_is_bitwise_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    asynchronous = f"training.async_save={async_save}"
    assert train.run(load_config(overrides=short_run(tmp_path, f"training.checkpoint_dir={whole}"))) == 0
    epochs = {record["epoch"] for record in read_metrics(whole)}
    assert len(epochs) > 1
    config = load_config(overrides=short_run(tmp_path, f"training.checkpoint_dir={parts}", asynchronous))
    stops = []
    for step in (0, 4):
        with monkeypatch.context() as patch:
            signal_after(patch, step)
            assert train.run(config) == 75
            stops.append(read_exit(parts))
            assert not (parts / "final_model").exists()
    # Ranks agree on a stop one step late, so that no step waits for it.
    assert stops == [{"reason": "signal", "exit_code": 75, "step": step} for step in (2, 6)]
    assert train.run(config) == 0
    assert read_exit(parts) == {"reason": "completed", "exit_code": 0, "step": 9}
    assert_bitwise_equal(parts, whole, 9)


def test_killed_run_is_bitwise_equal_and_its_logs_are_cut_back(tmp_path: Path) -> None:
    """A checkpoint counts every step up to its own, though reports lag behind by one."""
    whole = tmp_path / "whole"
    given = short_run(tmp_path, "training.keep_last_n=9")
    assert train.run(load_config(overrides=[*given, f"training.checkpoint_dir={whole}"])) == 0
    killed = cut_off(whole, tmp_path / "killed", 4)
    assert train.run(load_config(overrides=[*given, f"training.checkpoint_dir={killed}"])) == 0
    assert [record["step"] for record in read_metrics(killed)] == list(range(1, 10))
    assert_bitwise_equal(killed, whole, 9)
    progress = json.loads((whole / "step_9/manifest.json").read_text())["state"]["progress"]
    assert progress["tokens"] == sum(record["tokens"] for record in read_metrics(whole))
    packs = read_cells(whole)
    assert progress["cells"] == sum(len(cells) for _, _, cells in packs.values())
    assert progress["next_pack"] == len(packs)
    # Earlier epochs need not be planned again to go on.
    of_epoch = [pack for pack, (_, epoch, _) in packs.items() if epoch == progress["epoch"]]
    assert 0 < progress["epoch_first_pack"] == min(of_epoch)


def test_garbage_collection_leaves_out_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects built and compiled by the first step, half a million, are never walked through again during training."""
    frozen = []
    original = TrainStep.run

    def run(self: TrainStep, batches: Iterator[Batch], step: int, *more: Any) -> PendingStep:
        frozen.append(gc.get_freeze_count() > 100_000)
        return original(self, batches, step, *more)

    monkeypatch.setattr(TrainStep, "run", run)
    assert train.run(tiny_config(tmp_path, "training.num_train_steps=3")) == 0
    assert frozen == [False, True, True]
    assert gc.get_freeze_count() == 0


def test_metrics_hold_what_the_contract_names(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "training.num_train_steps=5", "training.log_every_n_steps=2")
    assert train.run(config) == 0
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [2, 4, 5]
    for record in records:
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "cells", "masked_tokens"):
            assert record[name] > 0, name
        assert "validation_seconds" not in record


# --- padded reference path --------------------------------------------------------------------------------


def test_padded_and_packed_batches_give_the_same_loss_and_gradients(tmp_path: Path) -> None:
    no_dropout = ("model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0")
    with distributed_world() as world:
        packed = Trainer(tiny_config(tmp_path, *no_dropout), world)
        padded = Trainer(tiny_config(tmp_path, *no_dropout, "data.packing=false"), world)
        for pack in range(3):
            epoch, cells = packed.stream.locate(pack)
            results = []
            for trainer in (packed, padded):
                batch = trainer.data.builder().build(pack, epoch, cells)
                trainer.engine.model.zero_grad()
                loss_sum, masked = trainer.step.forward(batch)
                loss_sum.backward()
                gradients = {name: p.grad for name, p in trainer.engine.model.named_parameters()}
                results.append((loss_sum.detach(), masked, batch.num_masked, gradients))
            assert results[0][1] == results[1][1] == results[0][2] == results[1][2] > 0
            assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
        for trainer in (packed, padded):
            trainer.logs.close()


def test_padded_run_trains(tmp_path: Path) -> None:
    """Also where no token of a micro-batch is masked at all."""
    sparse = ("training.mlm_probability=0.01", "training.num_train_steps=20", "data.packing=false")
    assert train.run(tiny_config(tmp_path, *sparse)) == 0
    records = read_metrics(tmp_path / "run")
    assert min(record["masked_tokens"] for record in records) == 0
    assert records[-1]["skipped_steps"] == 0
