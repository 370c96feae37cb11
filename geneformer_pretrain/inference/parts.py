"""A job cut into parts of equal cost, each a file that is complete or absent: work that was stopped goes on.

The first start decides the parts and writes them down; later starts, also with another number of ranks, share out
those that are missing.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from geneformer_pretrain.console import Progress, amount, say
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.rendezvous import check_environment
from geneformer_pretrain.distributed.world import choose_device
from geneformer_pretrain.errors import OutputError, UserError
from geneformer_pretrain.files import delete_folder, open_lock, replacing

T = TypeVar("T")

JOB_FILE = "_job.json"
"""Its name begins with `_`, so that readers of a folder of parquet files pass over it."""

LOCK_FILE = ".lock"

CPU_PART_TOKENS, CPU_PARTS = 2**19, 1000
"""On a CPU, which takes a minute for so many tokens with a small model, parts have no more; but not more parts than so
many. A part at most is lost by a kill."""

FORMAT_VERSION = 5

TAPER = (1 / 2, 1 / 4, 1 / 8, 1 / 8)
"""Shares into which the last part of each rank is cut, where they are joined: little is left to do at the end."""

DELETERS = 8
"""Threads that delete the files of a folder."""

PATIENCE = timedelta(days=7)
"""How long ranks wait for one that tokenizes or is slower."""


def join_ranks() -> Ranks:
    """The ranks of this job, started by torchrun; or this process alone.

    They speak in host memory only: no rank needs the others' GPUs.

    Raises
    ------
    ConfigError
        Numbers in the environment that are none.
    """
    check_environment()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(PATIENCE)


def in_turn(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run an action on the first rank and then on the others, for whom it prepares files.

    Raises
    ------
    UserError
        On every rank, if it fails on any; one process alone raises its own error.
    """
    if ranks.rank > 0:
        at_once(ranks, lambda: None)
        return at_once(ranks, action)
    result = at_once(ranks, action)
    at_once(ranks, lambda: None)
    return result


