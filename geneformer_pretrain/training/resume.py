"""Goes on from a checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from geneformer_pretrain.checkpoint.manifest import read_manifest
from geneformer_pretrain.checkpoint.state import (
    Progress,
    accumulation_steps,
    broadcast_step_count,
    require_same_model,
)
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import amount
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.errors import ConfigError

FP8_PREFIX = "fp8."
"""Prefix of FP8 scaling state in checkpoints; optional, since precision may change on resume."""


def resume(
    path: Path,
    store: CheckpointStore,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    config: Config,
    data: DataSource,
    packs_per_step: int,
    say: Callable[[str], None],
) -> Progress:
    """Load a checkpoint into the tensors of a run; collective.

    Parameters
    ----------
    path
        A verified checkpoint of `store`.
    tensors
        By canonical name; filled in place.
    packs_per_step
        As the configuration asks for; the checkpoint's own number counts.
    say
        Prints a line on the main rank.

    Returns
    -------
    Progress
        Of the run that goes on.

    Raises
    ------
    ConfigError
        On every rank: another model, other data, or a world size that does not divide the packs of a step.
    CheckpointError
        A damaged checkpoint.
    """
    state = read_manifest(path)["state"]
    progress = Progress.from_state(state["progress"])
    files = data.files, state.get("data_files", {})
    other_data = config.training.accept_changed_data and bool(data.fingerprint.changes(state["data"], *files))

    def check() -> None:
        require_same_model(config.model.architecture(), state.get("model", {}), str(path))
        accumulation_steps(progress.packs_per_step, store.ranks.size)
        if not other_data:
            data.fingerprint.require_same(state["data"], str(path), *files)

    store.ranks.run_on_all_ranks(check, ConfigError)
    if other_data:
        say("The data changed: going on from the start of a new epoch.")
        progress.epoch, progress.epoch_first_pack = progress.epoch + 1, progress.next_pack
    store.load(path, tensors, optional=FP8_PREFIX)
    broadcast_step_count(optimizer, tensors["optimizer.step"])
    say(f"Resumed from {path}: {amount(progress.step, 'step')} done.")
    if progress.packs_per_step != packs_per_step:
        say(
            f"This run keeps its {amount(progress.packs_per_step, 'pack')} per step; the configuration now asks for "
            f"{packs_per_step}. Accumulation follows."
        )
    if config.training.init_from is not None:
        say("training.init_from does not count: the weights are those of the checkpoint.")
    return progress
