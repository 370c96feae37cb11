"""Reads the files of checkpoints that release 0.1 wrote: one pickle of tensors, or a torch distributed checkpoint.

Only tensors are ever unpickled. The index of a distributed checkpoint, `.metadata`, is a pickle too; it is read with
stand-ins for the few classes that describe tensors, and every other name in it is refused before it is looked up.
"""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.shards import StoredPiece, StoredTensor, TensorInfo
from geneformer_pretrain.checkpoint.tensor_files import load_pickled, refusal


def open_tensors(folder: Path, format: str) -> dict[str, StoredTensor]:
    """Open the tensors of a checkpoint without reading their values.

    Parameters
    ----------
    format
        "full" for `checkpoint.pt`, "sharded" for `*.distcp` with `.metadata`.

    Raises
    ------
    ValueError
        If a file is damaged or holds anything but tensors.
    """
    if format == "full":
        return {name: StoredTensor.whole(tensor) for name, tensor in load_pickled(folder / "checkpoint.pt").items()}
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        return _tensors_of(folder, metadata)
    except (pickle.UnpicklingError, AttributeError, TypeError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no index of tensors: {error}") from None


def _tensors_of(folder: Path, metadata: Any) -> dict[str, StoredTensor]:
    """Join the two tables of `.metadata`: pieces of each tensor, and where each piece lies."""
    places = {(index.fqn, tuple(index.offset)): place for index, place in metadata.storage_data.items()}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        pieces = []
        for chunk in entry.chunks:
            place = places[name, tuple(chunk.offsets)]
            file = folder / Path(place.relative_path).name
            read = partial(_read_piece, file, place.offset, place.length)
            pieces.append(StoredPiece(tuple(chunk.offsets), tuple(chunk.sizes), read))
        tensors[name] = StoredTensor(TensorInfo(tuple(entry.size), entry.properties.dtype), pieces)
    return tensors


def _read_piece(path: Path, offset: int, length: int) -> Tensor:
    """Read one piece, which `torch.save` wrote into the middle of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        content = io.BytesIO(file.read(length))
    try:
        tensor = torch.load(content, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, error)) from None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} holds a {type(tensor).__name__} in place of a tensor")
    return tensor


class _Record:
    """Stands for a dataclass of torch.distributed.checkpoint: pickle fills in its fields."""


class _Properties(_Record):
    """Stands for TensorProperties, whose state is a tuple that begins with the dtype."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


_METADATA = "torch.distributed.checkpoint.metadata"
_STAND_INS: dict[tuple[str, str], Any] = {
    **{
        (_METADATA, name): _Record
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata")
    },
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): lambda code: code,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch.serialization", "_get_layout"): str,
    **{("torch", str(value)[6:]): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"refused to unpickle {module}.{name}, which describes no tensor")
        return _STAND_INS[module, name]
