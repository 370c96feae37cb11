"""The folder of a run: one run at a time in it, and exit.json with the reason of the end."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import CheckpointError, TrainingError, name_error
from geneformer_pretrain.files import naming, open_lock, writing_to

log = logging.getLogger(__name__)

LOCK_FILE, EXIT_FILE = ".lock", "exit.json"
KEY = "training.checkpoint_dir"

T = TypeVar("T")


@contextmanager
def lock_run_folder(folder: Path, ranks: Ranks) -> Iterator[bytes | None]:
    """Hold a checkpoint folder for this run; collective.

    Two runs in one folder would overwrite each other's checkpoints.

    Returns
    -------
    bytes or None
        exit.json of the previous start, on rank 0; the file is gone from now on.

    Raises
    ------
    CheckpointError
        On every rank, if another run holds the folder, naming that run's host and process, if it cannot be written
        to, or if its exit.json is not of a run.
    """
    with ExitStack() as stack:
        yield ranks.run_on_rank0(lambda: stack.enter_context(_locked(folder)), CheckpointError)


@contextmanager
def _locked(folder: Path, require: bool = False) -> Iterator[bytes | None]:
    """Lock a folder, which is created if need be, and removed at the end if nothing was put into it.

    The system's lock on the file counts, not the file. It ends with the process, even by SIGKILL, and other nodes
    respect it where the file system has such locks (NFS, GPFS, Lustre mounted with `flock`).
    """
    path = folder / LOCK_FILE
    with writing_to(folder, KEY):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_lock(path, wait=False, require=require)
        except BlockingIOError:
            raise CheckpointError(_in_use(folder)) from None
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with writing_to(folder, KEY), naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield _remove_exit(folder)
    finally:
        try:
            path.unlink(missing_ok=True)
            if created and not any(folder.iterdir()):
                folder.rmdir()
        except OSError as error:  # It must not replace the error that ends the run.
            log.error("cannot remove %s: %s", path, error)
        os.close(descriptor)


def _remove_exit(folder: Path) -> bytes | None:
    path = folder / EXIT_FILE
    with writing_to(folder, KEY):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if content and not content.startswith(b'{"reason"'):
            raise CheckpointError(foreign(path))
        path.unlink()
    return content


def _in_use(folder: Path) -> str:
    who = "another process"
    with suppress(OSError, ValueError, KeyError):  # It is empty for an instant after locking.
        entry = json.loads((folder / LOCK_FILE).read_bytes())
        who = f"process {entry['pid']} on {entry['host']}, since {entry['since']}"
    return f"{folder} is in use by {who}. End that run first, or give this one another {KEY}."


class FolderWriter:
    """Runs actions that write to the folder of a run, so that all ranks stop if any cannot write; collective.

    Parameters
    ----------
    folder
        Of the run.
    ranks
        All of them.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks

    def write(self, action: Callable[[], T], *, on_all_ranks: bool = False) -> T:
        """Run an action on rank 0 or on all, and return its result on rank 0.

        Raises
        ------
        TrainingError
            On every rank, if any of them cannot write, with its reason.
        """

        def attempt() -> T | None:
            if not (on_all_ranks or self.ranks.rank == 0):
                return None
            with writing_to(self.folder, KEY):
                return action()

        return cast(T, self.ranks.run_on_all_ranks(attempt, TrainingError)[0])


def foreign(file: Path) -> str:
    """Write the error for someone else's file under a name that a run writes to."""
    return (
        f"{KEY}: {file} is not of a run, and would be overwritten: name a folder for this run alone, or move the file "
        "away."
    )


def is_not_empty(folder: Path) -> bool:
    """True if a folder holds anything but the lock."""
    try:
        return any(entry.name != LOCK_FILE for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def write_exit(folder: Path, reason: str, exit_code: int, **details: Any) -> None:
    """Write exit.json: torchrun returns 1 whatever its workers return, so scripts read this instead.

    The first rank to write it is right: an error on one rank soon breaks the connections of all others. A failure to
    write is logged and raises nothing.
    """
    path = folder / EXIT_FILE
    try:
        with path.open("x") as file:
            file.write(json.dumps({"reason": reason, "exit_code": exit_code, **details}) + "\n")
    except FileExistsError:
        return
    except OSError as error:  # It must not replace the error that it was to record.
        log.error("cannot write %s: %s", path, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)


def write_failed_start(folder: Path, error: BaseException) -> None:
    """Replace exit.json of an earlier run in the folder by the error that keeps a new run from starting.

    A job script would take the earlier one for the outcome. Nothing is written into an empty folder, nor into one that
    another run holds or may hold.
    """
    if os.environ.get("RANK", "0") != "0" or not is_not_empty(folder):
        return
    with suppress(CheckpointError, OSError), _locked(folder, require=True):
        write_exit(folder, "error", 1, rank=0, error=name_error(error))
