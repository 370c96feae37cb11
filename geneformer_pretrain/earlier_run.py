"""What an earlier run left in a checkpoint folder, and how it makes room."""

import json
import re
import time
from pathlib import Path

from .run_lock import EARLIER_EXIT_FILE, EXIT_FILE
from .run_record import KEPT, RECORD, is_record

_WRITTEN = re.compile(
    r"step_\d+(\.(tmp|old|trash))?|final_model(\.(tmp|old))?|metrics\.jsonl(\.tmp)?|wandb|"
    + "|".join(map(re.escape, (EXIT_FILE, EARLIER_EXIT_FILE)))
)
_RECORD = re.compile(rf"{re.escape(RECORD)}|{KEPT}\d+\.yaml")
_OF_RANKS = {"cells": re.compile(r"rank_\d+\.jsonl(\.tmp)?"), "hang": re.compile(r"rank_\d+\.txt")}


def has_results(folder: Path, save_every_n_steps: int) -> bool:
    """Whether a run in this folder got to its end, or so far that there should be a checkpoint."""
    if (folder / "final_model").exists():
        return True
    try:
        *_, last, _torn = (folder / "metrics.jsonl").read_bytes().split(b"\n")
        return 0 < save_every_n_steps < int(json.loads(last)["step"])
    except (OSError, ValueError, TypeError, KeyError):  # None, or one that `cut_back` will complain about.
        return False


def move_aside(directory: str | Path) -> Path | None:
    """Move what a run wrote in a folder into `previous-TIME` inside it; called on one rank, deletes nothing.

    What else lies there is someone's own, and stays where it is.

    Returns
    -------
    Path or None
        The new folder, or None if there was nothing to move.
    """
    directory = Path(directory)
    entries = [entry for entry in directory.iterdir() if _is_of_a_run(entry)] if directory.is_dir() else []
    if not entries:
        return None
    base = directory / f"previous-{time.strftime('%Y%m%dT%H%M%S')}"
    previous, attempt = base, 1
    while previous.exists():
        attempt += 1
        previous = base.with_name(f"{base.name}-{attempt}")
    previous.mkdir()
    for entry in entries:
        entry.rename(previous / (EXIT_FILE if entry.name == EARLIER_EXIT_FILE else entry.name))
    return previous


def _is_of_a_run(entry: Path) -> bool:
    if _RECORD.fullmatch(entry.name):
        return is_record(entry)
    if entry.name in _OF_RANKS and entry.is_dir():
        return all(_OF_RANKS[entry.name].fullmatch(file.name) for file in entry.iterdir())
    return _WRITTEN.fullmatch(entry.name) is not None
