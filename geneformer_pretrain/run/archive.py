"""Moves the files of an earlier run out of the way of a new one."""

import re
import time
from contextlib import suppress
from pathlib import Path

from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.run.folder import EXIT_FILE, foreign
from geneformer_pretrain.run.record import CONFIG_FILE, OLD_CONFIG_PREFIX, is_record

_WRITTEN = re.compile(
    r"step_\d+(\.(tmp|replaced|trash))?|(final|best)_model(\.(tmp|replaced))?|metrics\.jsonl(\.tmp)?|wandb|tensorboard|"
    rf"wandb_id\.txt|training_curves\.png(\.tmp)?|{OLD_CONFIG_PREFIX}\d+\.yaml|{re.escape(CONFIG_FILE)}"
)
_OF_RANKS = {"cells": re.compile(r"rank_\d+\.jsonl(\.tmp)?"), "hang": re.compile(r"rank_\d+\.txt")}


def require_no_other_use(folder: Path) -> None:
    """Check that a folder without checkpoints is not of something else, before anything in it is touched.

    Raises
    ------
    ConfigError
        It has a config.yaml that no run wrote.
    """
    path = folder / CONFIG_FILE
    if path.exists() and not is_record(path) and not any(folder.glob("step_*")):
        raise ConfigError(foreign(path))


def has_results(folder: Path) -> bool:
    """True if the folder holds an export or a log of steps."""
    log = folder / "metrics.jsonl"
    return (folder / "final_model").exists() or (log.is_file() and log.stat().st_size > 0)


def archive_run(directory: str | Path, earlier_exit: bytes | None = None) -> Path | None:
    """Move the files of a run into `previous-TIME` inside its folder; called on one rank, deletes nothing.

    Other files in the folder stay where they are.

    Parameters
    ----------
    directory
        The run's folder.
    earlier_exit
        Content of the run's exit.json, which has been removed already.

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
        entry.rename(target)
    if earlier_exit is not None:
        (previous / EXIT_FILE).write_bytes(earlier_exit)
    for name in _OF_RANKS:
        with suppress(OSError):  # It is not there, or has files of others.
            (directory / name).rmdir()
    return previous
