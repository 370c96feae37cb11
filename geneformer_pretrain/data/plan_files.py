"""Plans of a large corpus on disk, for all ranks of a node (or of all nodes, on a shared file system) to map.

A plan is three files, of which the checksum is written last: where it is, the plan is complete. A process holds a
shared lock on the checksum as long as it uses the plan. Plans of earlier epochs are deleted, except those in use.
"""

import fcntl
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from geneformer_pretrain.data.packing import EpochPlan
from geneformer_pretrain.files import NO_LOCKS, locked, make_shared_folder, replacing, share_with_folder

log = logging.getLogger(__name__)

KEPT_EPOCHS = 3
"""Plans of this many latest epochs are kept even if no process uses them."""


class PlanFolder:
    """The plans of one corpus, seed and shape, by epoch.

    Parameters
    ----------
    folder
        ``CACHE_DIR/plans/KEY``; made when the first plan is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, epoch: int) -> EpochPlan | None:
        """Map a plan, writing nothing; None if it is not there.

        Raises
        ------
        RuntimeError
            If the files are damaged.
        """
        cells_path, starts_path, checksum_path = self._files(epoch)
        try:
            descriptor = _lock_shared(checksum_path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            plan = EpochPlan(np.load(cells_path, mmap_mode="r"), np.load(starts_path, mmap_mode="r"))
            if not np.array_equal(np.load(checksum_path), _checksum(plan)):
                raise ValueError("the checksum differs")
        except FileNotFoundError:
            os.close(descriptor)
            return None
        except (ValueError, EOFError) as error:
            os.close(descriptor)
            raise RuntimeError(
                f"{cells_path}: the plan is damaged ({error}); delete the folder {self.folder}"
            ) from error
        weakref.finalize(plan, os.close, descriptor)
        return plan

    def load_or_save(self, epoch: int, make: Callable[[int], EpochPlan]) -> EpochPlan:
        """Map a plan; make and save it first if no process has done so.

        Raises
        ------
        OSError
            If the folder cannot be written to.
        """
        make_shared_folder(self.folder, base=self.folder.parents[1])
        with locked(self.folder / "lock"):
            plan = self.load(epoch)
            if plan is None:
                made = make(epoch)
                contents = (made.cells, made.pack_start, _checksum(made))
                for path, array in zip(self._files(epoch), contents, strict=True):
                    with replacing(path) as temporary:
                        with temporary.open("wb") as file:
                            np.save(file, array)
                        share_with_folder(temporary)
                self._prune(epoch)
                plan = self.load(epoch)
                assert plan is not None
            return plan

    def _prune(self, epoch: int) -> None:
        """Delete plans of epochs long before this one that no process uses."""
        for path in self.folder.glob("*.digest.npy"):
            old = int(path.name.split(".")[0])
            if old > epoch - KEPT_EPOCHS:
                continue
            with suppress(OSError):  # in use, someone else's, or without locks, which leave no way to know
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for file in reversed(self._files(old)):
                        file.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)

    def _files(self, epoch: int) -> tuple[Path, Path, Path]:
        names = ("cells", "starts", "digest")
        cells, starts, digest = (self.folder / f"{epoch}.{name}.npy" for name in names)
        return cells, starts, digest


def _lock_shared(path: Path) -> int:
    """Open a file that others may use as well, but not delete; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            return descriptor
        # It may have been deleted between the two calls.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _checksum(plan: EpochPlan) -> np.ndarray:
    digest = xxhash.xxh3_128(plan.cells.data)
    digest.update(plan.pack_start.data)
    return np.frombuffer(digest.digest(), np.uint8)
