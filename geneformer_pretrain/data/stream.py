"""The epochs' packs end to end: one endless, globally ordered stream, pack number -> (epoch, cells).

The plans of large corpora are kept in a folder that the ranks of a node share, and made before they are needed.
"""

import hashlib
import json
import logging
import threading
from bisect import bisect_right
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from geneformer_pretrain.data.packing import (
    GROUP_PACKS,
    PLANNER_VERSION,
    SHUFFLE_WINDOW_BLOCKS,
    SPARE_CELLS,
    BatchShape,
    EpochPlan,
    pack_cells,
    permutation,
    summarize,
)
from geneformer_pretrain.data.plan_files import PlanFolder

log = logging.getLogger(__name__)

MIN_CELLS_FOR_PLAN_FILES = 1_000_000
"""Smaller corpora are planned in milliseconds: each process makes its own plans, when it needs them."""

MAX_CELLS_IN_MEMORY = 4_000_000
"""The plans of the last two epochs are kept in memory, and of more as long as they hold fewer cells than this."""

DIGEST_PACKS = 64
"""Packs that ``first_packs_digest`` looks at."""


class PackStream:
    """The endless, globally ordered stream of packs. Safe to use from several threads.

    Parameters
    ----------
    lengths
        int32 [cells], tokens of each cell before truncation; at least one cell, and none empty.
    fingerprint
        Identifies the corpus; part of the name of kept plans.
    seed
        The run's seed.
    shape
        Shape of the packs.
    packing
        False: packs of ``shape.max_cells`` cells for the padded reference path.
    plan_dir
        Folder where the plans of large corpora are kept, see ``plan_files``; None keeps a copy in each process.
    shuffle_block_cells
        See ``permutation``.
    chosen
        bool [cells], the cells that take part; None: all of them.
    epoch, epoch_first_pack
        Where the stream is taken up again: ``epoch`` starts at pack ``epoch_first_pack``, as ``state_at``
        reported. Earlier epochs are never planned again.

    Attributes
    ----------
    num_cells, num_tokens
        Cells that take part in an epoch, and their tokens before truncation.
    num_truncated, dropped_tokens
        Cells longer than ``seq_length``, and the tokens they lose, per epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        fingerprint: str,
        seed: int,
        shape: BatchShape,
        packing: bool = True,
        plan_dir: Path | str | None = None,
        shuffle_block_cells: int | None = None,
        chosen: np.ndarray | None = None,
        epoch: int = 0,
        epoch_first_pack: int = 0,
    ) -> None:
        taking_part = lengths if chosen is None else lengths[chosen]
        self.num_cells = len(taking_part)
        self.num_truncated, self.dropped_tokens, self.num_tokens = summarize(taking_part, shape.seq_length)
        self.shape = shape
        self._lengths, self._chosen = lengths, chosen
        self._seed = seed
        self._packing = packing
        self._shuffle_block_cells = shuffle_block_cells
        self._first_epoch = epoch
        # First pack of each epoch from this one on; the last entry belongs to an epoch not yet planned.
        self._epoch_starts = [epoch_first_pack]
        self._plans: dict[int, EpochPlan] = {}
        self._ahead: dict[int, Future[EpochPlan]] = {}
        self._lock = threading.Lock()
        self._plan_folder: PlanFolder | None = None
        if plan_dir is not None and len(lengths) >= MIN_CELLS_FOR_PLAN_FILES:
            identity = [
                PLANNER_VERSION, GROUP_PACKS, SPARE_CELLS, SHUFFLE_WINDOW_BLOCKS, fingerprint, len(lengths), seed,
                asdict(shape), packing, shuffle_block_cells,
            ]  # fmt: skip
            if chosen is not None:
                identity.append(xxhash.xxh3_128_hexdigest(chosen.data))
            key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
            self._plan_folder = PlanFolder(Path(plan_dir) / key)

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
            if len(self._lengths) >= MIN_CELLS_FOR_PLAN_FILES and index >= plan.num_packs // 2:
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

    def first_packs_digest(self, pack: int) -> str:
        """Hash of the cells in the packs from ``pack`` on; ranks whose digests differ would train on other cells."""
        digest = xxhash.xxh3_128()
        for number in range(pack, pack + DIGEST_PACKS):
            epoch, cells = self.locate(number)
            digest.update(np.array([epoch, len(cells), *cells], np.int64).tobytes())
        return digest.hexdigest()

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
        folder = self._plan_folder
        if folder is None:
            return self._make(epoch)
        plan = folder.load(epoch)
        if plan is None:
            try:
                plan = folder.load_or_save(epoch, self._make)
            except OSError as error:  # The next one may find room again.
                log.warning(
                    "data.cache_dir: the plan of epoch %d cannot be kept in %s (%s): each process makes its own",
                    epoch,
                    folder.folder,
                    error.strerror or error,
                )
                plan = self._make(epoch)
        return plan

    def _make(self, epoch: int) -> EpochPlan:
        order = permutation(len(self._lengths), self._seed, epoch, self._shuffle_block_cells)
        if self._chosen is not None:
            order = order[self._chosen[order]]
        return pack_cells(order, self._lengths, self.shape, self._packing)
