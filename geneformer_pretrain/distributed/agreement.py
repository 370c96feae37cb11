"""Agreement between the ranks of a run: all succeed, or all raise the same error."""

import logging
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from geneformer_pretrain.errors import UserError, explain, root_cause

log = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

ON_ALL_RANKS = "All ranks of the run raise this error."
"""Note on an error that every rank raises: one rank of each node prints it."""

MAX_DIFFERENCES = 20
"""Most differences between ranks that a message lists."""


class Ranks:
    """All ranks of the run, connected by a CPU process group of their own; or one process alone.

    Only one thread may use it at a time.

    Parameters
    ----------
    timeout
        Longest time that a rank waits for the others.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30)) -> None:
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

    def run_on_all_ranks(self, action: Callable[[], T], error: type[Exception]) -> list[T]:
        """Run `action` on every rank and return all results; if it fails anywhere, raise everywhere.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming each rank that failed and its reason. The traceback of a fault of
            this software is logged on the rank where it happened.
        """
        results: list[T] = []
        failures: dict[int, str] = {}
        try:
            results = [action()]
        # Any failure must reach the other ranks, which would otherwise wait for this one in vain.
        except Exception as failed:
            failures = {self.rank: str(failed) if isinstance(failed, UserError | error) else root_cause(failed)}
            if explain(failed) is None:
                log.exception("rank %d failed", self.rank)
        try:
            outcomes = self.gather((results, failures))
        except RuntimeError as lost:
            if failures:
                raise error(merge(failures, self.size)) from lost
            raise
        merged = {rank: reason for _, failed in outcomes for rank, reason in failed.items()}
        if merged:
            raise on_all_ranks(error(merge(merged, self.size)), self.size)
        return [result for results, _ in outcomes for result in results]

    def run_on_rank0(self, action: Callable[[], T], error: type[Exception]) -> T | None:
        """Run `action` on rank 0 while the others wait; if it fails, all raise. Returns None on the others."""
        return self.run_on_all_ranks(lambda: action() if self.rank == 0 else None, error)[self.rank]

    def require_equal(self, values: Mapping[str, object], error: type[Exception]) -> None:
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
            listed = "; ".join(differences[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise on_all_ranks(error(f"The ranks of this run differ; give all of them the same: {listed}"), self.size)

    def require_shared_folder(self, folder: Path, key: str, error: type[Exception]) -> None:
        """Create the folder that a key names, if need be, and check that all ranks see the one that rank 0 writes to.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming the ranks that see another folder.
        """
        name, place = self.gather((uuid.uuid4().hex, folder.absolute()))[0]
        probe = folder / f".probe-{name}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()

        def look() -> None:
            if not probe.exists():
                raise error(
                    f"{key}: {folder.absolute()} is not the folder that rank 0 sees as {place}. All ranks must share "
                    "one, on several nodes in a file system that all of them have."
                )

        self.run_on_rank0(write, error)
        try:
            self.run_on_all_ranks(look, error)
        finally:
            if self.rank == 0:
                probe.unlink()


def on_all_ranks(error: E, size: int) -> E:
    """Mark an error as one that each of several ranks raises."""
    if size > 1:
        error.add_note(ON_ALL_RANKS)
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """True if each of several ranks raises this error, or the one that it follows from."""
    current: BaseException | None = error
    while current is not None:
        if ON_ALL_RANKS in getattr(current, "__notes__", ()):
            return True
        current = current.__cause__ or current.__context__
    return False


def merge(failures: Mapping[int, str], size: int) -> str:
    """Join the reasons of the ranks that failed, of `size` ranks; a reason of all names none of them."""
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in sorted(failures.items()):
        ranks_of.setdefault(reason, []).append(rank)
    return "; ".join(
        reason if len(ranks) == size else f"{name_ranks(ranks)}: {reason}" for reason, ranks in ranks_of.items()
    )


def name_ranks(ranks: list[int]) -> str:
    """Write ranks as "rank 3" or "ranks 1, 2"; a long list is cut."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {names}"
