"""Micro-batches as CUDA graphs: all kernels of forward and backward are launched at once."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geneformer_pretrain.data.batch import PackedBatch
from geneformer_pretrain.errors import ConfigError

ALIGNMENT = 64
"""Alignment, in elements, of each gradient in the flat buffer (for vectorized loads)."""


class MicroBatchGraphs:
    """Forward and backward of packed micro-batches, recorded once and then replayed.

    Launching the kernels of a small model one by one takes the host as long as running them takes the device. Replayed
    kernels are the same, with the same random numbers: results of one process do not change by a bit.

    With several processes, gradients lie in one buffer, which is summed over the ranks after the last micro-batch of a
    step. Over NVLink that costs less than overlapping it with the backward does, where the kernels of NCCL take
    multiprocessors that matrix products count on.

    Parameters
    ----------
    loss
        Sum of cross-entropies and number of masked tokens of a micro-batch on the device. Called until it is recorded,
        and never after.
    parameters
        What gets gradients.
    accumulates
        Whether gradients of several micro-batches are added.
    reduces
        Whether there are other ranks, over which gradients are summed.
    """

    def __init__(
        self,
        loss: Callable[[PackedBatch], tuple[Tensor, Tensor]],
        parameters: Iterable[nn.Parameter],
        accumulates: bool,
        reduces: bool,
    ) -> None:
        self.loss, self.parameters, self.accumulates = loss, list(parameters), accumulates
        self.buffer: Tensor | None = None
        self.views: list[Tensor] = []
        if reduces:
            self.buffer, self.views = flat_buffer(self.parameters)
        self.batch: PackedBatch | None = None
        self.recordings: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.gradients: list[Tensor | None] = []

    def run(self, batch: PackedBatch, seed: int, is_last: bool) -> tuple[Tensor, Tensor]:
        """Add gradients of one micro-batch to those that are there.

        Parameters
        ----------
        batch
            In host memory, of the same shape each time.
        seed
            Of the generators, which decide dropout.
        is_last
            Whether it is the last one of its step, after which gradients are summed over the ranks.

        Returns
        -------
        What `loss` returns; the next call overwrites it.

        Raises
        ------
        ConfigError
            The micro-batch could not be recorded, by its operations or for want of memory.
        """
        if self.batch is None:
            self.batch = batch.to(self.parameters[0].device)
            self._warm_up(self.batch, seed)
        is_first = self.parameters[0].grad is None
        if is_first not in self.recordings:
            try:
                self.recordings[is_first] = self._record(self.batch, is_first)
            except RuntimeError as error:
                raise ConfigError(
                    f"training.cuda_graphs: recording a micro-batch failed ({error}). Set training.cuda_graphs=false."
                ) from error
            if is_first:
                self.gradients = [*self.views] or [parameter.grad for parameter in self.parameters]
        graph, loss_sum, masked = self.recordings[is_first]
        self.batch.buffer.copy_(batch.buffer, non_blocking=True)
        torch.manual_seed(seed)
        graph.replay()
        if is_first:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        if is_last and self.buffer is not None:
            dist.all_reduce(self.buffer)
        return loss_sum, masked

    def _warm_up(self, batch: PackedBatch, seed: int) -> None:
        """Run what will be recorded, for compilation and everything else that happens once.

        With the micro-batch's own seed, so that FP8 kernels record the maxima that they record when it is replayed.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(1 + self.accumulates):
                torch.manual_seed(seed)
                self.loss(batch)[0].backward()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: PackedBatch, is_first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record a micro-batch: one that writes gradients if there are none, one that adds to them if there are."""
        pool = next((earlier.pool() for earlier, *_ in self.recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Threads of the loader and of NCCL go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss_sum, masked = self.loss(batch)
            loss_sum.backward()
            if is_first and self.views:
                torch._foreach_copy_(self.views, [cast(Tensor, parameter.grad) for parameter in self.parameters])
        return graph, loss_sum.detach(), masked


def flat_buffer(tensors: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Allocate zeros with room for all tensors of one dtype, and a view of each one's shape."""
    sizes = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    parts = zip(buffer.split(sizes), tensors, strict=True)
    return buffer, [part[: tensor.numel()].view_as(tensor) for part, tensor in parts]
