"""What goes wrong inside of a rank; see `launcher.Fault`."""

import itertools
import os
import resource
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geneformer_pretrain.checkpoint import store as checkpoint
from geneformer_pretrain.data.batch import Batch
from geneformer_pretrain.training import outliers, trainer, validation
from geneformer_pretrain.training.step import PendingStep, TrainStep


def die(*_: object) -> None:
    """End this process as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


def crash_at_second_save(rank: int, place: str) -> None:
    """Kill rank 0 at one place of the commit protocol, the second time it gets there."""
    if rank != 0:
        return
    calls = itertools.count(1)

    def replace(owner: Any, name: str, crash: Callable[..., None], after: bool = False) -> None:
        original = getattr(owner, name)

        def replaced(*args: Any) -> Any:
            if next(calls) < 2:
                return original(*args)
            if after:
                original(*args)
            return crash(*args)

        setattr(owner, name, replaced)

    def delete_one_file(_: checkpoint.CheckpointStore, folder: Path) -> None:
        next(path for path in folder.iterdir() if path.name != "manifest.json").unlink()
        die()

    match place:
        case "before the commit":
            replace(checkpoint, "write_manifest", die, after=True)
        case "before pruning":
            replace(checkpoint.CheckpointStore, "_prune", die)
        case "before deleting":
            replace(checkpoint.CheckpointStore, "_delete", die)
        case "while deleting":
            replace(checkpoint.CheckpointStore, "_delete", delete_one_file)


def limit_files_in_saves(rank: int, steps: Collection[int]) -> None:
    """Let no file of rank 1 grow while it saves one of these steps: the system refuses to write."""
    if rank != 1:
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    write, limits = checkpoint.CheckpointStore._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: checkpoint.CheckpointStore, step: int, *args: Any) -> None:
        if step in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            write(self, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    checkpoint.CheckpointStore._write = limited  # type: ignore[method-assign]


def other_version(rank: int, package: str) -> None:
    """Let rank 1 find another version of a package, or other source code."""
    if rank == 1:
        original = trainer.identity_of_rank
        trainer.identity_of_rank = lambda config: original(config) | {package: "0.0.1"}


def not_finite(rank: int, bad_rank: int, steps: Collection[int], where: str, value: float) -> None:
    """Spoil the loss of one rank in some steps, or one element of a gradient on the way back."""
    if rank != bad_rank:
        return
    run, forward, steps_done = TrainStep.run, TrainStep.forward, [0]

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[7] = value
        return gradient

    def counting(self: TrainStep, batches: Any, step: int, *more: Any) -> PendingStep:
        steps_done[0] = step
        return run(self, batches, step, *more)

    def spoiled(self: TrainStep, batch: Batch) -> tuple[Tensor, Tensor]:
        if steps_done[0] + 1 not in steps:
            return forward(self, batch)
        if where == "loss":
            loss_sum, masked = forward(self, batch)
            return loss_sum + value, masked
        *_, linear = (module for module in self.engine.model.modules() if isinstance(module, nn.Linear))
        hook = linear.register_forward_hook(lambda module, args, output: output.register_hook(spoil) and None)
        try:
            return forward(self, batch)
        finally:
            hook.remove()

    TrainStep.run = counting  # type: ignore[method-assign]
    TrainStep.forward = spoiled  # type: ignore[method-assign]


def outlying(rank: int, steps: Collection[int], factor: float, history: int) -> None:
    """Multiply the loss of some steps, on all ranks, and let the history of norms be that short."""
    outliers.HISTORY = history
    run, forward, steps_done = TrainStep.run, TrainStep.forward, [0]

    def counting(self: TrainStep, batches: Any, step: int, *more: Any) -> PendingStep:
        steps_done[0] = step
        return run(self, batches, step, *more)

    def multiplied(self: TrainStep, batch: Batch) -> tuple[Tensor, Tensor]:
        loss_sum, masked = forward(self, batch)
        return loss_sum * (factor if steps_done[0] + 1 in steps else 1.0), masked

    TrainStep.run = counting  # type: ignore[method-assign]
    TrainStep.forward = multiplied  # type: ignore[method-assign]


IMPROVES_EVERY = 5
"""Steps from one best validation loss to the next, with `validation_by_step`."""


def validation_by_step(rank: int, place: str | None = None) -> None:
    """Let the validation loss fall at steps 2, 7, 12, ... and be 9 elsewhere; crash at a place of a save, if given."""
    run, steps_done = TrainStep.run, [0]

    def counting(self: TrainStep, batches: Any, step: int, *more: Any) -> PendingStep:
        steps_done[0] = step + 1
        return run(self, batches, step, *more)

    def evaluate(*_: object) -> dict[str, float]:
        is_best = steps_done[0] % IMPROVES_EVERY == 2
        others = {"validation_accuracy": 0.25, "validation_unigram_loss": 4.5}
        return {"validation_loss": 1 / steps_done[0] if is_best else 9.0} | others

    TrainStep.run = counting  # type: ignore[method-assign]
    validation.Validation.evaluate = evaluate  # type: ignore[assignment, method-assign]
    if place is not None:
        crash_at_second_save(rank, place)
