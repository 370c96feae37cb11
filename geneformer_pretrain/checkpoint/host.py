"""Copies of tensors in host memory, which are written to disk while training goes on."""

import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.shards import Offset, Shards

ALIGNMENT = 64
"""Bytes; a multiple of the size of every element type."""

PAGE = 4096
"""Bytes of the smallest page of memory."""

THREADS = 16
"""Threads that have the kernel map pages of host memory: 9.5 GB/s with pinning, 4.7 with 4 (H200, 2026-11-27)."""


class HostBuffers:
    """Copies of tensors in one region of host memory, which later copies of as many bytes use again."""

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Mapping[str, Shards], *, borrow: bool) -> dict[str, Shards]:
        """Copy all pieces to contiguous host memory; complete on return, and good until the next call.

        Parameters
        ----------
        tensors
            Pieces to copy, by name of their tensor.
        borrow
            Return pieces that are contiguous host memory already as they are, for use before they change.
        """
        copies = {name: Shards(shards.info, dict(shards.pieces)) for name, shards in tensors.items()}
        starts: dict[tuple[str, Offset], int] = {}
        size = 0
        for name, shards in tensors.items():
            for offset, piece in shards.pieces.items():
                if not (borrow and piece.device.type == "cpu" and piece.is_contiguous()):
                    starts[name, offset] = size
                    size += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        devices = {tensors[name].pieces[offset].device for name, offset in starts}
        gpus = [device for device in devices if device.type == "cuda"]
        if len(self._region) != size:
            self._region = torch.empty(0, dtype=torch.uint8)  # given back before as much is asked for again
            self._region = _pinned(size) if gpus else torch.empty(size, dtype=torch.uint8)
        for (name, offset), start in starts.items():
            piece = tensors[name].pieces[offset]
            buffer = self._region[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
            copies[name].pieces[offset] = buffer.copy_(piece, non_blocking=True)
        for gpu in gpus:
            torch.cuda.current_stream(gpu).synchronize()
        return copies


def _pinned(size: int) -> Tensor:
    """Host memory to which GPUs copy at the bus's full speed: uint8 [size], pinned as long as the tensor lives.

    `torch.empty(pin_memory=True)` has one thread map the pages, at 1.4 GB/s, and rounds up to a power of two.

    Raises
    ------
    torch.cuda.CudaError
        The memory cannot be pinned.
    """
    region = torch.empty(size, dtype=torch.uint8)
    pages = region.numpy()[::PAGE]
    share = -(-len(pages) // THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda first: pages[first : first + share].fill(0), range(0, len(pages), share)))
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(region.data_ptr(), size, 0))
    # At exit the memory goes with the process.
    weakref.finalize(region, runtime.cudaHostUnregister, region.data_ptr()).atexit = False
    return region
