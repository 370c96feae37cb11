"""What finished steps come to: counts, records, and reasons to stop."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.state import Progress
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed.watchdog import Watchdog
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.run.metrics import MetricsLog

log = logging.getLogger(__name__)

TOTALS = ("loss_sum", "masked_tokens", "tokens", "cells", "stop")
"""What is summed over micro-batches and ranks in each step."""


@dataclass
class PendingStep:
    """A step whose totals are still on their way to the host.

    Attributes
    ----------
    step
        Completed steps, this one included.
    totals
        TOTALS and the gradient norm, float64 in host memory, valid once `ready` has happened.
    launched
        Host time at the end of the step; on a CPU the step is over by then.
    packs
        (pack, cells) of this rank's micro-batches.
    """

    step: int
    learning_rate: float
    totals: Tensor
    ready: torch.cuda.Event | None
    launched: float
    packs: list[tuple[int, list[int]]]
    epoch: int
    loader_wait: float
    validation_loss: float | None = None


class StepResults:
    """Reads the totals of each step once the device has them, while the next step runs, and reports them.

    Attributes
    ----------
    pending
        The step that has been launched last.
    stop_agreed
        Whether a signal had reached any rank by the last step read.
    """

    def __init__(
        self, config: Config, world: World, progress: Progress, metrics: MetricsLog, watchdog: Watchdog
    ) -> None:
        self.config, self.world, self.progress = config, world, progress
        self.metrics, self.watchdog = metrics, watchdog
        self.pending: PendingStep | None = None
        self.stop_agreed = False
        self.skipped_in_a_row = 0
        self.warned_of_no_mask = False
        self.clock = time.perf_counter()

    def finish(self) -> None:
        """Read the totals of the pending step, if there is one, and report them.

        Called once the next step has been launched: the device is never kept waiting.

        Raises
        ------
        TrainingError
            One update too many in a row had gradients that are not finite.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        finished = pending.launched
        if pending.ready is not None:
            self.watchdog.beat(pending.step, "waiting for the device")
            pending.ready.synchronize()
            finished = time.perf_counter()
        loss_sum, masked, tokens, cells, stop, norm = pending.totals.tolist()
        seconds, self.clock = finished - self.clock, finished
        loss = loss_sum / masked if masked else float("nan")
        if not masked and not self.warned_of_no_mask:
            self.warned_of_no_mask = True
            if self.world.is_main:
                print(
                    f"No token of step {pending.step} is masked: there is nothing to learn from it. Tokens below "
                    f"data.num_special_tokens={self.config.data.num_special_tokens} never are.",
                    flush=True,
                )
        skipped = not norm < float("inf")
        progress, training = self.progress, self.config.training
        progress.tokens += int(tokens)
        progress.cells += int(cells)
        progress.skipped_steps += skipped
        if skipped and not self.skipped_in_a_row and self.world.is_main:
            log.warning("step %d is skipped: its gradients are not finite", pending.step)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.stop_agreed = self.stop_agreed or stop > 0
        self.metrics.advance(pending.step, loss, pending.learning_rate, tokens / seconds)
        is_last = pending.step == training.num_train_steps
        if is_last or pending.step % training.log_every_n_steps == 0 or pending.validation_loss is not None:
            record: dict[str, Any] = {
                "step": pending.step,
                "loss": loss,
                "learning_rate": pending.learning_rate,
                "grad_norm": norm,
                "tokens_per_second": tokens / seconds,
                "cells": int(cells),
                "masked_tokens": int(masked),
                "tokens": int(tokens),
                "epoch": pending.epoch,
                "seconds": seconds,
                "loader_wait_seconds": pending.loader_wait,
                "skipped_steps": progress.skipped_steps,
            }
            if self.world.device.type == "cuda":
                record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if pending.validation_loss is not None:
                record["validation_loss"] = pending.validation_loss
            self.metrics.write(record)
        if self.skipped_in_a_row >= training.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row had gradients that are not finite (the last at step "
                f"{pending.step}). Lower training.learning_rate, lengthen training.warmup_steps, or look at the data. "
                f"This rank's packs of that step, each with its cells: {pending.packs}"
            )


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a small tensor to host memory; it is there once the event has happened."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
