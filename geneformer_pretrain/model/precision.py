"""The precision policy: FP32 main weights and optimizer state, one compute dtype for everything else."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.config.training import Fp8Recipe
from geneformer_pretrain.errors import require
from modeling_bert_te import te_linear

FP8_CAPABILITY = (8, 9)
"""Compute capability from which GPUs have FP8 matrix units."""

NVFSDP_RELEASES = "0.6."
"""Releases of megatron-fsdp whose experimental interface `parallel` is written for."""


def check_machine(config: Config, device: torch.device) -> None:
    """Check that this machine and installation have what the configuration asks for.

    Raises
    ------
    ConfigError
        Naming the key and the remedy.
    """
    on_gpu = device.type == "cuda"
    fp8 = config.training.use_fp8
    if config.model.use_te_layers:
        keys = "training.use_fp8=False and model.use_te_layers=False" if fp8 else "model.use_te_layers=False"
        remedy = f"set {keys} for PyTorch layers in BF16 or FP32, the same mathematics."
        require(on_gpu, f"model.use_te_layers=True needs a CUDA GPU, and none is visible here; {remedy}")
        require(
            find_spec("transformer_engine") is not None,
            f"model.use_te_layers=True needs Transformer Engine, which is not installed; install it, or {remedy}",
        )
    if fp8:
        capability = torch.cuda.get_device_capability(device)
        require(
            capability >= FP8_CAPABILITY,
            f"training.use_fp8=True needs compute capability 8.9 or higher; {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}; set training.use_fp8=False for BF16.",
        )
    if config.training.use_nvfsdp:
        remedy = "set training.use_nvfsdp=False for DDP, or training.use_fsdp2=True to shard with FSDP2."
        require(on_gpu, f"training.use_nvfsdp=True needs CUDA GPUs, and none is visible here; {remedy}")
        require(
            find_spec("megatron_fsdp") is not None,
            f"training.use_nvfsdp=True needs megatron-fsdp, which is not installed; install it, or {remedy}",
        )
        version = metadata.version("megatron-fsdp")
        require(
            version.startswith(NVFSDP_RELEASES),
            f"training.use_nvfsdp=True was made for megatron-fsdp {NVFSDP_RELEASES}x, whose interface changes between "
            f"releases; {version} is installed. Install 'megatron-fsdp~={NVFSDP_RELEASES}1', or {remedy}",
        )


def forward_context(config: Config) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that makes the context of a forward pass: Transformer Engine's FP8 context, or none.

    Raises
    ------
    ConfigError
        A recipe that this GPU does not have.
    """
    if not config.training.use_fp8:
        return nullcontext
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    choice = config.training.fp8_recipe
    available: dict[Fp8Recipe, Callable[..., tuple[bool, str]]] = {
        Fp8Recipe.block: te.is_fp8_block_scaling_available,
        Fp8Recipe.mxfp8: te.is_mxfp8_available,
        Fp8Recipe.nvfp4: te.is_nvfp4_available,
    }
    if choice in available:
        there, reason = available[choice](return_reason=True)
        require(
            there,
            f"training.fp8_recipe={choice} does not run on {torch.cuda.get_device_name()}: {reason} "
            "Choose delayed or current.",
        )
    chosen = {
        Fp8Recipe.delayed: recipe.DelayedScaling,
        Fp8Recipe.current: recipe.Float8CurrentScaling,
        Fp8Recipe.block: recipe.Float8BlockScaling,
        Fp8Recipe.mxfp8: recipe.MXFP8BlockScaling,
        Fp8Recipe.nvfp4: recipe.NVFP4BlockScaling,
    }[choice]()

    def context() -> AbstractContextManager[None]:
        return te.autocast(enabled=True, recipe=chosen, amax_reduction_group=dist.group.WORLD)

    return context


def fp8_state(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[tuple[str, Tensor]]:
    """Yield scales and amax histories of delayed scaling, by name; nothing for recipes without a memory.

    Those of a checkpoint are rank 0's: maxima are reduced over all ranks when they turn into scales, so that ranks
    differ in the newest entry of a history at most. They are created here if no forward pass has created them yet.
    """
    if context is nullcontext:
        return
    linears: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, te_linear())]
    with torch.no_grad(), context():
        for _, linear in linears:
            linear.init_fp8_metadata()
    for name, linear in linears:
        for direction in ("scaling_fwd", "scaling_bwd"):
            state = linear.fp8_meta[direction]
            if hasattr(state, "amax_history"):
                yield f"{name}.{direction}.scale", state.scale
                yield f"{name}.{direction}.amax_history", state.amax_history
