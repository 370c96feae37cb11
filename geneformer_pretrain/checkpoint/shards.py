"""Rectangular pieces of tensors: what a rank holds, what a file holds, and the copy between them."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

Offset = tuple[int, ...]
Region = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a whole tensor."""

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
    pieces: dict[Offset, Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Shards":
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

    @classmethod
    def to_save(cls, name: str, tensor: Tensor, rank: int, world_size: int) -> "Shards":
        """Describe the pieces that this rank saves: of the ranks that hold the same pieces, one saves them.

        A hash of the name chooses it, so that replicas share the work evenly and need not talk to each other.
        """
        replica, replicas = rank, world_size
        if isinstance(tensor, DTensor):
            replica, replicas = 0, 1
            coordinates = tensor.device_mesh.get_coordinate() or ()
            for size, place, placement in zip(tensor.device_mesh.shape, coordinates, tensor.placements, strict=True):
                if placement.is_replicate():
                    replica, replicas = replica * size + place, replicas * size
        shards = cls.of(name, tensor)
        return shards if zlib.crc32(name.encode()) % replicas == replica else cls(shards.info, {})


@dataclass(frozen=True)
class StoredPiece:
    """A piece of a tensor in a file.

    Attributes
    ----------
    offset, shape
        Its place in the whole tensor.
    read
        Returns its values, mapped from the file where the file format allows it.
    """

    offset: Offset
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the files of a checkpoint or of a published model; its pieces do not overlap."""

    info: TensorInfo
    pieces: list[StoredPiece]

    @classmethod
    def whole(cls, tensor: Tensor) -> "StoredTensor":
        """Describe a tensor that is one piece."""
        shape = tuple(tensor.shape)
        return cls(TensorInfo(shape, tensor.dtype), [StoredPiece((0,) * tensor.ndim, shape, lambda: tensor)])

    def require_all(self, name: str, target: Shards) -> None:
        """Check that the files hold all that the target's pieces cover.

        Raises
        ------
        ValueError
            If they hold only a part.
        """
        wanted, held = 0, 0
        for offset, piece in target.pieces.items():
            wanted += piece.numel()
            for stored in self.pieces:
                regions = _overlap(stored.offset, stored.shape, offset, tuple(piece.shape))
                held += 0 if regions is None else piece[regions[1]].numel()
        if held != wanted:
            raise ValueError(f"the files hold {held} of the {wanted} elements of {name} that are needed here")

    @torch.no_grad()
    def copy_to(self, name: str, target: Shards) -> None:
        """Copy to the target's pieces, converted to their type; reads only pieces that overlap with them.

        Raises
        ------
        ValueError
            If a piece is not what the files' index says.
        """
        for stored in self.pieces:
            values: Tensor | None = None
            for offset, piece in target.pieces.items():
                regions = _overlap(stored.offset, stored.shape, offset, tuple(piece.shape))
                if regions is None:
                    continue
                if values is None:
                    values = stored.read()
                    if tuple(values.shape) != stored.shape or values.dtype != self.info.dtype:
                        raise ValueError(
                            f"a piece of {name} is {TensorInfo(tuple(values.shape), values.dtype)} in its file, but "
                            f"{TensorInfo(stored.shape, self.info.dtype)} in the file's index"
                        )
                source, destination = regions
                piece[destination].copy_(values[source])


def _overlap(
    offset: Offset, shape: tuple[int, ...], other_offset: Offset, other_shape: tuple[int, ...]
) -> tuple[Region, Region] | None:
    """Return the region that two pieces share, as seen from each of them, or None."""
    region, other_region = [], []
    for begin, size, other_begin, other_size in zip(offset, shape, other_offset, other_shape, strict=True):
        first, last = max(begin, other_begin), min(begin + size, other_begin + other_size)
        if first >= last:
            return None
        region.append(slice(first - begin, last - begin))
        other_region.append(slice(first - other_begin, last - other_begin))
    return tuple(region), tuple(other_region)
