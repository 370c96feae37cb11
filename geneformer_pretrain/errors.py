"""Errors that a user can correct, and plain words for those of the system, PyTorch and its collectives.

Each message names the file, row, gene, key or option, and the remedy.
"""

import errno
import os
from collections.abc import Sequence
from pickle import UnpicklingError


class UserError(Exception):
    """Base of this project's own errors; printed as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration or an option that cannot work."""


class DataError(UserError, ValueError):
    """Counts, a gene set, a corpus or another input that cannot be used."""


class OutputError(UserError, OSError):
    """An output that exists already, belongs to something else or cannot be written."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used, or the ranks disagree about it."""


class CheckpointSaveError(CheckpointError):
    """A checkpoint could not be saved; earlier checkpoints are untouched."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


LACK_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""Errors of the system that say nothing about the file they occur at."""


def require_readable(error: Exception, path: object) -> None:
    """Raise DataError where the system, and not the content of a file, is the reason why it cannot be read."""
    number = error.errno if isinstance(error, OSError) else None
    if number in LACK_OF_RESOURCES:
        remedy = "; raise the limit with ulimit -n" if number == errno.EMFILE else "; start again"
        raise DataError(f"{path}: cannot be read now ({os.strerror(number)}){remedy}") from error


LOST_CONNECTION = ("/gloo/transport/", "ncclRemoteError")
"""Parts of the messages of collectives whose peer left or does not answer."""


def explain(error: BaseException, *, smaller: Sequence[str] = ()) -> str | None:
    """Explain an error in one plain line, or return None for a fault of this software.

    Parameters
    ----------
    error
        Any exception.
    smaller
        Settings that need less memory, for an error of that kind.
    """
    if isinstance(error, UserError):
        return str(error)
    text = str(error).partition("\n")[0].rstrip(".")
    if is_lack_of_memory(error):
        advice = f" What needs less: {'; '.join(smaller)}." if smaller else ""
        return f"Out of memory: {text or 'the host has no more'}.{advice}"
    if is_lost_connection(error):
        return (
            f"rank {os.environ.get('RANK', 0)} lost its connection to another rank, or waited too long for it. "
            "That one may have died: look at torchrun's summary of failures and at the last lines of that rank."
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
        if error.errno == errno.ENOSPC:
            reason = "No space left on device; free some where the output lies, and give the command again"
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    if isinstance(error, UnpicklingError):
        return f"a pickle was refused: {text}"
    return None


def name_error(error: BaseException) -> str:
    """Describe an error for a record: foreign ones in plain words, all others with their type."""
    explained = None if isinstance(error, UserError) else explain(error)
    return explained or f"{type(error).__name__}: {error}"


def is_lack_of_memory(error: BaseException) -> bool:
    """True if the GPU or the host has no memory left."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def is_lost_connection(error: BaseException) -> bool:
    """True if a collective failed because another rank left or does not answer."""
    return type(error).__name__ == "DistNetworkError" or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONNECTION)
    )


def root_cause(error: BaseException) -> str:
    """Describe a chain of errors in one line, its root first: torch hides "no space left" behind a stream's complaint.

    A cause whose words, and whose file, the rest of the line names already is left out; so is a suppressed one
    (`from None`) that is no OSError.
    """
    line = ""
    current: BaseException | None = error
    while current is not None:
        words = current.strerror if isinstance(current, OSError) and current.strerror else str(current)
        words = words.strip().partition("\n")[0]
        file = current.filename if isinstance(current, OSError) else None
        if not words or words not in line or (file is not None and str(file) not in line):
            text = f"{type(current).__name__}: {current}".splitlines()[0]
            line = f"{text} -> {line}" if line else text
        suppressed = current.__suppress_context__ and not isinstance(current.__context__, OSError)
        current = current.__cause__ or (None if suppressed else current.__context__)
    return line
