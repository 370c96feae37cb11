"""What an earlier run left in a checkpoint folder, and how it makes room."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path

from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.run.folder import EARLIER_EXIT_FILE, EXIT_FILE
from geneformer_pretrain.run.record import KEPT, RECORD, is_record
from geneformer_pretrain.run.writing import not_of_a_run

_WRITTEN = re.compile(
    rf"step_\d+(\.(tmp|replaced|trash))?|final_model(\.(tmp|replaced))?|metrics\.jsonl(\.tmp)?|{KEPT}\d+\.yaml|wandb|"
    + "|".join(map(re.escape, (RECORD, EXIT_FILE, EARLIER_EXIT_FILE)))
)
_OF_RANKS = {"cells": re.compile(r"rank_\d+\.jsonl(\.tmp)?"), "hang": re.compile(r"rank_\d+\.txt")}


def require_no_other_use(folder: Path) -> None:
    """Check that a folder without checkpoints is not that of something else, before anything in it is touched.

    Raises
    ------
    ConfigError
        It has a config.yaml that no run wrote.
    """
    path = folder / RECORD
    if path.exists() and not is_record(path) and not any(folder.glob("step_*")):
        raise ConfigError(not_of_a_run(path))


def has_results(folder: Path, save_every_n_steps: int) -> bool:
    """Whether a run in this folder got to its end, or so far that there should be a checkpoint; or whose log it has."""
    if (folder / "final_model").exists():
        return True
    try:
        lines = (folder / "metrics.jsonl").read_bytes()
        if lines and not is_record(folder / RECORD):
            return True
        *_, last, _torn = lines.split(b"\n")
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
    entries = [entry for entry in directory.glob("*") if _WRITTEN.fullmatch(entry.name)]
    for name, pattern in _OF_RANKS.items():
        entries += [entry for entry in directory.glob(f"{name}/*") if pattern.fullmatch(entry.name)]
    if not entries:
        return None
    base = directory / f"previous-{time.strftime('%Y%m%dT%H%M%S')}"
    previous, attempt = base, 1
    while previous.exists():
        attempt += 1
        previous = base.with_name(f"{base.name}-{attempt}")
    previous.mkdir()
    for entry in entries:
        target = previous / entry.relative_to(directory)
        target.parent.mkdir(exist_ok=True)
        entry.rename(target.with_name(EXIT_FILE) if entry.name == EARLIER_EXIT_FILE else target)
    for name in _OF_RANKS:
        with suppress(OSError):  # It is not there, or has files of others.
            (directory / name).rmdir()
    return previous
