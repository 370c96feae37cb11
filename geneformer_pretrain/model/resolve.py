"""Decides every `auto` and `null` of a configuration, for the machine that runs it."""

import logging
from dataclasses import replace
from importlib import metadata

import torch

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.config.training import ComputeDtype
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.engines import shard_group_size
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.kernels.select import use_triton_attention, use_triton_fused
from geneformer_pretrain.model.memory import estimate_peak, num_parameters
from geneformer_pretrain.model.precision import check_machine

log = logging.getLogger(__name__)

MAX_GRAPH_WIDTH = 1024
"""Largest hidden size for which `cuda_graphs: null` enables graphs. Wider models are not launch-bound, and a graph's
memory pool cannot be reused."""

KEEP_GATHERED_BELOW = 0.85
"""Keep weights gathered only if the estimated peak is below this share of GPU memory (estimates are within 4%)."""

DTYPES = {ComputeDtype.float32: torch.float32, ComputeDtype.bfloat16: torch.bfloat16}


def resolve_on_all_ranks(config: Config, world: World, ranks: Ranks) -> Resolved:
    """Decide, and check that all ranks decide the same; collective.

    Where ranks have GPUs of different sizes, the smallest one decides about resharding. Different GPU models are
    logged.

    Raises
    ------
    ConfigError
        On every rank: something that a machine cannot run, or choices that differ.
    """

    def decide() -> Resolved:
        check_machine(config, world.device)
        shard_group_size(config, world)
        return resolve(config, world)

    choices = ranks.run_on_all_ranks(decide, ConfigError)
    reshard = any(choice.reshard_after_forward for choice in choices)
    resolved = replace(choices[world.rank], reshard_after_forward=reshard)
    devices = {choice.device for choice in choices}
    if len(devices) > 1 and world.is_main:
        log.warning("the ranks have different GPUs: %s", ", ".join(sorted(devices)))
    ranks.require_equal(replace(resolved, device="").values(), ConfigError)
    return resolved


def resolve(config: Config, world: World) -> Resolved:
    """Decide on this rank.

    Raises
    ------
    ConfigError
        A choice asked for by name that this machine cannot run.
    """
    device = world.device
    on_gpu = device.type == "cuda"
    dtype = resolve_dtype(config.training.compute_dtype, device)
    compiled = on_gpu and config.data.packing if config.training.compile is None else config.training.compile
    fused = use_triton_fused(config.model, device, DTYPES[dtype], fp8=config.fp8_by_kernels)
    return Resolved(
        compute_dtype=dtype,
        compile=compiled,
        cuda_graphs=use_cuda_graphs(config, world, compiled),
        reshard_after_forward=_reshard(config, world, dtype),
        attention_kernel=Kernel.triton if use_triton_attention(config.model, device, DTYPES[dtype]) else Kernel.torch,
        fused_kernels=Kernel.triton if fused else Kernel.torch,
        world_size=world.size,
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        cuda=str(torch.version.cuda) if on_gpu else "none",
        triton=_version("triton") if on_gpu else "none",
    )


def resolve_dtype(choice: ComputeDtype, device: torch.device) -> ComputeDtype:
    """Decide the dtype of activations and of the weights' working copies.

    Raises
    ------
    ConfigError
        BF16 on a GPU without it.
    """
    if choice is ComputeDtype.float32 or (choice is ComputeDtype.auto and device.type == "cpu"):
        return ComputeDtype.float32
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has no BF16 matrix units; set training.compute_dtype=float32."
        )
    return ComputeDtype.bfloat16


def use_cuda_graphs(config: Config, world: World, compiled: bool) -> bool:
    """Decide whether micro-batches are recorded: as `training.cuda_graphs` says, or where it is faster.

    Raises
    ------
    ConfigError
        Asked for where it is not possible.
    """
    training = config.training
    missing = {
        "a GPU": world.device.type != "cuda",
        "compiled blocks: training.compile=true and data.packing=true": not compiled,
        "training.use_fsdp2=false and training.use_nvfsdp=false": training.use_fsdp2 or training.use_nvfsdp,
        "model.use_te_layers=false: Transformer Engine computes on the host too": config.model.use_te_layers,
        "training.recompute_every_n_layers=0": training.recompute_every_n_layers > 0,
        "BF16: in FP32 attention loops over the cells on the host": training.compute_dtype is ComputeDtype.float32,
    }
    unsupported = [need for need, is_missing in missing.items() if is_missing]
    if training.cuda_graphs and unsupported:
        raise ConfigError(
            f"training.cuda_graphs=true needs {unsupported[0]}; change that, or set training.cuda_graphs=null."
        )
    # Between nodes, gradients had better be reduced while others are still being computed.
    pays = config.model.hidden_size <= MAX_GRAPH_WIDTH and world.nodes == 1
    wanted = pays if training.cuda_graphs is None else training.cuda_graphs
    return wanted and not unsupported


def _reshard(config: Config, world: World, dtype: ComputeDtype) -> bool:
    """Decide whether gathered weights are freed until the backward: if asked, or if keeping them may not fit."""
    training = config.training
    asked = training.reshard_after_forward
    if asked is not None:
        return asked
    if not (training.use_fsdp2 or training.use_nvfsdp) or world.device.type != "cuda":
        return True
    room = KEEP_GATHERED_BELOW * torch.cuda.get_device_properties(world.device).total_memory
    itemsize = DTYPES[dtype].itemsize
    return estimate_peak(config, world.size, num_parameters(config.model), itemsize, reshards=False) > room


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
