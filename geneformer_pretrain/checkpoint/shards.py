"""What a rank holds of each tensor, and its copy in host memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.tensor import DTensor

Offset = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a tensor as a whole, whatever part of it is here."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Shards:
    """The pieces of one tensor that this rank holds.

    Attributes
    ----------
    info
        Shape and type of the whole tensor.
    pieces
        Offset in the whole tensor -> the piece that begins there. A plain tensor is one piece at the origin;
        a rank that holds nothing of a sharded tensor has no pieces.
    """

    info: TensorInfo
    pieces: dict[Offset, torch.Tensor]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "Shards":
        """Describe a plain tensor or a `DTensor`; the pieces are views, so writing to them fills it."""
        info = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if not isinstance(tensor, DTensor):
            return cls(info, {(0,) * tensor.ndim: tensor.detach()})
        # These methods, unlike to_local(), also describe shards of uneven size as Megatron-FSDP makes them.
        pieces = {
            tuple(chunk.offsets): tensor.__get_tensor_shard__(MetadataIndex(name, chunk.offsets)).detach()
            for chunk in tensor.__create_chunk_list__()
            if math.prod(chunk.sizes) > 0
        }
        return cls(info, pieces)

    def whole(self, name: str) -> torch.Tensor:
        """Return the one piece that is the whole tensor.

        Raises
        ------
        ValueError
            If this rank holds only a part.
        """
        pieces = list(self.pieces.values())
        if len(pieces) != 1 or pieces[0].shape != self.info.shape:
            raise ValueError(f"{name} is sharded over several ranks: save it in the 'sharded' format")
        return pieces[0]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Describe the pieces in DCP's terms."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=piece.shape) for offset, piece in self.pieces.items()
        ]


class HostBuffers:
    """Copies of tensors in host memory, in buffers that are used again for each save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Offset], torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, Shards], *, borrow: bool) -> dict[str, Shards]:
        """Copy all pieces to host memory; complete on return.

        Parameters
        ----------
        tensors
            What to copy, by name.
        borrow
            Return pieces that are in host memory already as they are, for use before they change.
        """
        used: dict[tuple[str, Offset], torch.Tensor] = {}
        copies: dict[str, Shards] = {}
        devices: set[torch.device] = set()
        for name, shards in tensors.items():
            pieces: dict[Offset, torch.Tensor] = {}
            for offset, piece in shards.pieces.items():
                # A view of something larger is copied in any case: torch.save writes all that is behind it.
                own = piece.device.type == "cpu" and piece.untyped_storage().nbytes() == piece.nbytes
                if own and borrow:
                    pieces[offset] = piece
                    continue
                buffer = self._buffers.get((name, offset))
                if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
                    # Pinned, or the copy from the GPU runs at a fraction of the bus's speed.
                    buffer = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
                pieces[offset] = used[name, offset] = buffer.copy_(piece, non_blocking=True)
                if piece.is_cuda:
                    devices.add(piece.device)
            copies[name] = Shards(shards.info, pieces)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = used
        return copies
