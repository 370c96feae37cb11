"""The one place where the engines differ: how a model is built, sharded and called on many ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from geneformer_pretrain.config.schema import Config, ModelConfig
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import require
from geneformer_pretrain.kernels.select import choose_attention, choose_fused
from geneformer_pretrain.model.initialization import initialize_weights
from geneformer_pretrain.model.memory import estimate_peak
from geneformer_pretrain.training.optimizer import full_tensor
from modeling_bert_te import BertConfig, BertForMaskedLM, BertLayer

KEEPING_SHARE = 0.85
"""Of a GPU's memory: FSDP2 keeps weights gathered where the estimate, which may be 4% off, then stays below it."""

ARCHITECTURE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


@dataclass(frozen=True)
class Engine:
    """A model made ready for training on all ranks.

    Attributes
    ----------
    name
        "ddp", "fsdp2" or "nvfsdp".
    model
        Owns the parameters under their canonical names.
    module
        What to call; `model` itself, or its wrapper.
    gradient_divisor
        The engine divides gradients by this when it sums them over the ranks.
    micro_batch
        Context for one micro-batch's forward and backward; the argument says whether it is the last of its
        step, before which DDP and replicas of hybrid sharding need not reduce gradients.
    checkpoint_format
        "full" for one file, "sharded" for a distributed checkpoint.
    end_evaluation
        To be called after forward passes that had no backward.
    gather
        The whole of a tensor that may be sharded; collective.
    describe_shards
        Makes tensors ready for a distributed checkpoint, in place; collective.
    """

    name: str
    model: BertForMaskedLM
    module: nn.Module
    gradient_divisor: float
    micro_batch: Callable[[bool], AbstractContextManager[None]]
    checkpoint_format: str
    end_evaluation: Callable[[], None] = lambda: None
    gather: Callable[[Tensor], Tensor] = full_tensor
    describe_shards: Callable[[dict[str, Tensor]], object] = lambda tensors: None


