"""Collects the results of finished steps: counters, log records, stop requests."""

import logging
import math
import time
from typing import Any

import numpy as np
import torch

from geneformer_pretrain.checkpoint.state import Progress
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import amount, say
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.planner.arithmetic import flops_per_token
from geneformer_pretrain.planner.measured import card_of_device
from geneformer_pretrain.run.metrics import MetricsLog
from geneformer_pretrain.training.step import Beat, PendingStep

log = logging.getLogger(__name__)

LENGTHS = 1_000_000
"""Cells whose lengths are looked at, evenly spaced, for the share of attention in the work of a token."""


def run_utilization(config: Config, resolved: Resolved, lengths: np.ndarray) -> float | None:
    """Compute the model FLOPs utilization of a run at one token a second; None on a CPU or a GPU that is not known.

    FLOPs of `planner.arithmetic.flops_per_token` against the dense BF16 peak of all GPUs, in FP8 too.

    Parameters
    ----------
    lengths
        int32 [cells], tokens of the corpus's cells before they are cut.
    """
    card = card_of_device(resolved.device)
    if card is None:
        return None
    kept = np.minimum(lengths[:: 1 + len(lengths) // LENGTHS], config.model.seq_length).astype(np.float64)
    attended = float((kept**2).sum() / kept.sum())
    flops = flops_per_token(config.model, config.training.mlm_probability, attended)
    return flops / (card.bf16_tflops * 1e12 * resolved.world_size)


class StepResults:
    """Reads the totals of each step once the device has them, while the next step runs, and reports them.

    Parameters
    ----------
    config, world, progress
        The run; counters of `progress` are advanced here.
    metrics
        On the main rank.
    tokens_per_step
        Room for tokens of one step's packs, over all ranks.
    utilization
        Model FLOPs utilization at one token a second, see `run_utilization`; None where it is not known.
    beat
        Called with the name of each phase.

    Attributes
    ----------
    pending
        The step that has been launched last.
    stop_requested, save_requested
        Whether any rank had asked for it by the last step read.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        progress: Progress,
        metrics: MetricsLog | None,
        tokens_per_step: int,
        utilization: float | None,
        beat: Beat,
    ) -> None:
        self.config, self.world, self.progress = config, world, progress
        self.metrics, self.tokens_per_step, self.utilization, self.beat = metrics, tokens_per_step, utilization, beat
        self.pending: PendingStep | None = None
        self.stop_requested = self.save_requested = False
        self.skipped_in_a_row = 0
        self.warned_of_no_mask = False
        self.is_first = True
        self.pauses = {"save_seconds": 0.0, "validation_seconds": 0.0}
        self.clock = time.perf_counter()

    def pause(self, kind: str, seconds: float) -> None:
        """Count time that is not part of a step: "save_seconds" or "validation_seconds"."""
        self.pauses[kind] += seconds
        if self.pending is not None and self.pending.finished is not None:
            self.pending.finished += seconds  # the record of a step that was over before the pause is to hold it

    def collect(self) -> None:
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
        if pending.ready is not None:
            self.beat("waiting for the device")
        loss_sum, masked, tokens, cells, stop, save, norm, *history = pending.wait()
        assert pending.finished is not None
        seconds, self.clock = pending.finished - self.clock, pending.finished
        step_seconds = max(seconds - sum(self.pauses.values()), 1e-9)
        self.stop_requested, self.save_requested = self.stop_requested or stop > 0, self.save_requested or save > 0
        self._count(pending.step, tokens, cells, masked)
        self._count_skipped(pending.step, norm, history)
        loss = loss_sum / masked if masked else float("nan")
        if self.metrics is not None:
            self.metrics.advance(pending.step, loss, pending.learning_rate, tokens, step_seconds)
            if self._is_logged(pending):
                record: dict[str, Any] = {
                    "step": pending.step,
                    "loss": loss,
                    "learning_rate": pending.learning_rate,
                    "grad_norm": norm,
                    "tokens_per_second": tokens / step_seconds,
                    "mfu": None if self.utilization is None else self.utilization * tokens / step_seconds,
                    "cells": int(cells),
                    "masked_tokens": int(masked),
                    "tokens": int(tokens),
                    "packing_fill": tokens / self.tokens_per_step,
                    "epoch": pending.batches[-1].epoch,
                    "seconds": seconds,
                    "step_seconds": step_seconds,
                    "loader_wait_seconds": pending.loader_wait,
                    "skipped_steps": self.progress.skipped_steps,
                }
                if history:
                    record["outlier_steps"] = self.progress.outlier_steps
                record |= {kind: pause for kind, pause in self.pauses.items() if pause}
                if self.is_first:
                    record["includes_start"] = True
                if self.world.device.type == "cuda":
                    record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                self.metrics.write(record | pending.validation)
        self.pauses = dict.fromkeys(self.pauses, 0.0)
        self.is_first = False
        if self.skipped_in_a_row >= self.config.training.max_skipped_steps:
            packs = [(batch.pack, batch.cells.tolist()) for batch in pending.batches]
            raise TrainingError(
                f"{amount(self.skipped_in_a_row, 'update')} in a row had gradients that are not finite (the last at "
                f"step {pending.step}). Lower training.learning_rate, lengthen training.warmup_steps, or look at the "
                f"data. This rank's packs of that step, each with its cells: {packs}"
            )

    def _count_skipped(self, step: int, norm: float, history: list[float]) -> None:
        """Count an update that was left out; of several in a row the first is logged."""
        progress, is_finite = self.progress, math.isfinite(norm)
        progress.norm_history = history or None
        if not is_finite and not self.skipped_in_a_row and self.world.is_main:
            log.warning("step %d is skipped: its gradients are not finite", step)
        progress.skipped_steps += not is_finite
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        in_a_row = int(history[3]) if history and is_finite and norm > 0 else 0
        progress.outlier_steps += in_a_row > 0
        if in_a_row == 1 and self.world.is_main:
            usual = math.exp(history[1])
            log.warning("step %d is skipped: its gradient norm is %.3g, and %.3g of late", step, norm, usual)

    def _count(self, step: int, tokens: float, cells: float, masked: float) -> None:
        progress = self.progress
        progress.tokens += int(tokens)
        progress.cells += int(cells)
        if not masked and not self.warned_of_no_mask:
            self.warned_of_no_mask = True
            if self.world.is_main:
                say(
                    f"No token of step {step} is masked: there is nothing to learn from it. Tokens below "
                    f"data.num_special_tokens={self.config.data.num_special_tokens} never are."
                )

    def _is_logged(self, pending: PendingStep) -> bool:
        training = self.config.training
        is_last = pending.step == training.num_train_steps
        return is_last or pending.step % training.log_every_n_steps == 0 or bool(pending.validation)
