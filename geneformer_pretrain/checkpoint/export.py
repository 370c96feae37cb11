"""Final export: a plain Hugging Face BERT in FP32, one safetensors file, none of this project's keys."""

import errno
import json
import os
import stat
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.distributed.engines import Engine
from geneformer_pretrain.files import delete_folder


def gather_weights(engine: Engine, is_main: bool) -> dict[str, Tensor]:
    """Return all weights in host memory, on the main rank alone; collective, every rank must call it.

    They are gathered one tensor at a time, so that no GPU ever holds the whole model.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.model.canonical_parameters():
        whole = engine.gather_full(parameter.detach())
        if is_main:
            tensors[name] = whole.to("cpu", torch.float32, copy=True).contiguous()
    return tensors


def write_model(tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; called on one rank.

    The folder appears under its name only when it is complete; an earlier export is replaced, unless it is read-only.

    Raises
    ------
    OSError
        Naming the path that cannot be written, replaced or deleted.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if folder.exists() and not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    temporary, previous = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".replaced")
    _remove(temporary)  # as an interrupted export leaves it
    temporary.mkdir(parents=True)
    weights, description = temporary / "model.safetensors", temporary / "config.json"
    save_file(tensors, weights, metadata={"format": "pt"})
    stock = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "torch_dtype": "float32"}
    description.write_text(json.dumps({**stock, **config.architecture()}, indent=2) + "\n")
    weights.chmod(stat.S_IMODE(description.stat().st_mode))  # safetensors lets nobody else read it, whatever the umask
    for path in (weights, description):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if os.path.lexists(folder):
        _remove(previous)
        folder.rename(previous)
    temporary.rename(folder)
    _remove(previous)


def _remove(folder: Path) -> None:
    """Delete a folder, if it is there; errors name it, where those of `delete_folder` name only a file inside."""
    try:
        delete_folder(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
