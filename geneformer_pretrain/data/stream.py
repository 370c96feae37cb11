"""The epochs' packs end to end: one endless, globally ordered stream, pack number -> (epoch, cells).

The plans of large corpora are kept in a folder that the ranks of a node share, and made before they are needed.
"""

import hashlib
import json
import logging
import os
import threading
from bisect import bisect_right
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock

from geneformer_pretrain.data.packing import (
    GROUP_PACKS,
    PLANNER_VERSION,
    SHUFFLE_WINDOW_BLOCKS,
    SPARE_CELLS,
    EpochPlan,
    PackShape,
    pack_cells,
    permutation,
    summarize,
)
from geneformer_pretrain.files import writing_to

log = logging.getLogger(__name__)

LARGE = 1_000_000
"""Cells of a corpus. Plans of smaller ones take milliseconds: each process makes its own, when it needs it."""

MAX_CELLS_IN_MEMORY = 4_000_000
"""The plans of the last two epochs are kept, beside one made ahead, and of more as long as they hold fewer cells than
this."""


class PackStream:
    """The endless, globally ordered stream of packs. Safe to use from several threads.

    Parameters
    ----------
    lengths
        int32 [cells], tokens of each cell before truncation.
    fingerprint
        Identifies the corpus; part of the name of kept plans.
    seed
        The run's seed.
    shape
        Shape of the packs.
    packing
        False: packs of ``shape.max_cells`` cells for the padded reference path.
    plan_dir
        Folder where the plans of large corpora are kept for all ranks of the node (or of all nodes, on a
        shared file system) to map; None keeps a copy in each process.
    shuffle_block_cells
        See ``permutation``.
    epoch, epoch_first_pack
        Where the stream is taken up again: ``epoch`` starts at pack ``epoch_first_pack``, as ``state_at``
        reported. Earlier epochs are never planned again.

    Attributes
    ----------
    num_truncated, dropped_tokens
        Cells longer than ``seq_length``, and the tokens they lose, per epoch.

    Raises
    ------
    ValueError
        If the corpus is empty or has a cell without tokens.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        fingerprint: str,
        seed: int,
        shape: PackShape,
        packing: bool = True,
        plan_dir: Path | str | None = None,
        shuffle_block_cells: int | None = None,
        epoch: int = 0,
        epoch_first_pack: int = 0,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("the corpus has no cells; data.path must lead to at least one")
        first_empty, self.num_truncated, self.dropped_tokens, _ = summarize(lengths, shape.seq_length)
        if first_empty >= 0:
            raise ValueError(
                f"cell {first_empty} of the corpus has length {lengths[first_empty]}; remove cells without tokens"
            )
        self.shape = shape
        self._lengths = lengths
        self._seed = seed
        self._packing = packing
        self._shuffle_block_cells = shuffle_block_cells
        self._first_epoch = epoch
        # First pack of each epoch from this one on; the last entry belongs to an epoch not yet planned.
        self._epoch_starts = [epoch_first_pack]
        self._plans: dict[int, EpochPlan] = {}
        self._ahead: dict[int, Future[EpochPlan]] = {}
        self._lock = threading.Lock()
        self._folder: Path | None = None
        if plan_dir is not None and len(lengths) >= LARGE:
            identity = [
                PLANNER_VERSION, GROUP_PACKS, SPARE_CELLS, SHUFFLE_WINDOW_BLOCKS, fingerprint, len(lengths), seed,
                asdict(shape), packing, shuffle_block_cells,
            ]  # fmt: skip
            key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
            self._folder = Path(plan_dir) / key

    def locate(self, pack: int) -> tuple[int, np.ndarray]:
        """Find a pack, planning further epochs as needed; in the second half of one, the next in the background.

        Parameters
        ----------
        pack
            Global number; not before the ``epoch_first_pack`` that the stream was made with.

        Returns
        -------
        epoch : int
        cells : numpy.ndarray
            int64 cell numbers.
        """
        with self._lock:
            epoch = self._epoch_of(pack)
            plan, index = self._plan(epoch), pack - self._epoch_starts[epoch - self._first_epoch]
            if len(self._lengths) >= LARGE and index >= plan.num_packs // 2:
                self._plan_ahead(epoch + 1)
            return epoch, plan.pack(index)

    def state_at(self, pack: int) -> dict[str, int]:
        """Arguments that start a new stream in the epoch of ``pack``, at the same cost wherever that is."""
        with self._lock:
            epoch = self._epoch_of(pack)
            return {"epoch": epoch, "epoch_first_pack": self._epoch_starts[epoch - self._first_epoch]}

    def plan(self, epoch: int) -> EpochPlan:
        """Plan of any one epoch, whatever its place in the stream."""
        with self._lock:
            return self._plan(epoch)

    def _epoch_of(self, pack: int) -> int:
        if pack < self._epoch_starts[0]:
            raise ValueError(
                f"pack {pack} lies before pack {self._epoch_starts[0]}, where this stream begins "
                f"(epoch {self._first_epoch}); make a stream with the state reported for the earlier pack"
            )
        while pack >= self._epoch_starts[-1]:
            epoch = self._first_epoch + len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + self._plan(epoch).num_packs)
        return self._first_epoch + bisect_right(self._epoch_starts, pack) - 1

    def _plan_ahead(self, epoch: int) -> None:
        if epoch in self._plans or epoch in self._ahead:
            return
        future = Future[EpochPlan]()

        def fail(error: BaseException) -> None:
            log.warning("cannot plan epoch %d ahead (%s); that is tried again when it begins", epoch, error)
            future.set_exception(error)

        def work() -> None:
            try:
                future.set_result(self._new(epoch))
            except BaseException as error:
                fail(error)

        try:
            # Not of an executor, whose threads a run waits for at its end.
            threading.Thread(target=work, name="planner", daemon=True).start()
        except RuntimeError as error:  # no more threads to be had
            fail(error)
        self._ahead[epoch] = future

    def _plan(self, epoch: int) -> EpochPlan:
        plan, ahead = self._plans.pop(epoch, None), self._ahead.pop(epoch, None)
        if ahead is not None and ahead.exception() is None:
            plan = ahead.result()
        if plan is None:  # What failed hours ago, for want of space perhaps, may be possible now.
            plan = self._new(epoch)
        self._plans[epoch] = plan  # last in the dict: used last
        while len(self._plans) > 2 and len(self._plans) * len(self._lengths) > MAX_CELLS_IN_MEMORY:
            del self._plans[next(iter(self._plans))]
        return plan

    def _new(self, epoch: int) -> EpochPlan:
        if self._folder is None:
            return self._make(epoch)
        with writing_to(self._folder, "data.cache_dir"):
            return self._load_or_make(self._folder, epoch)

    def _make(self, epoch: int) -> EpochPlan:
        order = permutation(len(self._lengths), self._seed, epoch, self._shuffle_block_cells)
        return pack_cells(order, self._lengths, self.shape, self._packing)

    def _load_or_make(self, folder: Path, epoch: int) -> EpochPlan:
        files = _plan_files(folder, epoch)
        cells_path, starts_path, digest_path = files
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not all(path.exists() for path in files):
                plan = self._make(epoch)
                _save(cells_path, plan.cells)
                _save(starts_path, plan.pack_start)
                _save(digest_path, _digest(plan))
                for path in folder.glob("*.tmp"):  # of a run that ended meanwhile
                    path.unlink()
                for name in folder.glob("*.cells.npy"):
                    old = int(name.name.split(".")[0])
                    if old < epoch - 2:
                        for path in _plan_files(folder, old):
                            path.unlink(missing_ok=True)
            try:
                plan = EpochPlan(np.load(cells_path, mmap_mode="r"), np.load(starts_path, mmap_mode="r"))
                if not np.array_equal(np.load(digest_path), _digest(plan)):
                    raise ValueError("the checksum differs")
            except (ValueError, EOFError) as error:
                raise RuntimeError(
                    f"{cells_path}: the plan is damaged ({error}); delete the folder {folder}"
                ) from error
        return plan


def _plan_files(folder: Path, epoch: int) -> tuple[Path, Path, Path]:
    return folder / f"{epoch}.cells.npy", folder / f"{epoch}.starts.npy", folder / f"{epoch}.digest.npy"


def _digest(plan: EpochPlan) -> np.ndarray:
    digest = xxhash.xxh3_128(plan.cells.data)
    digest.update(plan.pack_start.data)
    return np.frombuffer(digest.digest(), np.uint8)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
