"""Export: a plain Hugging Face BERT in FP32, one safetensors file, none of this project's configuration keys."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.formats import open_tensors
from geneformer_pretrain.checkpoint.manifest import MANIFEST, find_damage, read_manifest, step_folders
from geneformer_pretrain.checkpoint.shards import Shards
from geneformer_pretrain.checkpoint.tensor_files import write_safetensors
from geneformer_pretrain.config.model import ARCHITECTURE, MAX_TOKENS_KEY
from geneformer_pretrain.distributed.engines import Engine
from geneformer_pretrain.errors import CheckpointError
from geneformer_pretrain.files import new_folder

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

MODEL_PREFIX = "model."
"""Prefix of the names of weights in a checkpoint."""

GENE_SET_SUFFIXES = (".parquet", ".json", ".txt")
"""Files of a gene-set folder that belong to it; an exported model, which is one too, has weights beside them."""


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


def write_model(
    tensors: dict[str, Tensor],
    architecture: Mapping[str, Any],
    seq_length: int | None,
    folder: Path,
    *,
    gene_set: Path | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`; called on one rank.

    The folder appears under its name only when it is complete; an earlier export is replaced, unless it is read-only.

    Parameters
    ----------
    tensors
        Weights by canonical name, FP32, in host memory.
    architecture
        The keys of the model group that stock BERT knows.
    seq_length
        Tokens of the longest cell in training, if known; noted where the model has more positions.
    gene_set
        Gene-set folder to copy into the export; stock classes ignore it.

    Raises
    ------
    OSError
        Naming the path that cannot be written, replaced or deleted.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if folder.exists() and not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    stock = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "torch_dtype": "float32"}
    config = {**stock, **{key: architecture[key] for key in ARCHITECTURE}}
    if seq_length is not None and seq_length < config["max_position_embeddings"]:
        config[MAX_TOKENS_KEY] = seq_length
    with new_folder(folder, overwrite=True) as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        for file in () if gene_set is None else sorted(gene_set.iterdir()):
            if file.suffix in GENE_SET_SUFFIXES and file.name != CONFIG_FILE:
                shutil.copyfile(file, temporary / file.name)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], int | None]:
    """Read the weights of a checkpoint that any engine wrote, whole, in host memory; changes nothing in the folder.

    Returns
    -------
    tuple
        Weights by canonical name, the architecture, and the tokens of the longest cell in training.

    Raises
    ------
    CheckpointError
        If the checkpoint is damaged or of a newer release.
    """
    damage = find_damage(folder)
    if damage is not None:
        raise CheckpointError(f"{folder} cannot be exported: {damage}")
    manifest = read_manifest(folder)
    weights: dict[str, Tensor] = {}
    try:
        for name, stored in open_tensors(folder, manifest).items():
            if name.startswith(MODEL_PREFIX):
                whole = torch.empty(stored.info.shape, dtype=torch.float32)
                shards = Shards.of(name, whole)
                stored.require_all(name, shards)
                stored.copy_to(name, shards)
                weights[name.removeprefix(MODEL_PREFIX)] = whole
    except ValueError as error:
        raise CheckpointError(f"{folder} cannot be exported: {error}") from None
    state = manifest["state"]
    return weights, state["model"], state.get("data", {}).get("seq_length")


def find_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint that a step folder or the folder of a run stands for.

    Returns
    -------
    tuple
        `folder` itself if it is a checkpoint, else the newest one in it that is not damaged; and a line on each
        damaged one that was passed over.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder, []
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give a run's folder or one of its step_N folders")
    faults: list[str] = []
    for step_folder in step_folders(folder):
        damage = find_damage(step_folder)
        if damage is None:
            return step_folder, faults
        faults.append(f"{step_folder} is damaged: {damage}")
    raise CheckpointError("; ".join([f"{folder} has no checkpoint that can be exported", *faults]))