def architecture(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys of the model group that stock BERT knows."""
    return {key: getattr(config, key) for key in ARCHITECTURE_KEYS}


def check_engine(config: Config, world: World, compute_dtype: torch.dtype) -> None:
    """Check what `build_engine` needs of the configuration, each rank for itself: none waits for another.

    Raises
    ------
    ConfigError
        Kernels that this machine cannot run, or groups of ranks that do not come out even.
    """
    shard_group_size(config, world)
    choose_attention(config, world.device, compute_dtype)
    choose_fused(config, world.device, compute_dtype)


def build_engine(
    config: Config,
    world: World,
    compute_dtype: torch.dtype,
    compile_blocks: bool,
    with_graphs: bool = False,
    reshards: bool = True,
) -> Engine:
    """Build, initialise, compile and distribute the model.

    It grows layer by layer; sharding engines shard each layer as soon as it is initialised, so that no rank
    ever holds the whole.

    Raises
    ------
    ConfigError
        As `check_engine`.
    """
    shard: Callable[[nn.Module], None] = lambda module: None  # noqa: E731
    if config.training.use_fsdp2:
        shard = fsdp2_sharding(sharding_mesh(config, world), compute_dtype, reshards)
    elif config.training.use_nvfsdp:
        shard = nvfsdp_sharding(sharding_mesh(config, world))
    use_te = config.model.use_te_layers
    recompute = config.training.recompute_every_n_layers
    stock_config = BertConfig(**architecture(config.model))

    def initialize(module: nn.Module, prefix: str) -> None:
        initialize_weights(
            module, prefix, config.training.seed, config.model.initializer_range, config.model.pad_token_id
        )

    with world.device:
        model = BertForMaskedLM(BertConfig(**architecture(config.model) | {"num_hidden_layers": 0}), use_te)
        initialize(model, "")
        layers = cast(nn.ModuleList, model.bert.encoder["layer"])
        for number in range(config.model.num_hidden_layers):
            layer = BertLayer(stock_config, use_te)
            initialize(layer, f"bert.encoder.layer.{number}")
            layer.gradient_checkpointing = recompute > 0 and number % recompute == 0
            if compile_blocks:
                layer.compile_in_place()
            shard(layer)
            layers.append(layer)
    model.config.num_hidden_layers = config.model.num_hidden_layers
    model.bert.embeddings.compute_dtype = compute_dtype
    model.set_attention(choose_attention(config, world.device, compute_dtype))
    model.set_fused_kernels(choose_fused(config, world.device, compute_dtype))
    if compile_blocks:
        model.compile_embeddings_and_head()
    model.train()
    if config.training.use_fsdp2:
        return _fsdp2(model, shard, world, reshards)
    if config.training.use_nvfsdp:
        return _nvfsdp(model, shard, world)
    return _ddp(model, world, with_graphs)


def _ddp(model: BertForMaskedLM, world: World, with_graphs: bool) -> Engine:
    if world.size == 1 or with_graphs:
        # Nobody to share gradients with, or they are summed where micro-batches are replayed.
        return Engine("ddp", model, model, 1.0, lambda last: nullcontext(), "full")
    # Layers are compiled one by one already. Cut further, at DDP's buckets, they would draw other dropout than alone.
    torch._dynamo.config.optimize_ddp = False
    module = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )

    def micro_batch(last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else module.no_sync()

    return Engine("ddp", model, module, float(world.size), micro_batch, "full")


def shard_group_size(config: Config, world: World) -> int:
    """Number of ranks that share one copy of the weights.

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
    """Mesh with the axis "shard" over all ranks, or "replicate" and "shard" for hybrid sharding; collective.

    Raises
    ------
    ConfigError
        As `shard_group_size`.
    """
    size = shard_group_size(config, world)
    if size == world.size:
        return init_device_mesh(world.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def reshards_after_forward(config: Config, world: World, itemsize: int) -> bool:
    """Whether FSDP2 is to free gathered weights until the backward: if asked, or if keeping them may take too much.

    Parameters
    ----------
    itemsize
        Bytes of the compute dtype.
    """
    asked = config.training.reshard_after_forward
    if asked is not None:
        return asked
    if not config.training.use_fsdp2 or world.device.type != "cuda":
        return True
    with torch.device("meta"):
        count = sum(p.numel() for p in BertForMaskedLM(BertConfig(**architecture(config.model))).parameters())
    room = KEEPING_SHARE * torch.cuda.get_device_properties(world.device).total_memory
    return estimate_peak(config, world.size, count, itemsize, reshards=False) > room


def fsdp2_sharding(mesh: DeviceMesh, compute_dtype: torch.dtype, reshards: bool) -> Callable[[nn.Module], None]:
    """Sharding of a module: weights gathered in the compute dtype, gradients reduced in FP32."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )

    def shard(module: nn.Module) -> None:
        # None: all but the root, whose weights the backward needs at once.
        fully_shard(module, mesh=mesh, reshard_after_forward=None if reshards else False, mp_policy=policy)

    return shard


def _fsdp2(model: BertForMaskedLM, shard: Callable[[nn.Module], None], world: World, reshards: bool) -> Engine:
    shard(model)

    def micro_batch(last: bool) -> AbstractContextManager[None]:
        # Gradients are scattered after each micro-batch: whole ones in FP32 would not fit. Replicas add theirs once.
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(reshards or last)  # The next micro-batch has the same weights.
        return nullcontext()

    def end_evaluation() -> None:
        # Without a backward, weights stay gathered: the optimizer's shards would not be the model's parameters.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    return Engine("fsdp2", model, model, float(world.size), micro_batch, "sharded", end_evaluation)


def nvfsdp_sharding(mesh: DeviceMesh) -> Callable[[nn.Module], None]:
    """Sharding of a module by Megatron-FSDP's second interface.

    Parameters stay FP32, so that main weights and compute weights are one buffer: weights are gathered and
    gradients reduced in FP32, and the model casts weights where it uses them, as under DDP.
    """
    import megatron_fsdp.experimental as nvfsdp
    from megatron_fsdp import MixedPrecisionPolicy as NvfsdpPolicy

    # Between micro-batches, gradients stay unreduced over the replicas; the last one's reduction averages them.
    flat, replicas = [nvfsdp.Flat()], mesh.ndim - 1
    weights = [nvfsdp.Replicate()] * replicas + flat
    gradient = [nvfsdp.Partial(dist.ReduceOp.AVG)] * replicas + flat
    axes = list(mesh.mesh_dim_names or ())
    placements = nvfsdp.Placements(dp_axes=axes, parameter=weights, gradient=gradient, optimizer=weights)
    policy = NvfsdpPolicy(main_params_dtype=torch.float32)

    def shard(module: nn.Module) -> None:
        nvfsdp.fully_shard(module, mesh, placements, policy)

    return shard


def _nvfsdp(model: BertForMaskedLM, shard: Callable[[nn.Module], None], world: World) -> Engine:
    from megatron_fsdp.experimental import microbatch
    from megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor, uneven_dtensor_to_full_tensor

    shard(model)
    _keep_gradients_until_reduced(model)
    return Engine(
        "nvfsdp",
        model,
        model,
        float(world.size),
        lambda last: microbatch(model, last),
        "sharded",
        gather=uneven_dtensor_to_full_tensor,
        describe_shards=preprocess_state_dict_for_uneven_dtensor,
    )


def _keep_gradients_until_reduced(model: nn.Module) -> None:
    """Tell the allocator which stream reads the buffers that hold the first step's gradients.

    With replicas, megatron-fsdp replaces each of them as soon as their sum over the replicas is under way. The memory,
    which is this stream's, would go to the backward's next tensors while it is still being read.
    """
    from megatron_fsdp.experimental.module import FsdpModule

    sharded = [module for module in model.modules() if isinstance(module, FsdpModule)]
    sharded[0]._lazy_init_context()  # the root's: makes the stream
    for module in sharded:
        for group in module.parameter_groups:
            group.main_grad.local_buffer.record_stream(module.context.reduce_scatter_stream)
