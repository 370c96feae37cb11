"""Promises 5, 6 and 14: checkpoints that are not what was written, or that are an attack."""

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import forge_manifest
from tests.faults.results import ENGINES, assert_bitwise_equal, reported, resumed_from, steps_good, steps_saved
from tests.tiny import overrides, read_exit

STEPS = (
    "training.num_train_steps=9",
    "training.save_every_n_steps=3",
    "training.gradient_accumulation_steps=2",
    "training.log_cell_ids=true",
)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, random.randrange(file.stat().st_size))


def zero_the_tail(file: Path) -> None:
    content = file.read_bytes()
    keep = random.randrange(len(content.rstrip(b"\0")))
    file.write_bytes(content[:keep] + bytes(len(content) - keep))


DAMAGES = {"bit flip": flip_a_bit, "truncation": truncate, "zeroed tail": zero_the_tail, "missing file": Path.unlink}


@pytest.fixture(params=ENGINES)
def base(request: pytest.FixtureRequest, tmp_path: Path, start: Any) -> tuple[list[str], Path]:
    """Overrides and folder of a complete run on 2 ranks, with checkpoints of steps 3, 6 and 9."""
    given = overrides(tmp_path, *STEPS, ENGINES[request.param])
    start(given, 2).complete()
    return given, tmp_path / "run"


def copy_of(run: Path, name: str) -> tuple[Path, str]:
    """Copy a run without its export; return the folder and the override that names it."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final_model")
    return copy, f"training.checkpoint_dir={copy}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "full"])
def test_damage_leads_back_to_the_newest_good_checkpoint(
    base: tuple[list[str], Path], start: Any, tally: Any, full: bool
) -> None:
    """Any damage to any file of the newest: found, said loudly, and the run ends as if nothing had been."""
    given, run = base
    files = sorted((run / "step_9").iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    cases = [(file.name, damage) for file in files for damage in DAMAGES]
    for number, (file, damage) in enumerate(cases * 3 if full else cases[:1]):
        row = tally(5, f"{damage} in the newest checkpoint")
        copy, here = copy_of(run, f"copy{number}")
        DAMAGES[damage](copy / "step_9" / file)
        row.injected += 1
        process = start([*given, here], 2)
        process.complete()
        output = process.output()
        assert f"ERROR checkpoint {copy}/step_9 is damaged and will not be used: " in output
        assert f"ERROR going back to the older checkpoint {copy}/step_6, which is good" in output
        assert resumed_from(output) == 6
        assert_bitwise_equal(copy, run)
        assert steps_good(copy) == [9, 6, 3]
        row.survived += 1
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "damages", [["bit flip"], pytest.param(list(DAMAGES), marks=pytest.mark.slow)], ids=["short", "full"]
)
def test_no_good_checkpoint_is_an_error(
    base: tuple[list[str], Path], start: Any, tally: Any, damages: list[str]
) -> None:
    """The run does not start at step 0, and leaves everything as it found it."""
    given, run = base
    row = tally(6, "every checkpoint damaged")
    for damage in damages:
        copy, here = copy_of(run, damage.replace(" ", "-"))
        for step in steps_saved(copy):
            folder = copy / f"step_{step}"
            DAMAGES[damage](random.choice(sorted(folder.iterdir())))
        row.injected += 1
        process = start([*given, here], 2)
        assert process.wait() == [1, 1]
        assert "Error: none of the checkpoints is good. " in process.output()
        assert "Traceback" not in process.output()
        assert not process.output(1)
        assert "none of the checkpoints is good" in read_exit(copy)["error"]
        assert reported(copy) == reported(run)
        assert steps_saved(copy) == [9, 6, 3]
        row.survived += 1


# --- malice -----------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def pickle_to(file: Path, bomb: Bomb) -> None:
    file.write_bytes(pickle.dumps(bomb))


def hide_in(file: Path, bomb: Bomb) -> None:
    """Add the bomb to what the file holds."""
    if file.name == ".metadata":
        metadata = pickle.loads(file.read_bytes())
        metadata.planner_data = bomb
        file.write_bytes(pickle.dumps(metadata))
    elif file.suffix == ".pt":
        torch.save({**torch.load(file), "more": bomb}, file)
    else:  # A shard: every tensor is said to lie where the bomb does.
        torch.save(bomb, file)
        index = file.with_name(".metadata")
        metadata = pickle.loads(index.read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = file.name, 0, file.stat().st_size
        index.write_bytes(pickle.dumps(metadata))


OLD = Path(__file__).parents[1] / "data/checkpoints_0_1"

PICKLES = [("ddp", "checkpoint.pt"), ("fsdp2", ".metadata"), ("fsdp2", "__0_0.distcp"), ("fsdp2", "__1_0.distcp")]
"""Every file that is read by pickle: those of release 0.1. New checkpoints have none."""


@pytest.mark.parametrize(
    ("attacks", "pickles"),
    [([hide_in], PICKLES[:2]), pytest.param([pickle_to, hide_in], PICKLES, marks=pytest.mark.slow)],
)
def test_malicious_pickles_are_not_executed(
    tmp_path: Path,
    start: Any,
    tally: Any,
    attacks: list[Callable[[Path, Bomb], None]],
    pickles: list[tuple[str, str]],
) -> None:
    """In every file that is read by pickle, with a manifest that agrees."""
    settings = json.loads((OLD / "golden.json").read_text())["overrides"]
    shutil.copyfile(OLD / "cells.parquet", tmp_path / "cells.parquet")
    number = 0
    for engine, file in pickles:
        for attack in attacks:
            number += 1
            row = tally(14, f"pickle that runs code, in {file}")
            run = tmp_path / f"run{number}"
            shutil.copytree(OLD / engine, run)
            bomb = Bomb(tmp_path / f"executed{number}")
            attack(run / "step_3" / file, bomb)
            forge_manifest(run / "step_3")
            row.injected += 1
            process = start(overrides(tmp_path, *settings, f"training.checkpoint_dir={run}"), 2)
            assert process.wait() == [1, 1]
            refusal = "^Error: .*(refused to unpickle posix.mkdir|is damaged or no checkpoint)"
            assert re.search(refusal, process.output(), re.MULTILINE)
            assert not bomb.folder.exists()
            assert steps_saved(run) == [3]
            row.survived += 1
    pickle.loads(pickle.dumps(bomb))
    assert bomb.folder.exists(), "the bomb does not work, so this test shows nothing"
