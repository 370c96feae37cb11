"""Everything that a checkpoint holds: weights, optimizer, and the position in the data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from geneformer_pretrain.console import amount
from geneformer_pretrain.data.dataset import DataFingerprint
from geneformer_pretrain.errors import ConfigError
from modeling_bert_te import BertForMaskedLM


def require_same_model(now: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError that lists the keys which make this model another function of the same weights.

    Shapes are compared when tensors are loaded. Dropout may change between a run and its resumption.
    """
    changes = [
        f"model.{name}: {saved[name]!r} in the checkpoint, {value!r} now"
        for name, value in now.items()
        if name in saved and not name.endswith("_dropout_prob") and name != "initializer_range" and saved[name] != value
    ]
    if changes:
        raise ConfigError(
            f"The model of this run differs from that of {where}:\n  " + "\n  ".join(changes) + "\n"
            "Give back the earlier values, or name another training.checkpoint_dir."
        )


@dataclass
class Progress:
    """Position of the run: steps, packs and counts.

    A field that is added needs a default, for checkpoints that do not have it.

    Attributes
    ----------
    step
        Completed optimizer steps.
    next_pack
        Number of the first pack of the endless stream that is still to be trained on.
    epoch, epoch_first_pack
        Epoch that holds `next_pack`, and the number of that epoch's first pack.
    packs_per_step
        Packs of one optimizer step, over all ranks; fixed when the run is first launched.
    tokens, cells
        Trained on so far, padding not counted.
    skipped_steps
        Updates left out because a gradient was not finite.
    outlier_steps
        Updates left out because of their gradient norm, with `training.skip_outlier_steps`.
    norm_history
        State of the history of gradient norms that decides it.
    best_step, best_loss
        Saved step with the lowest validation loss, with `training.keep_best`.
    best_of
        Fingerprint of the held-out cells and masks that the loss was computed on.
    """

    packs_per_step: int
    step: int = 0
    next_pack: int = 0
    epoch: int = 0
    epoch_first_pack: int = 0
    tokens: int = 0
    cells: int = 0
    skipped_steps: int = 0
    outlier_steps: int = 0
    norm_history: list[float] | None = None
    best_step: int | None = None
    best_loss: float | None = None
    best_of: str | None = None

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> Self:
        """Restore from a checkpoint's state; fields that a newer release added are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in known})

    def outcome(self) -> dict[str, Any]:
        """Return the steps done, and the best of them if it is known, for exit.json."""
        best = {} if self.best_step is None else {"best_step": self.best_step, "best_loss": self.best_loss}
        return {"step": self.step} | best


def state_to_save(
    progress: Progress,
    *,
    epoch: int,
    epoch_first_pack: int,
    data: DataFingerprint,
    data_files: Mapping[str, str],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect what a checkpoint keeps beside tensors, as JSON.

    Parameters
    ----------
    epoch, epoch_first_pack
        Epoch that holds `progress.next_pack`, and the number of that epoch's first pack.
    data_files
        Display names for the hashed files of `data`.
    model
        The architecture.
    """
    return {
        "progress": asdict(replace(progress, epoch=epoch, epoch_first_pack=epoch_first_pack)),
        "data": asdict(data),
        "data_files": dict(data_files),
        "model": dict(model),
    }


def accumulation_steps(packs_per_step: int, world_size: int) -> int:
    """Return the number of micro-batches per rank and step.

    Raises
    ------
    ConfigError
        `world_size` does not divide the packs of a step; the message lists the sizes that do.
    """
    if packs_per_step % world_size:
        sizes = [n for n in range(1, packs_per_step + 1) if packs_per_step % n == 0]
        raise ConfigError(
            f"This run takes {amount(packs_per_step, 'pack')} per step, which {world_size} processes cannot share "
            f"evenly. Processes that can: {', '.join(map(str, sizes))}."
        )
    return packs_per_step // world_size


def named_tensors(model: BertForMaskedLM, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Collect weights and optimizer state by canonical name; sharded engines give DTensors.

    AdamW counts the same steps for each parameter, so one count stands for all.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.canonical_parameters():
        state = optimizer.state[parameter]
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"optimizer.exp_avg.{name}"] = state["exp_avg"]
        tensors[f"optimizer.exp_avg_sq.{name}"] = state["exp_avg_sq"]
        tensors["optimizer.step"] = state["step"]
    return tensors


@torch.no_grad()
def broadcast_step_count(optimizer: torch.optim.AdamW, step: Tensor) -> None:
    """Give each parameter the step count that was loaded for one of them."""
    for state in optimizer.state.values():
        state["step"].copy_(step)
