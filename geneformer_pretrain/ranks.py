"""Agreement between the ranks of a run: all succeed, or all fail with the same reasons."""

import logging
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

log = logging.getLogger(__name__)

T = TypeVar("T")


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
            already is told in its own words.
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
        outcomes = self.gather((results, failures))
        merged = {rank: reason for _, failed in outcomes for rank, reason in failed.items()}
        if merged:
            told = [f"rank {rank}: {reason}" if self.size > 1 else reason for rank, reason in sorted(merged.items())]
            raise error("; ".join(told))
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
            raise error(f"ranks {differing} differ from rank 0 in {what}: {listed}")

    def agree_on(self, values: Mapping[str, object], error: type[Exception]) -> None:
        """Check that named values are the same on all ranks.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming each value that differs from rank 0's and the ranks.
        """
        first, *others = self.gather(dict(values))
        differences = [
            f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
            for rank, other in enumerate(others, 1)
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if differences:
            raise error("The ranks of this run differ; give all of them the same: " + "; ".join(differences[:20]))

    def share(self, folder: Path, error: type[Exception]) -> None:
        """Make a folder if need be, and check that rank 0 can write to it and all ranks see the same one.

        Raises
        ------
        Exception
            Of type `error`, on every rank, naming the ranks that see another folder.
        """
        probe = folder / f".probe-{self.gather(uuid.uuid4().hex)[0]}"

        def leave() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()

        def look() -> None:
            if not probe.exists():
                raise FileNotFoundError(f"{folder} is not the folder that rank 0 sees: all must share one")

        self.on_first(leave, error)
        try:
            self.together(look, error)
        finally:
            if self.rank == 0:
                probe.unlink()


def reason_of(error: BaseException) -> str:
    """One line for an error, its root first: torch hides "no space left" behind a stream's complaint.

    A cause whose words the rest of the line has already, and its file, is left out.
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
        current = current.__cause__ or current.__context__
    return line
