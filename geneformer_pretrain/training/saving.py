"""Decides when a checkpoint is saved and which is the best, and survives saves that fail."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.export import read_weights, write_model
from geneformer_pretrain.checkpoint.state import Progress, named_tensors, state_to_save
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.distributed.engines import Engine
from geneformer_pretrain.errors import CheckpointSaveError
from geneformer_pretrain.model.precision import Precision
from geneformer_pretrain.training.resume import FP8_PREFIX

MAX_FAILED_SAVES = 3
"""Saves that may fail in a row before training stops with an error."""


class Saver:
    """Saves checkpoints of a run; collective but for `is_due`.

    Parameters
    ----------
    store
        Where to.
    engine, optimizer, precision
        Owners of the tensors: weights, AdamW's state, FP8 scales.
    config, data
        Described in the checkpoint.
    held_out
        Fingerprint of held-out cells and masks; None if there are none. Losses on others cannot be compared.
    say
        Prints a line on the main rank.

    Attributes
    ----------
    best
        Step and validation loss of the best checkpoint, and of a better one that is being saved.
    """

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        optimizer: torch.optim.AdamW,
        precision: Precision,
        config: Config,
        data: DataSource,
        held_out: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.store, self.engine, self.optimizer, self.precision = store, engine, optimizer, precision
        self.config, self.data, self.held_out, self.say = config, data, held_out, say
        self.best: list[tuple[int, float | None]] = []
        self.failed_saves = 0
        self.unconfirmed_save = False
        self.last_save = time.monotonic()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint, by canonical name."""
        tensors = named_tensors(self.engine.model, self.optimizer)
        self.engine.prepare_for_checkpoint(tensors)
        return tensors | {f"{FP8_PREFIX}{name}": tensor for name, tensor in self.precision.state()}

    def is_due(self) -> bool:
        """True on a rank whose clock says that `save_every_minutes` have passed; the ranks then agree on a step."""
        minutes = self.config.training.save_every_minutes
        return minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

    def settle_best(self, progress: Progress) -> None:
        """Keep the newest of the best steps whose checkpoint is there, in the eyes of rank 0, and protect it.

        One that was the best on other held-out cells is so no longer.
        """
        if progress.best_step is not None and self.held_out not in (None, progress.best_of):
            self.say(
                f"The held-out cells or their masks changed: step {progress.best_step} is no longer kept as the best."
            )
            progress.best_step = None
        known = self.best or ([] if progress.best_step is None else [(progress.best_step, progress.best_loss)])
        there = [(step, loss) for step, loss in known if (self.store.directory / f"step_{step}").is_dir()]
        self.best = self.store.ranks.gather(there[-1:])[0]
        progress.best_step, progress.best_loss = self.best[0] if self.best else (None, None)

    def record_best(self, progress: Progress, validation: dict[str, float]) -> bool:
        """Record this step as the best one if its validation loss is the lowest so far; true if it is.

        The best step and its loss are added to `validation`.
        """
        loss = validation.get("validation_loss", math.inf)
        lowest = math.inf if progress.best_loss is None else progress.best_loss
        is_best = self.config.training.keep_best and loss < lowest
        if is_best:  # The earlier one stays until a later save: that of this step may fail.
            self.best.append((progress.step, loss))
            progress.best_step, progress.best_loss, progress.best_of = progress.step, loss, self.held_out
        if validation and progress.best_step is not None and progress.best_loss is not None:
            validation |= {"best_step": progress.best_step, "best_loss": progress.best_loss}
        return is_best

    def save(self, progress: Progress, stream: PackStream, final: bool) -> None:
        """Save a checkpoint; a failed save is survived, unless it is the last one or one too many."""
        blocking = final or not self.config.training.async_save
        unconfirmed, self.unconfirmed_save = self.unconfirmed_save, not blocking
        with self._surviving(final=False):
            self.store.wait()
            if unconfirmed:
                self.failed_saves = 0
        if progress.best_step not in (None, progress.step):
            self.settle_best(progress)
        state = state_to_save(
            progress,
            **stream.state_at(progress.next_pack),
            data=self.data.fingerprint,
            data_files=self.data.files,
            model=self.config.model.architecture(),
        )
        protected = [step for step, _ in self.best]
        with self._surviving(final):
            self.store.save(progress.step, self.tensors(), state, blocking=blocking, protected=protected)
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


def export_models(config: Config, weights: dict[str, Tensor], best_step: int | None) -> None:
    """Write final_model/ and, with `training.keep_best`, best_model/; called on one rank.

    Parameters
    ----------
    weights
        Those of the last step, by canonical name.
    best_step
        Step of the checkpoint with the lowest validation loss, if there is one.
    """
    folder = Path(config.training.checkpoint_dir)
    gene_set = None if config.data.gene_set is None else Path(config.data.gene_set)
    model = config.model
    write_model(weights, model.architecture(), model.seq_length, folder / "final_model", gene_set=gene_set)
    if config.training.keep_best and best_step is not None:
        write_model(*read_weights(folder / f"step_{best_step}"), folder / "best_model", gene_set=gene_set)