def at_once(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run an action on all ranks at the same time.

    Raises
    ------
    UserError
        On every rank, if it fails on any; one process alone raises its own error.
    """
    if ranks.size == 1:
        return action()
    results: list[T] = []
    ranks.run_on_all_ranks(lambda: results.append(action()), UserError)
    return results[0]


def local_device() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return choose_device(int(os.environ.get("LOCAL_RANK", 0)))


@dataclass(frozen=True)
class Part:
    """A range of a job's items: cells to embed, or perturbed copies of cells.

    Attributes
    ----------
    number
        Counted from 0.
    first, last
        Places in the list of the job's items; `last` is beyond the part.
    """

    number: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def name(self) -> str:
        """File name of its results."""
        return f"part-{self.number:05d}.parquet"


class Job:
    """Folder of a job: its settings, the parts and those that are done.

    Parameters
    ----------
    folder
        For `_job.json` and the parts.
    settings
        What decides the results, JSON-serialisable.
    parts
        The parts that are done and those to do.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], parts: list[Part]) -> None:
        self.folder, self.settings, self.parts = folder, settings, parts

    def path(self, part: Part) -> Path:
        """File of a part's results."""
        return self.folder / part.name

    def left(self) -> list[Part]:
        """Parts without results."""
        return [part for part in self.parts if not self.path(part).exists()]

    @classmethod
    def open(
        cls, folder: Path, settings: dict[str, Any], costs: np.ndarray, part_cost: float, ranks: int, *,
        copies: np.ndarray | None = None, tapers: bool = False,
    ) -> "Job":  # fmt: skip
        """Open the job of a folder, or begin it.

        Parameters
        ----------
        folder
            Exists.
        settings
            See above.
        costs
            Cost of each cell, float64.
        part_cost
            About the cost of a part.
        ranks
            Number of ranks that will share the parts.
        copies
            Items of each cell, int64; one if not given.
        tapers
            Whether the last parts are smaller; see TAPER.

        Raises
        ------
        OutputError
            The folder belongs to a job with other settings.
        """
        path = folder / JOB_FILE
        if path.exists():
            try:
                facts = json.loads(path.read_text())
                if facts["format_version"] != FORMAT_VERSION:
                    raise OutputError(
                        f"{folder}: another release of this software began these results; finish with that one, or "
                        "add --overwrite to begin anew."
                    )
                require_same(settings, facts["settings"], folder)
                parts = [Part(number, *bounds) for number, bounds in enumerate(facts["parts"])]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{path}: damaged ({error!r}); name another output or add --overwrite.") from error
            return cls(folder, settings, parts)
        parts = cut(costs, part_cost, ranks, copies=copies, tapers=tapers)
        facts = {
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "parts": [[part.first, part.last] for part in parts],
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n")
        return cls(folder, settings, parts)


def require_same(settings: dict[str, Any], earlier: dict[str, Any], folder: Path) -> None:
    """Raise OutputError, naming what differs, unless a folder's earlier settings are the same."""
    differing = [name for name in {**settings, **earlier} if settings.get(name) != earlier.get(name)]
    if differing:
        listed = "; ".join(f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}" for name in differing)
        raise OutputError(
            f"{folder}: holds results of a job with other settings ({listed}). Name another output, or add --overwrite "
            "to delete them."
        )


def cut(
    costs: np.ndarray, part_cost: float, ranks: int, *, copies: np.ndarray | None = None, tapers: bool = False
) -> list[Part]:
    """Cut cells, or their copies, into parts of about equal cost, as many for each rank.

    Each part ends at the item where it comes nearest to that. With `tapers`, the last part of each rank is cut once
    more, unless one part is all there is.
    """
    ends = np.insert(np.cumsum(costs), 0, 0.0)
    rounds = max(1, round(float(ends[-1]) / part_cost / ranks))
    last = TAPER if tapers and rounds * ranks > 1 else (1.0,)
    shares = np.repeat([*[1.0] * (rounds - 1), *last], ranks)
    wanted = np.cumsum(shares)[:-1] * (float(ends[-1]) / shares.sum())
    items = np.arange(len(ends)) if copies is None else np.insert(np.cumsum(copies), 0, 0)
    inner = np.rint(np.interp(wanted, ends, items)).astype(np.int64)
    bounds = np.unique([0, *inner, items[-1]]).tolist()
    return [Part(number, *pair) for number, pair in enumerate(pairwise(bounds))]


def part_tokens(most: int, device: torch.device, total: int) -> int:
    """Tokens of a part of a job that has so many in total: at most so many, fewer on a CPU."""
    return most if device.type == "cuda" else min(most, max(CPU_PART_TOKENS, total // CPU_PARTS))


def remaining(job: Job, ranks: Ranks) -> list[Part]:
    """Parts to do, as the first rank sees them, which prints how many are there already."""
    left = ranks.gather(job.left())[0]
    done = len(job.parts) - len(left)
    if done and ranks.rank == 0:
        say(f"Going on: {done:,} of {amount(len(job.parts), 'part')} are there.")
    return left


def share(parts: Sequence[Part], rank: int, size: int) -> list[Part]:
    """Parts of one rank: every `size`-th, so that parts are complete in about their order, whoever makes them."""
    return list(parts[rank::size])


def share_progress(ranks: Ranks, total: int, description: str, unit: str) -> Progress:
    """Progress of the first rank's share, which is named where there are several; other ranks draw nothing."""
    share_of = f", rank {ranks.rank} of {ranks.size}" if ranks.size > 1 else ""
    return Progress(total, description + share_of, unit, enabled=ranks.rank == 0)


class Lock:
    """Makes a folder and holds it for one job at a time, on the first rank.

    A new folder in which nothing was made goes again, so that a mistake in the options leaves none behind.

    Raises
    ------
    OutputError
        Another process works on it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_new = folder, not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = open_lock(folder / LOCK_FILE, wait=False)
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another process works on it; wait for it, or name another output.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and all(path.is_dir() or path.name == LOCK_FILE for path in self._folder.rglob("*")):
            remove(self._folder)
        os.close(self._descriptor)


class Writer:
    """Writes parts in a thread, one while the next is computed; errors are raised at the next call.

    Attributes
    ----------
    waited
        Seconds of waiting for a part to be written, the last one included.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self.waited = 0.0

    def write(self, action: Callable[[], None]) -> None:
        """Run what makes and writes a part, once the one before is written."""
        self._wait()
        self._last = self._pool.submit(action)

    def _wait(self) -> None:
        began = perf_counter()
        if self._last is not None:
            self._last.result()
        self.waited += perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._wait()
        self._pool.shutdown()


def write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file aside and rename it."""
    with replacing(path) as temporary, open_writer(temporary, table.schema) as writer:
        writer.write_table(table)


def fixed_size_list(vectors: np.ndarray) -> pa.Array:
    """Vectors as a column: float32 [n, H]."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Open a parquet file; embeddings are not compressed, which would not make them smaller."""
    texts = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
    return pq.ParquetWriter(path, schema, use_dictionary=texts, compression=_compression_of(schema))


def _compression_of(schema: pa.Schema) -> dict[str, str]:
    """Compression of each column, by the path of its values."""
    return {
        f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name: (
            "none" if pa.types.is_fixed_size_list(field.type) else "zstd"
        )
        for field in schema
    }


def clear(folder: Path) -> None:
    """Delete the results of a job, but not its lock.

    The settings go last: after a kill in between, no other job takes the parts that are left for its own.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name == JOB_FILE):
        if path.is_dir():
            remove(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def remove(folder: Path) -> None:
    """Delete a folder with all results in it, if it is there; of a link to one, only the link.

    Files go in threads, for giving back their memory takes 0.2 s a GB and more.
    """
    with suppress(FileNotFoundError):
        if not folder.is_symlink():
            with ThreadPoolExecutor(DELETERS) as pool:
                list(pool.map(Path.unlink, [path for path in folder.iterdir() if not path.is_dir()]))
        delete_folder(folder)
