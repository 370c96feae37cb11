"""One run at a time in a checkpoint folder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import CheckpointError
from geneformer_pretrain.run.signals import write_exit
from geneformer_pretrain.run.writing import not_of_a_run, writing_to

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"

EXIT_FILE, EARLIER_EXIT_FILE = "exit.json", ".earlier_exit.json"
"""What the last start ended with; out of sight while there is another one, which may still move it aside."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a checkpoint folder for this run; collective.

    Two runs in one folder would overwrite each other's checkpoints.

    Raises
    ------
    CheckpointError
        On every rank, if another run holds it, naming that run's host and process, if it cannot be written to, or if
        its exit.json is that of something else.
    """

    def start() -> None:
        try:
            stack.enter_context(_start_in(folder))
        except OSError as error:
            raise CheckpointError(str(error)) from error

    with ExitStack() as stack:
        Ranks(timedelta(minutes=10)).on_first(start, CheckpointError)
        yield


@contextmanager
def telling_of_failed_start(checkpoint_dir: str | None) -> Iterator[None]:
    """Replace exit.json of an earlier run by what keeps this one from holding the folder; rank 0 alone does it.

    Nothing is written into a folder that another run holds or may hold, that is not there yet, or of no name.
    """
    try:
        yield
    except Exception as error:
        folder = Path(checkpoint_dir or "").expanduser()
        with suppress(CheckpointError, OSError):
            if checkpoint_dir and os.environ.get("RANK", "0") == "0" and is_used(folder):
                with _start_in(folder, needs_lock=True):
                    write_exit(folder, "error", 1, rank=0, error=f"{type(error).__name__}: {error}")
        raise


@contextmanager
def _start_in(folder: Path, needs_lock: bool = False) -> Iterator[None]:
    """Lock a folder, and take away what an earlier run left to say.

    What counts is the system's lock on the file, not the file. It ends with the process, even by SIGKILL, and
    other nodes respect it where the file system has such locks (NFS, GPFS, Lustre mounted with `flock`). Elsewhere
    there is a warning, or with `needs_lock` an OSError.
    The folder is made if need be, and removed if nothing was put into it.
    """
    path = folder / LOCK_FILE
    with writing_to(folder, "training.checkpoint_dir"):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path, needs_lock)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with writing_to(folder, "training.checkpoint_dir"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            (folder / EARLIER_EXIT_FILE).unlink(missing_ok=True)  # of a start that was killed
            with suppress(FileNotFoundError):
                content = (folder / EXIT_FILE).read_bytes()
                if content and not content.startswith(b'{"reason"'):
                    raise CheckpointError(not_of_a_run(folder / EXIT_FILE))
                (folder / EXIT_FILE).replace(folder / EARLIER_EXIT_FILE)
        yield
    finally:
        try:
            (folder / EARLIER_EXIT_FILE).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
        except OSError as error:  # It must not take the place of the error that ends the run.
            log.error("cannot remove %s: %s", path, error)
        os.close(descriptor)


def is_used(folder: Path) -> bool:
    """Whether a folder holds anything but the lock."""
    try:
        return any(entry.name != LOCK_FILE for entry in folder.iterdir())
    except FileNotFoundError:
        return False


def _open_locked(path: Path, needs_lock: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        is_held = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if not is_held and needs_lock:
                os.close(descriptor)
                raise
            if not is_held:
                log.warning(
                    "no locks on this file system (%s): take care to start only one run in %s", error, path.parent
                )
        if is_held:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise CheckpointError(_describe(path.parent, holder))
        # The holder before may have removed the file after it was opened here; then others lock a new one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _describe(folder: Path, holder: bytes) -> str:
    who = "another process"
    if holder:  # It is empty for an instant after locking.
        entry = json.loads(holder)
        who = f"process {entry['pid']} on {entry['host']}, since {entry['since']}"
    return f"{folder} is in use by {who}. End that run first, or give this one another training.checkpoint_dir."
