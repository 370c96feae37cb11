"""Forward passes as CUDA graphs: all kernels of a pack are launched at once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from geneformer_pretrain.inference.packs import Parts, Shape


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffer: Tensor
    parts: Parts
    hidden: Tensor


class ForwardGraphs:
    """Hidden states of packs, recorded once for each shape and then replayed.

    Launching the kernels of a small model one by one takes the host as long as running them takes the device, and
    longer where threads that read and write hold Python's lock. Replayed kernels are the same.

    Parameters
    ----------
    hidden
        Hidden states of a pack on the device; launches kernels that are this project's or PyTorch's, and never waits.
    """

    def __init__(self, hidden: Callable[[Parts], Tensor]) -> None:
        self._hidden = hidden
        self._recordings: dict[Shape, _Recording] = {}

    def run(self, shape: Shape, buffer: Tensor) -> tuple[Parts, Tensor]:
        """Return the parts of a pack and its hidden states, [T, H]; work queued before the next call may read them.

        Parameters
        ----------
        shape
            Shape of the pack.
        buffer
            Its buffer on the device.

        Raises
        ------
        torch.OutOfMemoryError
            There is no room to record this shape; what was recorded before stays.
        """
        recording = self._recordings.get(shape)
        if recording is None:
            recording = self._recordings[shape] = self._record(shape, buffer)
        recording.buffer.copy_(buffer)
        recording.graph.replay()
        return recording.parts, recording.hidden

    def has_others(self, shape: Shape) -> bool:
        """True if other shapes are recorded, whose memory `clear` would give back."""
        return bool(self._recordings.keys() - {shape})

    def clear(self) -> None:
        """Give back the memory of all recordings."""
        self._recordings.clear()

    def _record(self, shape: Shape, buffer: Tensor) -> _Recording:
        own = buffer.clone()
        parts = shape.split(own)
        self._hidden(parts)  # compiles and chooses kernels
        graph = torch.cuda.CUDAGraph()
        pool = next((earlier.graph.pool() for earlier in self._recordings.values()), None)
        try:
            # Threads that build and write packs go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self._hidden(parts)
        except torch.AcceleratorError as error:
            # The memory of a graph itself is CUDA's, whose lack has no class of its own.
            if "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from error
        return _Recording(graph, own, parts, hidden)
