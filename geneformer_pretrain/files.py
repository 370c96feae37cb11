"""Files and folders that are either complete or absent, and locks that work on any file system."""

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from .errors import OutputError

log = logging.getLogger(__name__)

UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that lack an operation."""

NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)
"""Errors of file systems that have no locks."""


def sync_file(file: IO[Any]) -> None:
    """Bring everything written to `file` so far onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk: a new file or a rename is not safe before.

    Some network and FUSE file systems refuse it for folders; there nothing more can be done.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *UNSUPPORTED):
            raise
    finally:
        os.close(descriptor)


def delete_folder(folder: Path) -> None:
    """Delete a folder; of a link to one, only the link.

    Raises
    ------
    OSError
        Naming the folder, where that of `shutil.rmtree` may name only a file inside.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def share_with_folder(path: Path) -> None:
    """Let those read and write a new file or folder who may do so with the folder it lies in, whatever the umask."""
    parent = os.stat(path.parent).st_mode
    if parent & stat.S_ISVTX:  # such as /tmp, where each user's files are their own
        return
    own = 0o700 if path.is_dir() else 0o600
    with suppress(PermissionError):  # another user made it a moment ago
        path.chmod(own | (parent & (0o2077 if path.is_dir() else 0o066)))


def make_shared_folder(folder: Path, base: Path) -> None:
    """Make a folder below `base`; what is new between them is open to those who may use `base`."""
    base.mkdir(parents=True, exist_ok=True)
    missing = [path for path in (folder, *folder.parents) if path.is_relative_to(base) and not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        share_with_folder(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced and renamed to `path`, else it is removed.

    Parameters
    ----------
    path
        A file, new or old.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_new(path: Path, *, overwrite: bool, what: str = "output") -> None:
    """Refuse an output that exists, unless it may be overwritten, or that cannot be made: before hours of work.

    Raises
    ------
    OutputError
        Naming the path and the option.
    """
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: this {what} exists already; name another one or add --overwrite.")
    require_room_beside(path)


def require_new_folder(path: Path, *, overwrite: bool, own: Sequence[str] = (), what: str = "output") -> None:
    """Refuse a folder as `require_new` does, one in the place of a file, and one that holds anything else.

    Parameters
    ----------
    own
        Names that the command gives to what it writes, as patterns; the first is always there. A folder with other
        files is not overwritten.
    """
    require_new(path, overwrite=overwrite, what=what)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; name a folder.")
    names = sorted(entry.name for entry in path.iterdir()) if own and path.exists() else []
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if foreign or (names and own[0] not in names):
        raise OutputError(
            f"{path}: not overwritten, for it is no earlier output of this command (it holds "
            f"{(foreign or names)[0]}); name another output, or delete it yourself."
        )


def require_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output folder that holds an input of its own, which `--overwrite` would delete.

    Raises
    ------
    OutputError
        Naming both.
    """
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            held = "is read itself" if path.resolve() == output.resolve() else f"holds {path}, which is read"
            raise OutputError(f"{output}: {held}; name another output.")


def require_room_beside(path: Path) -> None:
    """Make sure, by trying, that a file or folder can be made, its parents included where they are missing.

    Raises
    ------
    OutputError
        Naming the path, and the folder that cannot be written to.
    """
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: {folder} cannot be written to ({error.strerror}); name another place, or make that one writable."
        ) from error


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it is renamed to `path`, else it is removed.

    An existing folder is replaced only with `overwrite`, and only once the new one is complete.

    Raises
    ------
    OutputError
        If `path` exists and may not be overwritten, or another process makes it.
    """
    require_new_folder(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".replaced")
    lock = temporary / ".lock"
    try:
        if temporary.is_dir():  # left by a process that was killed, or in the hands of one that is not
            descriptor = open_lock(lock, wait=False)
            try:
                delete_folder(temporary)
            finally:
                os.close(descriptor)
        temporary.mkdir()
        descriptor = open_lock(lock, wait=False)
    except (BlockingIOError, FileExistsError) as error:
        raise OutputError(f"{path}: another process makes it; wait for it, or name another output.") from error
    try:
        with suppress(FileNotFoundError):
            delete_folder(replaced)  # left by a process that was killed
        yield temporary
        lock.unlink()
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
        sync_folder(temporary)
        if os.path.lexists(path):
            path.rename(replaced)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)
    with suppress(FileNotFoundError):
        delete_folder(replaced)


def open_lock(path: Path, *, wait: bool, require: bool = False) -> int:
    """Open a file and lock it for this process; the lock ends when the descriptor is closed or the process ends.

    Where the file system has no locks, a warning is logged and the file is not locked.

    Parameters
    ----------
    path
        Created if need be, with the permissions that its folder gives to others.
    wait
        Wait for another holder to end.
    require
        Raise OSError where the file system has no locks.

    Returns
    -------
    int
        The descriptor, for reading and writing.

    Raises
    ------
    BlockingIOError
        If another process holds the lock and `wait` is false.
    OSError
        If the file cannot be created or opened.
    """
    while True:
        descriptor = _open_shared(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if require or error.errno not in NO_LOCKS:
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise BlockingIOError(error.errno, error.strerror, str(path)) from error
                raise
            log.warning("no locks on this file system (%s): %s is not locked", error.strerror, path)
            return descriptor
        # The previous holder may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _open_shared(path: Path) -> int:
    """Open a lock file; whoever may write into its folder may open it too, whatever the umask."""
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        pass
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    share_with_folder(path)
    return descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`, waiting for other processes."""
    descriptor = open_lock(path, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing_to(folder: Path, key: str) -> Iterator[None]:
    """Name the configuration key and the remedy in errors of files in a folder; other errors pass unchanged.

    Raises
    ------
    OutputError
        In place of the system's error at a file in the folder, or on the way to it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError) or error.filename is None or error.strerror is None:
            raise
        place, base = Path(os.fsdecode(error.filename)).absolute(), folder.absolute()
        if not (place.is_relative_to(base) or base.is_relative_to(place)):
            raise
        raise OutputError(
            f"{key}: cannot write to {place} ({error.strerror}). {key} needs a writable folder with free space: fix it "
            "or choose another."
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to errors of the system that do not name one, as writing to an open file raises them."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
