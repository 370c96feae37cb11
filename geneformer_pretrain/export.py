"""Final export: a plain Hugging Face BERT in FP32, one safetensors file, none of this project's keys."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .parallel import Engine, architecture


def gather_weights(engine: Engine, is_main: bool) -> dict[str, Tensor]:
    """Return all weights in host memory, on the main rank alone; collective, every rank must call it.

    They are gathered one tensor at a time, so that no GPU ever holds the whole model.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.model.canonical_parameters():
        whole = engine.gather(parameter.detach())
        if is_main:
            tensors[name] = whole.to("cpu", torch.float32, copy=True).contiguous()
    return tensors


def write_model(tensors: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; called on one rank.

    The folder appears under its name only when it is complete; an earlier export is replaced.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    stock = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "torch_dtype": "float32"}
    content = json.dumps({**stock, **architecture(config)}, indent=2) + "\n"
    (temporary / "config.json").write_text(content)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        previous = folder.with_name(folder.name + ".old")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous)
    else:
        temporary.rename(folder)
