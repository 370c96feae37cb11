"""Promises 2, 3, 4, 10 and 13: runs that are stopped by signals and go on, elsewhere or with other data."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_training import assert_same_run
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
from tests.tiny import make_cells, overrides, read_cells, read_exit, write_parquet

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stops", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_stopped_by_a_signal_and_resumed(tmp_path: Path, start: Any, tally: Any, engine: str, stops: int) -> None:
    """To one random rank, at a random moment; in the end nothing differs from a run left alone."""
    stopping, resuming = tally(10, f"signal to one rank of two, {engine}"), tally(2, f"stop and resume, {engine}")
    choose = random.Random(stops)
    given, run = overrides(tmp_path, *ENDLESS, ENGINES[engine]), tmp_path / "run"
    saved = None
    for number in range(stops):
        process = start(given, 2)
        process.wait_for_training()
        wanted = (saved or 0) + choose.randint(1, 2 * SAVE_EVERY)
        process.wait_until(has_step(run, wanted), f"step {wanted}")
        process.send(choose.randrange(2), SIGNALS[number % 3])
        stopping.injected += 1
        assert process.wait(timeout=25) == [75, 75]
        assert resumed_from(process.output()) == saved
        saved = steps_good(run)[0]
        assert read_exit(run) == {"reason": "signal", "exit_code": 75, "step": saved}
        assert steps_done(run) == saved
        stopping.survived += 1

    resuming.injected += stops
    end = f"training.num_train_steps={(saved or 0) + 4}"
    start([*given, end], 2).complete()
    start([*given, end, f"training.checkpoint_dir={tmp_path / 'whole'}"], 2).complete()
    assert_bitwise_equal(run, tmp_path / "whole")
    assert {epoch for _, epoch, _ in read_cells(run).values()} > {0}
    resuming.survived += stops


WORLDS = ((2, "DDP"), (4, "FSDP2"), (1, "DDP"), (3, "FSDP2"), (2, "FSDP2"), (6, "DDP"), (1, "FSDP2"), (2, "DDP"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_other_numbers_of_ranks_and_engines(tmp_path: Path, start: Any, tally: Any) -> None:
    """12 packs in each step whoever shares them; every checkpoint is taken in mid-epoch."""
    sizes, engines = tally(3, "resume on another number of ranks"), tally(4, "resume with another engine")
    refusals = tally(3, "resume on a number of ranks that does not divide the packs")
    held_out = write_parquet(tmp_path / "held_out.parquet", make_cells(20, seed=1))
    settings = (f"data.validation_path={held_out}", "training.learning_rate=1e-3")
    given, run = overrides(tmp_path, *ENDLESS, *settings, num_cells=300), tmp_path / "run"
    earlier = WORLDS[0]
    for number, (size, engine) in enumerate(WORLDS, 1):
        end = f"training.num_train_steps={2 * number}"
        process = start([*given, ENGINES[engine], end, f"training.gradient_accumulation_steps={12 // size}"], size)
        sizes.injected += size != earlier[0]
        engines.injected += engine != earlier[1]
        process.complete(120)
        assert resumed_from(process.output()) == (2 * number - 2 or None)
        sizes.survived += size != earlier[0]
        engines.survived += engine != earlier[1]
        earlier = size, engine
    whole = [*given, f"training.checkpoint_dir={tmp_path / 'whole'}", "training.gradient_accumulation_steps=12"]
    for number in range(1, len(WORLDS) + 1):  # each of them validated at its end
        start([*whole, f"training.num_train_steps={2 * number}"], 1).complete(120)
    assert_same_run(run, tmp_path / "whole")

    refusals.injected += 1
    refused = start([*given, "training.num_train_steps=100"], 5)
    assert refused.wait() == [1] * 5
    assert "cannot share evenly" in refused.output()
    assert "Processes that can: 1, 2, 3, 4, 6, 12." in refused.output()
    assert "Accumulation follows" not in refused.output()
    assert steps_saved(run)[0] == 2 * len(WORLDS)
    refusals.survived += 1


CHANGES = {
    "seed": ("training.seed=1", "seed: 0 in the checkpoint, 1 now"),
    "token budget": ("model.micro_batch_size=8", "micro_batch_size: 4 in the checkpoint, 8 now"),
    "mlm_probability": ("training.mlm_probability=0.3", "mlm_probability: 0.15 in the checkpoint, 0.3 now"),
    "corpus": ("data.path={folder}/other.parquet", "corpus: "),
    "vocabulary": ("data.vocab_path={folder}/vocab.txt", "vocabulary: None in the checkpoint"),
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=() if name == "seed" else pytest.mark.slow) for name in CHANGES]
)
def test_changed_data_are_refused(tmp_path: Path, start: Any, tally: Any, change: str) -> None:
    """The difference is shown, once; an explicit override goes on at the start of an epoch."""
    row = tally(13, f"other {change}")
    write_parquet(tmp_path / "other.parquet", make_cells(60, seed=5))
    genes = [f"gene_{i}" for i in range(2, 101)]
    (tmp_path / "vocab.txt").write_text("\n".join(["<pad>", "<mask>", *genes]) + "\n")
    given, run = overrides(tmp_path, "training.log_cell_ids=true"), tmp_path / "run"
    start(given, 2).complete()
    override, shown = CHANGES[change]
    changed = [*given, override.format(folder=tmp_path), "training.num_train_steps=4"]
    row.injected += 1
    refused = start(changed, 2)
    assert refused.wait() == [1, 1]
    assert shown in refused.output()
    assert not refused.output(1)
    assert steps_done(run) == 2
    start([*changed, "training.accept_changed_data=true"], 2).complete()
    assert steps_good(run)[0] == 4
    assert [epoch for _, epoch, _ in read_cells(run).values()] == [0] * 4 + [1] * 4
    progress = json.loads((run / "step_4/manifest.json").read_text())["state"]["progress"]
    assert progress["epoch_first_pack"] == 4
    row.survived += 1
