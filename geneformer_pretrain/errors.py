"""Errors that a user can correct. Each message names the file, row, gene, key or option, and the remedy."""

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


LOST_CONNECTION = ("/gloo/transport/", "ncclRemoteError")
"""Parts of error messages of collectives that another rank left or does not answer."""


def explain(error: BaseException, *, smaller: Sequence[str] = ()) -> str | None:
    """Explain an error in one plain line, or return None for what is a fault of this software.

    The only place where errors of the system, of PyTorch and of its collectives get words.

    Parameters
    ----------
    smaller
        Settings that need less memory, for an error of that kind.
    """
    if isinstance(error, UserError):
        return str(error)
    text = str(error).partition("\n")[0].rstrip(".")
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text or isinstance(error, MemoryError):
        advice = f" What needs less: {'; '.join(smaller)}." if smaller else ""
        return f"Out of memory: {text or 'the host has no more'}.{advice}"
    if type(error).__name__ == "DistNetworkError" or any(sign in str(error) for sign in LOST_CONNECTION):
        return (
            f"rank {os.environ.get('RANK', 0)} lost its connection to another rank, or waited too long for it. "
            "That one may have died: look at torchrun's summary of failures and at the last lines of that rank."
        )
    if isinstance(error, OSError):
        if error.strerror is None or error.filename is None:
            return f"{type(error).__name__}: {text}" if error.strerror is None else error.strerror
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnpicklingError):
        return f"A pickle was refused: {text}"
    return None
