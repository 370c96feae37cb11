"""The precision policy: FP32 main weights and optimizer state, one compute dtype for everything else."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.config.training import Fp8Recipe
from geneformer_pretrain.errors import require
from geneformer_pretrain.kernels.fp8_scaling import DelayedScaling
from modeling_bert_te import BertForMaskedLM, BertLayer, te_linear

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
        remedy = "set model.use_te_layers=False for PyTorch layers, the same mathematics"
        remedy += ", and off Hopper GPUs training.use_fp8=False." if fp8 else "."
        require(on_gpu, f"model.use_te_layers=True needs a CUDA GPU, and none is visible here; {remedy}")
        require(
            find_spec("transformer_engine") is not None,
            f"model.use_te_layers=True needs Transformer Engine, which is not installed; install it, or {remedy}",
        )
    if fp8:
        require(on_gpu, "training.use_fp8=True needs a CUDA GPU, and none is visible here; set training.use_fp8=False.")
        capability = torch.cuda.get_device_capability(device)
        require(
            capability >= FP8_CAPABILITY,
            f"training.use_fp8=True needs compute capability 8.9 or higher; {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}; set training.use_fp8=False for BF16.",
        )
        if config.model.use_te_layers:
            _check_recipe(config.training.fp8_recipe)
    require(
        not config.training.tensorboard or find_spec("tensorboard") is not None,
        "training.tensorboard=True needs TensorBoard, which is not installed; install it (pip install tensorboard), or "
        "set training.tensorboard=False.",
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


def _check_recipe(recipe: Fp8Recipe) -> None:
    """Raise ConfigError for a recipe of Transformer Engine's that this GPU does not have."""
    if recipe in (Fp8Recipe.delayed, Fp8Recipe.current):
        return
    import transformer_engine.pytorch as te

    available: dict[Fp8Recipe, Callable[..., tuple[bool, str]]] = {
        Fp8Recipe.block: te.is_fp8_block_scaling_available,
        Fp8Recipe.mxfp8: te.is_mxfp8_available,
        Fp8Recipe.nvfp4: te.is_nvfp4_available,
    }
    there, reason = available[recipe](return_reason=True)
    require(
        there,
        f"training.fp8_recipe={recipe} does not run on {torch.cuda.get_device_name()}: {reason} "
        "Choose delayed or current.",
    )


class Precision:
    """How matrix products are computed: in the compute dtype, unless a subclass says otherwise."""

    def forward(self) -> AbstractContextManager[None]:
        """Make the context of a forward pass."""
        return nullcontext()

    def end_step(self) -> None:
        """Update scales after the last backward of a step; collective, without a wait of the host."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield scales and histories that a checkpoint keeps, by name."""
        return iter(())


class KernelFp8(Precision):
    """FP8 with delayed scaling by the kernels of `kernels.fp8`, for PyTorch layers.

    Parameters
    ----------
    model
        Its layers get kernels of their own.
    """

    def __init__(self, model: BertForMaskedLM, device: torch.device) -> None:
        from geneformer_pretrain.kernels.adapters import TritonFp8

        layers = cast(list[BertLayer], list(model.bert.encoder["layer"].children()))
        self.scaling = DelayedScaling(len(layers), device)
        for number, layer in enumerate(layers):
            layer.set_fused_kernels(TritonFp8(self.scaling.layer(number)))

    def end_step(self) -> None:
        """Turn the step's maxima into scales."""
        self.scaling.update()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield them by the names of Transformer Engine's, which has the same."""
        return self.scaling.state()


class TransformerEngineFp8(Precision):
    """FP8 by Transformer Engine layers."""

    def __init__(self, model: BertForMaskedLM, choice: Fp8Recipe) -> None:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe

        recipes = {
            Fp8Recipe.delayed: recipe.DelayedScaling,
            Fp8Recipe.current: recipe.Float8CurrentScaling,
            Fp8Recipe.block: recipe.Float8BlockScaling,
            Fp8Recipe.mxfp8: recipe.MXFP8BlockScaling,
            Fp8Recipe.nvfp4: recipe.NVFP4BlockScaling,
        }
        self.model, self.autocast, self.recipe = model, te.autocast, recipes[choice]()

    def forward(self) -> AbstractContextManager[None]:
        """Make Transformer Engine's context, which also updates scales over all ranks when it ends."""
        return self.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=dist.group.WORLD)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield those of delayed scaling; they are created here if no forward pass has created them yet.

        Maxima are reduced over all ranks when they turn into scales, so ranks differ in the newest entry of a history
        at most.
        """
        linears: list[tuple[str, Any]] = [(n, m) for n, m in self.model.named_modules() if isinstance(m, te_linear())]
        with torch.no_grad(), self.forward():
            for _, linear in linears:
                linear.init_fp8_metadata()
        for name, linear in linears:
            for direction in ("scaling_fwd", "scaling_bwd"):
                state = linear.fp8_meta[direction]
                if hasattr(state, "amax_history"):
                    yield f"{name}.{direction}.scale", state.scale
                    yield f"{name}.{direction}.amax_history", state.amax_history


def make_precision(config: Config, model: BertForMaskedLM, device: torch.device) -> Precision:
    """Make the precision that a configuration asks for, and prepare the model for it."""
    if not config.training.use_fp8:
        return Precision()
    if config.model.use_te_layers:
        return TransformerEngineFp8(model, config.training.fp8_recipe)
    return KernelFp8(model, device)
