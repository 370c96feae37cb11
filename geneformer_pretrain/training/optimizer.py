"""AdamW with its parameter groups, the learning-rate schedule, and the scaled, clipped, guarded update."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from geneformer_pretrain.config.training import LrSchedule, TrainingConfig
from geneformer_pretrain.training.outliers import NormHistory


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices and embeddings but neither biases nor LayerNorm.

    Its state is materialised at once, so that saving and loading never depend on a step having been made.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def warmup_steps(config: TrainingConfig) -> int:
    """Return the steps over which the learning rate rises."""
    return config.num_train_steps // 10 if config.warmup_steps is None else config.warmup_steps


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Compute the learning rate of optimizer step `step`, counted from 0."""
    warmup = warmup_steps(config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.num_train_steps - warmup)
    factor = {
        LrSchedule.constant: 1.0,
        LrSchedule.linear: 1.0 - progress,
        LrSchedule.cosine: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_schedule]
    return config.learning_rate * factor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shards of tensors that may be sharded, in the same memory."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the L2 norm over all gradients, of all ranks where they are sharded; FP32 scalar on the device.

    Works on the local shards: it does not matter how an engine cuts its tensors.
    """
    sharded = next((g for g in gradients if isinstance(g, DTensor)), None)
    norm = torch.nn.utils.get_total_norm(local_shards(gradients)).float()
    if sharded is not None:
        squared = norm.square()
        dist.all_reduce(squared)
        mesh_axes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
        replicas = math.prod(size for size, placement in mesh_axes if placement.is_replicate())
        norm = (squared / replicas).sqrt()
    return norm


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.AdamW, scale: Tensor, max_norm: float, history: NormHistory | None = None
) -> Tensor:
    """Scale gradients, clip them and step, without the host ever waiting for the device.

    Gradients are sums; `scale` turns them into the mean over the step's masked tokens. It enters the fused
    kernel together with the clipping factor, as AMP's loss scale would. If any gradient is not finite the
    kernel changes neither weights nor optimizer state.

    It works on local shards, as AdamW is elementwise. Given the sharded tensors, PyTorch would make a description of
    each one's step count, and release 2.11 keeps all descriptions for ever: 1,000 objects a step of 106m.

    Parameters
    ----------
    scale
        FP32 scalar on the device.
    max_norm
        Largest global L2 norm of the scaled gradients; 0 does not clip.
    history
        Skips updates with an outlying norm too, and counts them.

    Returns
    -------
    The norm before clipping, FP32 scalar on the device; not finite if the update was skipped for that.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = global_norm(gradients) * scale
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    skip = ~torch.isfinite(norm)
    if history is not None:
        skip |= history.is_outlier(norm)
    grad_scale, found_inf = (1.0 / (clip * scale)).float(), skip.float()
    for group in optimizer.param_groups:
        parameters = group["params"]
        states = [optimizer.state[parameter] for parameter in parameters]
        adamw(
            local_shards(parameters),
            local_shards(parameter.grad for parameter in parameters),
            local_shards(state["exp_avg"] for state in states),
            local_shards(state["exp_avg_sq"] for state in states),
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
    return norm
