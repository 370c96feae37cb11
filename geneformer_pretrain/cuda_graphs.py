"""Micro-batches as CUDA graphs: all kernels of forward and backward are launched at once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .config import ComputeDtype, Config, ConfigError
from .data.batch import PackedBatch
from .distributed import World

LARGEST_WIDTH = 1024
"""Hidden size up to which graphs are taken without being asked for. Kernels of wider models outlast their launches by
far, and the memory of a graph is not there for anything else."""


def takes_cuda_graphs(config: Config, world: World, compiled: bool) -> bool:
    """Whether micro-batches are to be recorded: `training.cuda_graphs` says so, or leaves it to what is faster.

    Raises
    ------
    ConfigError
        Asked for where it is not possible.
    """
    training = config.training
    obstacles = {
        "a GPU": world.device.type != "cuda",
        "compiled blocks: training.compile=true and data.packing=true": not compiled,
        "one process: engines communicate while gradients are found": world.size > 1,
        "training.use_fsdp2=false and training.use_nvfsdp=false": training.use_fsdp2 or training.use_nvfsdp,
        "model.use_te_layers=false: Transformer Engine computes on the host too": config.model.use_te_layers,
        "training.recompute_every_n_layers=0": training.recompute_every_n_layers > 0,
        "BF16: in FP32 attention goes through the cells on the host": training.compute_dtype is ComputeDtype.float32,
    }
    found = [need for need, is_missing in obstacles.items() if is_missing]
    if training.cuda_graphs and found:
        raise ConfigError(f"training.cuda_graphs=true needs {found[0]}; change that, or set training.cuda_graphs=null.")
    wanted = config.model.hidden_size <= LARGEST_WIDTH if training.cuda_graphs is None else training.cuda_graphs
    return wanted and not found


class MicroBatchGraphs:
    """Forward and backward of packed micro-batches, recorded once and then replayed.

    Launching the kernels of a small model one by one takes the host as long as running them takes the device. Replayed
    kernels are the same, with the same random numbers: results do not change by a bit.

    Parameters
    ----------
    loss
        Sum of cross-entropies and number of masked tokens of a micro-batch on the device. Called until it is recorded,
        and never after.
    parameters
        What gets gradients.
    accumulates
        Whether gradients of several micro-batches are added.
    """

    def __init__(
        self,
        loss: Callable[[PackedBatch], tuple[Tensor, Tensor]],
        parameters: Iterable[nn.Parameter],
        accumulates: bool,
    ) -> None:
        self.loss, self.parameters, self.accumulates = loss, list(parameters), accumulates
        self.batch: PackedBatch | None = None
        self.recordings: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.gradients: list[Tensor | None] = []

    def run(self, batch: PackedBatch, seed: int) -> tuple[Tensor, Tensor]:
        """Add gradients of one micro-batch to those that are there.

        Parameters
        ----------
        batch
            In host memory, of the same shape each time.
        seed
            Of the generators, which decide dropout.

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
            self._warm_up(self.batch)
        is_first = self.parameters[0].grad is None
        if is_first not in self.recordings:
            try:
                self.recordings[is_first] = self._record(self.batch)
            except RuntimeError as error:
                raise ConfigError(
                    f"training.cuda_graphs: recording a micro-batch failed ({error}). Set training.cuda_graphs=false."
                ) from error
            if is_first:
                self.gradients = [parameter.grad for parameter in self.parameters]
        graph, loss_sum, masked = self.recordings[is_first]
        self.batch.buffer.copy_(batch.buffer, non_blocking=True)
        torch.manual_seed(seed)
        graph.replay()
        if is_first:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        return loss_sum, masked

    def _warm_up(self, batch: PackedBatch) -> None:
        """Run what will be recorded, for compilation and everything else that happens once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(1 + self.accumulates):
                self.loss(batch)[0].backward()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, batch: PackedBatch) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record a micro-batch: one that writes gradients if there are none, one that adds to them if there are."""
        pool = next((earlier.pool() for earlier, *_ in self.recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Threads of the loader and of NCCL go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss_sum, masked = self.loss(batch)
            loss_sum.backward()
        return graph, loss_sum.detach(), masked
