"""What runs leave behind, read without the code under test where that is possible."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from geneformer_pretrain.checkpoint.manifest import file_checksum
from tests.checkpoints import read_checkpoint
from tests.tiny import read_metrics

ENGINES = {"DDP": "training.use_fsdp2=false", "FSDP2": "training.use_fsdp2=true"}

SAVE_EVERY = 3

ENDLESS = (
    "training.num_train_steps=100000",
    f"training.save_every_n_steps={SAVE_EVERY}",
    "training.keep_last_n=2",
    "training.gradient_accumulation_steps=2",
    "training.lr_schedule=constant",
    "training.log_cell_ids=true",
    "model.hidden_dropout_prob=0.1",
    "model.attention_probs_dropout_prob=0.1",
    "model.initializer_range=0.2",
)
"""A run with dropout and accumulation that saves often; an epoch has about 12 packs, a step on 2 ranks 4."""


def steps_saved(run: Path) -> list[int]:
    """Steps of the committed checkpoints, newest first."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in run.glob("step_*"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def steps_good(run: Path) -> list[int]:
    """Steps of the checkpoints whose files are all what their manifest says, newest first."""
    good = []
    for step in steps_saved(run):
        folder = run / f"step_{step}"
        files = json.loads((folder / "manifest.json").read_text())["files"]
        if all((folder / name).exists() and file_checksum(folder / name) == entry for name, entry in files.items()):
            good.append(step)
    return good


def steps_done(run: Path) -> int:
    """Last step in metrics.jsonl, whose last line may be torn."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def has_step(run: Path, step: int) -> Callable[[], bool]:
    """Say whether `step` is in metrics.jsonl, when asked."""
    return lambda: steps_done(run) >= step


def saved_after(run: Path, step: int) -> Callable[[], bool]:
    """Say whether there is a checkpoint newer than `step`, when asked."""
    return lambda: max(steps_saved(run), default=0) > step


def resumed_from(output: str) -> int | None:
    """Step that a run says it resumed from, if it does."""
    found = re.search(r"Resumed from \S+/step_(\d+): \1 steps done", output)
    return int(found[1]) if found else None


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same, bit by bit."""
    ours, theirs = read_checkpoint(first), read_checkpoint(second)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def reported(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without timings and without the mark of a start."""
    timed = re.compile("(.*_)?seconds|tokens_per_second|mfu|includes_start")
    return [{k: v for k, v in record.items() if not timed.fullmatch(k)} for record in read_metrics(run)]


def assert_bitwise_equal(run: Path, whole: Path) -> None:
    """Same log of losses, same cells, same weights and optimizer state, same export."""
    assert reported(run) == reported(whole)
    logs = sorted(path.name for path in (whole / "cells").iterdir())
    assert logs == sorted(path.name for path in (run / "cells").iterdir())
    for name in logs:
        assert (run / "cells" / name).read_bytes() == (whole / "cells" / name).read_bytes(), name
    last = f"step_{reported(whole)[-1]['step']}"
    assert same_tensors(run / last, whole / last)
    model = "final_model/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
