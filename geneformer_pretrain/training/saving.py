"""Decides when a checkpoint is saved, and survives saves that fail."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.config.training import TrainingConfig
from geneformer_pretrain.errors import CheckpointSaveError

MAX_FAILED_SAVES = 3
"""Saves that may fail in a row before training stops with an error."""


class Saver:
    """Saves checkpoints of a run; collective but for `is_due`.

    Parameters
    ----------
    store
        Where to.
    config
        The group `training`.
    say
        Prints a line on the main rank.
    """

    def __init__(self, store: CheckpointStore, config: TrainingConfig, say: Callable[[str], None]) -> None:
        self.store, self.config, self.say = store, config, say
        self.failed_saves = 0
        self.unconfirmed_save = False
        self.last_save = time.monotonic()

    def is_due(self) -> bool:
        """True on a rank whose clock says that `save_every_minutes` have passed; the ranks then agree on a step."""
        minutes = self.config.save_every_minutes
        return minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        final: bool,
        protected: Collection[int] = (),
    ) -> None:
        """Save a checkpoint; a failed save is survived, unless it is the last one or one too many.

        Parameters
        ----------
        protected
            Steps whose checkpoints are kept, however old.
        """
        blocking = final or not self.config.async_save
        unconfirmed, self.unconfirmed_save = self.unconfirmed_save, not blocking
        with self._surviving(final=False):
            self.store.wait()
            if unconfirmed:
                self.failed_saves = 0
        with self._surviving(final):
            self.store.save(step, tensors, state, blocking=blocking, protected=protected)
            if blocking:
                self.failed_saves = 0
        self.last_save = time.monotonic()

    @contextmanager
    def _surviving(self, final: bool) -> Iterator[None]:
        """Count a failed save; raise it only where `final` or one too many in a row."""
        try:
            yield
        except CheckpointSaveError as error:
            self.failed_saves += 1
            self.say(f"Saving failed ({self.failed_saves} of {MAX_FAILED_SAVES} in a row): {error}")
            if final or self.failed_saves >= MAX_FAILED_SAVES:
                raise
