"""The one place where the engines differ: how a model is sharded, called and gathered on many ranks.

A sharding engine shards each layer as soon as it is built, so that no rank ever holds the whole model:
`sharding` gives the function that does it, `make_engine` wraps the finished model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import require
from modeling_bert_te import BertForMaskedLM

Shard = Callable[[nn.Module], None]


def full_tensor(x: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@dataclass(frozen=True)
class Engine:
    """A model made ready for training on all ranks.

    Attributes
    ----------
    name
        "ddp", "fsdp2" or "nvfsdp".
    model
        Owns the parameters under their canonical names.
    forward_module
        The module to call: `model` itself, or its wrapper.
    gradient_divisor
        The engine divides gradients by this when it sums them over the ranks.
    accumulation_context
        Makes the context of one micro-batch's forward and backward. The argument is true for the last one of a step;
        before it, DDP and the replicas of hybrid sharding need not reduce gradients.
    reshard
        Frees gathered weights after forward passes that had no backward.
    gather_full
        Gathers a tensor that may be sharded; collective.
    prepare_for_checkpoint
        Exchanges the bounds of uneven shards, in place, before tensors are saved or loaded; collective.
    push_weights
        Gives changed weights to forward and backward, where these use copies of their own: after a load or an update.
    require_pushed
        Raises TrainingError where such copies are not the weights.
    """

    name: str
    model: BertForMaskedLM
    forward_module: nn.Module
    gradient_divisor: float
    accumulation_context: Callable[[bool], AbstractContextManager[None]]
    reshard: Callable[[], None] = lambda: None
    gather_full: Callable[[Tensor], Tensor] = full_tensor
    prepare_for_checkpoint: Callable[[dict[str, Tensor]], object] = lambda tensors: None
    push_weights: Callable[[], None] = lambda: None
    require_pushed: Callable[[], None] = lambda: None


def sharding(config: Config, world: World, resolved: Resolved, compute_dtype: torch.dtype) -> Shard | None:
    """Make the function that shards a module in place, or return None for DDP, which does not shard."""
    if config.training.use_fsdp2:
        return fsdp2_sharding(sharding_mesh(config, world), compute_dtype, resolved.reshard_after_forward)
    if config.training.use_nvfsdp:
        from geneformer_pretrain.distributed import nvfsdp

        return nvfsdp.make_sharding(sharding_mesh(config, world), compute_dtype, resolved.reshard_after_forward)
    return None


def make_engine(
    model: BertForMaskedLM, shard: Shard | None, config: Config, world: World, resolved: Resolved
) -> Engine:
    """Make a built model, whose layers are sharded already, ready for training; collective."""
    if shard is None:
        return _ddp(model, world, resolved.cuda_graphs)
    if config.training.use_fsdp2:
        return _fsdp2(model, shard, world, resolved.reshard_after_forward)
    return _nvfsdp(model, shard, world)


def _ddp(model: BertForMaskedLM, world: World, cuda_graphs: bool) -> Engine:
    if world.size == 1 or cuda_graphs:
        # Nobody to share gradients with, or they are summed where micro-batches are replayed.
        return Engine("ddp", model, model, 1.0, lambda last: nullcontext())
    # Layers are compiled one by one already. Cut further, at DDP's buckets, they would draw other dropout than alone.
    torch._dynamo.config.optimize_ddp = False
    module = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )

    def accumulation_context(last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else module.no_sync()

    return Engine("ddp", model, module, float(world.size), accumulation_context)


def shard_group_size(config: Config, world: World) -> int:
    """Return the number of ranks that share one copy of the weights.

    Raises
    ------
    ConfigError
        It does not divide the number of ranks.
    """
    size = config.training.shard_group_size or world.size
    require(
        world.size % size == 0,
        f"training.shard_group_size={size} does not divide the {world.size} processes of this run; sizes that do: "
        f"{', '.join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)}.",
    )
    return size


def sharding_mesh(config: Config, world: World) -> DeviceMesh:
    """Make the mesh with the axis "shard" over all ranks, or "replicate" and "shard" for hybrid sharding; collective.

    Raises
    ------
    ConfigError
        As `shard_group_size`.
    """
    size = shard_group_size(config, world)
    if size == world.size:
        return init_device_mesh(world.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def fsdp2_sharding(
    mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> Callable[[nn.Module], None]:
    """Make FSDP2's sharding function: weights are gathered in the compute dtype, gradients reduced in FP32."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )

    def shard(module: nn.Module) -> None:
        # None: all but the root, whose weights the backward needs at once.
        fully_shard(module, mesh=mesh, reshard_after_forward=None if reshard_after_forward else False, mp_policy=policy)

    return shard


def _fsdp2(
    model: BertForMaskedLM, shard: Callable[[nn.Module], None], world: World, reshard_after_forward: bool
) -> Engine:
    shard(model)

    def accumulation_context(last: bool) -> AbstractContextManager[None]:
        # Gradients are scattered after each micro-batch: whole ones in FP32 would not fit. Replicas add theirs once.
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(reshard_after_forward or last)  # The next micro-batch has the same weights.
        return nullcontext()

    def reshard() -> None:
        # Without a backward, weights stay gathered: the optimizer's shards would not be the model's parameters.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return Engine("fsdp2", model, model, float(world.size), accumulation_context, reshard)


def _nvfsdp(model: BertForMaskedLM, shard: Callable[[nn.Module], None], world: World) -> Engine:
    from megatron_fsdp.experimental import microbatch
    from megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor, uneven_dtensor_to_full_tensor

    from geneformer_pretrain.distributed import nvfsdp

    shard(model)
    nvfsdp.keep_gradients_until_reduced(model)
    return Engine(
        "nvfsdp",
        model,
        model,
        float(world.size),
        accumulation_context=lambda last: microbatch(model, last),
        reshard=lambda: nvfsdp.free_gathered(model),
        gather_full=uneven_dtensor_to_full_tensor,
        prepare_for_checkpoint=preprocess_state_dict_for_uneven_dtensor,
        push_weights=lambda: nvfsdp.push_weights(model),
        require_pushed=lambda: nvfsdp.require_pushed(model),
    )
