"""The files of a checkpoint.

Format 2, the one that is written: every rank writes the pieces of tensors that it is responsible for into one
safetensors file. The file's header says which tensor each piece belongs to and where it begins, so that the files of
a checkpoint together describe it, and a reader needs nothing but safetensors. Any engine on any number of ranks reads
what any other wrote. Format 1, of release 0.1, is only read; see `format_1`.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from geneformer_pretrain.checkpoint import format_1
from geneformer_pretrain.checkpoint.shards import Shards, StoredPiece, StoredTensor, TensorInfo
from geneformer_pretrain.checkpoint.tensor_files import open_safetensors, write_safetensors

INDEX = "tensors"
"""Entry of a file's header: {name: {"shape", "dtype", "pieces": {name in the file: offset}}}, as JSON."""


def write_tensors(folder: Path, rank: int, tensors: Mapping[str, Shards]) -> list[str]:
    """Write and sync this rank's pieces, contiguous in host memory.

    Returns
    -------
    list of str
        Names of the files written: one, or none if the rank has no pieces.
    """
    pieces: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, shards in tensors.items():
        offsets = {}
        for offset, piece in shards.pieces.items():
            is_whole = tuple(piece.shape) == shards.info.shape
            key = name if is_whole else f"{name}@{','.join(map(str, offset))}"
            pieces[key], offsets[key] = piece, offset
        if offsets:
            dtype = str(shards.info.dtype).removeprefix("torch.")
            index[name] = {"shape": shards.info.shape, "dtype": dtype, "pieces": offsets}
    if not pieces:
        return []
    file = f"rank_{rank}.safetensors"
    write_safetensors(folder / file, pieces, {"format": "pt", INDEX: json.dumps(index)})
    return [file]


def open_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Open the tensors of a checkpoint without reading their values.

    Parameters
    ----------
    manifest
        As `read_manifest` returns it.

    Raises
    ------
    ValueError
        If a file is not what its format asks for.
    """
    if manifest["format_version"] == 1:
        return format_1.open_tensors(folder, manifest["format"])
    tensors: dict[str, StoredTensor] = {}
    for file in manifest["files"]:
        try:
            _add_pieces(tensors, folder / file)
        except (KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{folder / file} is no file of a checkpoint: {error!r}") from None
    return tensors


def _add_pieces(tensors: dict[str, StoredTensor], path: Path) -> None:
    """Add the pieces of one file to what is known of each tensor."""
    file = open_safetensors(path)
    for name, entry in json.loads(file.metadata()[INDEX]).items():
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{entry['dtype']} is no element type")
        info = TensorInfo(tuple(entry["shape"]), dtype)
        stored = tensors.setdefault(name, StoredTensor(info, []))
        if stored.info != info:
            raise TypeError(f"{name} is {info} here, {stored.info} in another file")
        for key, offset in entry["pieces"].items():
            shape = tuple(file.get_slice(key).get_shape())
            stored.pieces.append(StoredPiece(tuple(offset), shape, partial(file.get_tensor, key)))
