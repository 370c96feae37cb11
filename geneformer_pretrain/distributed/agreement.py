"""Agreement between the ranks of a run: all succeed, or all fail with the same reasons."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

log = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

ON_ALL_RANKS = "All ranks of the run raise this error."
"""Note on an error that the ranks agreed on: it need not be printed by each of them."""

MAX_DIFFERENCES = 20
"""Values that differ between ranks, of which a message tells."""

LOST_CONNECTION = ("/gloo/transport/", "ncclRemoteError")
"""What errors of collectives have in them when another rank left or does not answer."""


class Ranks:
    """All ranks of the run, speaking through a CPU process group of their own; or one process alone.

    Only one thread may use it at a time.

    Parameters
    ----------
    timeout
        How long a rank waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T], error: type[Exception]) -> list[T]:
        """Run `action` on every rank and return all results; if it fails anywhere, fail everywhere.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming each rank that failed and its reason. What fails with this type
            already is told in its own words. A rank that failed and then finds the others gone still tells its reason.
        """
        results: list[T] = []
        failures: dict[int, str] = {}
        try:
            results = [action()]
        # Whatever went wrong must reach the other ranks, which would otherwise wait for this one in vain.
        except CheckpointException as exc:
            failures = {rank: reason_of(cause) for rank, (cause, _) in exc.failures.items()}
        except Exception as exc:
            failures = {self.rank: str(exc) if isinstance(exc, error) else reason_of(exc)}
            log.debug("rank %d failed", self.rank, exc_info=True)
        try:
            outcomes = self.gather((results, failures))
        except RuntimeError as lost:
            if failures:
                raise error(merge(failures, self.size)) from lost
            raise
        merged = {rank: reason for _, failed in outcomes for rank, reason in failed.items()}
        if merged:
            raise agreed(error(merge(merged, self.size)), self.size)
        return [result for results, _ in outcomes for result in results]

    def on_first(self, action: Callable[[], None], error: type[Exception]) -> None:
        """Run `action` on rank 0 while the others wait; if it fails, all fail."""
        self.together(action if self.rank == 0 else lambda: None, error)

    def agree(self, what: str, look: Callable[[], object], error: type[Exception]) -> None:
        """Check that `look` returns the same on all ranks.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming the ranks that differ from rank 0, and the values.
        """
        values = self.together(look, error)
        differing = [rank for rank, value in enumerate(values) if value != values[0]]
        if differing:
            listed = "; ".join(f"rank {rank}: {values[rank]}" for rank in [0, *differing])
            raise agreed(error(f"ranks {differing} differ from rank 0 in {what}: {listed}"), self.size)

    def agree_on(self, values: Mapping[str, object], error: type[Exception]) -> None:
        """Check that named values are the same on all ranks.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming each value that differs from rank 0's and the ranks.
        """
        first, *others = self.gather(dict(values))
        differences = []
        for name in sorted(set(first).union(*others)):
            differing: dict[str, list[int]] = {}
            for rank, other in enumerate(others, 1):
                if first.get(name) != other.get(name):
                    differing.setdefault(repr(other.get(name)), []).append(rank)
            if differing:
                theirs = [f"{value} on {name_ranks(ranks)}" for value, ranks in differing.items()]
                differences.append(f"{name} is " + ", ".join([f"{first.get(name)!r} on rank 0", *theirs]))
        if differences:
            more = len(differences) - MAX_DIFFERENCES
            told = "; ".join(differences[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise agreed(error(f"The ranks of this run differ; give all of them the same: {told}"), self.size)

    def share(self, folder: Path, key: str, error: type[Exception]) -> None:
        """Make the folder that a key names if need be, check that rank 0 can write to it and all ranks see the same.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming the ranks that see another folder.
        """
        name, place = self.gather((uuid.uuid4().hex, folder.absolute()))[0]
        probe = folder / f".probe-{name}"

        def leave() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()

        def look() -> None:
            if not probe.exists():
                raise error(
                    f"{key}: {folder.absolute()} is not the folder that rank 0 sees as {place}. All ranks must share "
                    "one, on several nodes in a file system that all of them have."
                )

        self.on_first(leave, error)
        try:
            self.together(look, error)
        finally:
            if self.rank == 0:
                probe.unlink()


@contextmanager
def naming_failed_connections() -> Iterator[None]:
    """Say where to look if ranks cannot connect to each other in the first place.

    Raises
    ------
    ConnectionError
        Instead of the errors of gloo, NCCL and the store, with their words.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST_CONNECTION)):
            raise
        reason = " ".join(str(error).split())[:500]
        raise ConnectionError(
            f"rank {os.environ.get('RANK', 0)} cannot connect to the others: {reason}. Check MASTER_ADDR and "
            "MASTER_PORT, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if they are set."
        ) from error


@contextmanager
def naming_lost_connections() -> Iterator[None]:
    """Say in plain words that another rank is gone: what gloo, NCCL and the store say of it is about sockets.

    Raises
    ------
    ConnectionError
        Instead of their error.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in LOST_CONNECTION)):
            raise
        raise ConnectionError(
            f"rank {os.environ.get('RANK', 0)} lost its connection to another rank, or waited too long for it. Maybe "
            "that one died: look at torchrun's summary of failures and at the last lines of that rank."
        ) from error


def agreed(error: E, size: int) -> E:
    """Mark an error as one that all of several ranks raise."""
    if size > 1:
        error.add_note(ON_ALL_RANKS)
    return error


def is_agreed(error: BaseException) -> bool:
    """Whether all of several ranks raise this error, or the one that it follows from."""
    current: BaseException | None = error
    while current is not None:
        if ON_ALL_RANKS in getattr(current, "__notes__", ()):
            return True
        current = current.__cause__ or current.__context__
    return False


def merge(failures: Mapping[int, str], size: int) -> str:
    """One text for the reasons of the ranks that failed, of `size` ranks; what all say names none of them."""
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in sorted(failures.items()):
        ranks_of.setdefault(reason, []).append(rank)
    return "; ".join(
        reason if len(ranks) == size else f"{name_ranks(ranks)}: {reason}" for reason, ranks in ranks_of.items()
    )


def name_ranks(ranks: list[int]) -> str:
    """For example "rank 3" or "ranks 1, 2"; a long list is cut."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}"


def reason_of(error: BaseException) -> str:
    """One line for an error, its root first: torch hides "no space left" behind a stream's complaint.

    A cause whose words the rest of the line has already, and its file, is left out; so is a hidden one (`from None`)
    that is no OSError.
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
        hidden = current.__suppress_context__ and not isinstance(current.__context__, OSError)
        current = current.__cause__ or (None if hidden else current.__context__)
    return line
