"""One optimizer step: forward and backward of each micro-batch, one normalization over all ranks, one update.

The host never waits for the device here: totals are copied to host memory asynchronously and read one step later.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.training import TrainingConfig
from geneformer_pretrain.data.batch import Batch, BatchMetadata, PackedBatch
from geneformer_pretrain.distributed.engines import Engine
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.model.precision import Precision
from geneformer_pretrain.training.cuda_graphs import MicroBatchGraphs
from geneformer_pretrain.training.optimizer import clip_and_step, learning_rate
from geneformer_pretrain.training.outliers import NormHistory

Beat = Callable[[str], None]


@dataclass
class PendingStep:
    """A launched step whose totals are still on their way to the host.

    Attributes
    ----------
    step
        Completed steps, this one included.
    totals
        Over all micro-batches and ranks: sum of cross-entropies, masked tokens, tokens, cells, and the requests; then
        the gradient norm before clipping and, if there is one, the state of the `NormHistory`. FP64 in host memory,
        valid once `ready` has happened.
    finished
        Host time at which the step was over; on a GPU None until somebody has waited for it.
    batches
        This rank's micro-batches, without their tokens.
    """

    step: int
    learning_rate: float
    totals: Tensor
    ready: torch.cuda.Event | None
    finished: float | None
    batches: list[BatchMetadata]
    loader_wait: float
    validation: dict[str, float] = field(default_factory=dict)

    def wait(self) -> list[float]:
        """Wait for the device and return the totals."""
        if self.ready is not None:
            self.ready.synchronize()
        if self.finished is None:
            self.finished = time.perf_counter()
        return self.totals.tolist()


class TrainStep:
    """Runs optimizer steps on this rank; collective.

    Parameters
    ----------
    engine, optimizer
        The model and its AdamW.
    config, resolved
        The group `training`, and the choices made.
    world
        This process among all.
    accumulation
        Micro-batches of one step on this rank.
    precision
        Makes the context of a forward pass, and updates FP8 scales after the last backward.
    beat
        Called with the name of each phase.
    norm_history
        State of the `NormHistory` to go on from, for `training.skip_outlier_steps`.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: torch.optim.AdamW,
        config: TrainingConfig,
        resolved: Resolved,
        world: World,
        accumulation: int,
        precision: Precision,
        beat: Beat = lambda phase: None,
        norm_history: list[float] | None = None,
    ) -> None:
        self.engine, self.optimizer, self.config, self.resolved = engine, optimizer, config, resolved
        self.world, self.accumulation, self.precision, self.beat = world, accumulation, precision, beat
        self.history: NormHistory | None = None
        if config.skip_outlier_steps is not None:
            self.history = NormHistory(config.skip_outlier_steps, world.device, norm_history)
        self.graphs: MicroBatchGraphs | None = None
        if resolved.cuda_graphs:
            self.graphs = MicroBatchGraphs(
                self._loss_of_packed, engine.model.parameters(), accumulates=accumulation > 1, reduces=world.size > 1
            )

    def run(self, batches: Iterator[Batch], step: int, requests: tuple[bool, ...] = ()) -> PendingStep:
        """Train on the next micro-batches.

        Parameters
        ----------
        batches
            Micro-batches of this rank.
        step
            Completed steps before this one.
        requests
            Flags of this rank; totals have the number of ranks that raised each.

        Raises
        ------
        TrainingError
            A damaged token, plan or cache.
        """
        device = self.world.device
        waited, infos = 0.0, []
        loss_sum = torch.zeros((), device=device)
        masked = torch.zeros((), dtype=torch.int64, device=device)
        for micro in range(self.accumulation):
            self.beat("waiting for data")
            started = time.perf_counter()
            batch = next_batch(batches, "data.path")
            waited += time.perf_counter() - started
            self.beat("forward and backward")
            micro_loss, micro_masked = self.forward_backward(batch, micro == self.accumulation - 1)
            loss_sum += micro_loss
            masked += micro_masked
            infos.append(BatchMetadata(batch.pack, batch.epoch, batch.cells, batch.num_tokens, batch.num_masked))

        counts = torch.tensor(
            [sum(info.num_tokens for info in infos), sum(info.num_cells for info in infos), *requests],
            dtype=torch.float64,
        )
        if device.type == "cuda":
            counts = counts.pin_memory().to(device, non_blocking=True)
        totals = torch.cat([torch.stack([loss_sum.double(), masked.double()]), counts])
        self.beat("sums over ranks and update")
        dist.all_reduce(totals)
        self.precision.end_step()
        rate = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A loss that is not finite makes the scale NaN, which skips the update as a bad gradient does.
        scale = (self.engine.gradient_divisor / totals[1].clamp(min=1.0) + 0.0 * totals[0]).float()
        norm = clip_and_step(self.optimizer, scale, self.config.max_grad_norm, self.history)
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.push_weights()
        history = [] if self.history is None else [self.history.state]
        host, ready = _to_host(torch.cat([totals, norm.double()[None], *history]))
        finished = time.perf_counter() if ready is None else None
        return PendingStep(step + 1, rate, host, ready, finished, infos, waited)

    def forward_backward(self, batch: Batch, is_last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradients of one micro-batch, perhaps the last of its step; return what `forward` does."""
        if self.graphs is not None:
            assert isinstance(batch, PackedBatch)
            return self.graphs.run(batch, dropout_seed(self.config.seed, batch.pack), is_last)
        with self.engine.accumulation_context(is_last):
            loss_sum, masked = self.forward(batch)
            loss_sum.backward()
        return loss_sum.detach(), masked

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the sum of cross-entropies and the number of masked tokens of one micro-batch.

        Dropout belongs to the pack, not to the rank: the generators are seeded with its number.
        """
        torch.manual_seed(dropout_seed(self.config.seed, batch.pack))
        batch = batch.to(self.world.device, non_blocking=True)
        with self.precision.forward():
            if isinstance(batch, PackedBatch):
                return self._loss_of_packed(batch)
            (logits,) = self.engine.forward_module(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, return_dict=False
            )
        masked = (batch.labels != -100).sum()
        # Not output.loss * masked: the mean over no masked token at all is not a number.
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"), masked

    def _loss_of_packed(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        parts = batch.parts
        # Compiled code wants constant shapes; elsewhere unused room for masked tokens would only cost time.
        used = len(parts.labels) if self.resolved.compile else batch.num_masked
        # A tuple, because module hooks of sharding engines look for tensors in nothing else.
        _, loss_sum, num_labels = self.engine.forward_module(
            input_ids=parts.input_ids,
            position_ids=parts.position_ids,
            cu_seqlens=parts.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            masked_index=parts.masked_index[:used],
            labels=parts.labels[:used],
            return_dict=False,
        )
        return loss_sum, num_labels


def next_batch(batches: Iterator[Batch], key: str) -> Batch:
    """Return the next batch of the corpus that `key` names.

    Raises
    ------
    TrainingError
        A damaged token, plan or cache.
    """
    try:
        return next(batches)
    except ValueError as error:
        raise TrainingError(f"{key}: {error}") from error
    except RuntimeError as error:
        raise TrainingError(str(error)) from error


def dropout_seed(seed: int, pack: int) -> int:
    """Derive the seed of the dropout generators for one pack."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{pack}".encode()).digest()[:8], "little") >> 1


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start copying a small tensor to host memory; it is there once the event has happened."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
