"""The one place where the engines differ: how a model is built, sharded and called on many ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from modeling_bert_te import BertConfig, BertForMaskedLM, BertLayer

from .attention import choose_attention
from .config import Config, ConfigError, ModelConfig
from .distributed import World
from .initialization import initialize_weights

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
        step, the one after which gradients are reduced.
    checkpoint_format
        "full" for one file, "sharded" for a distributed checkpoint.
    end_evaluation
        To be called after forward passes that had no backward.
    """

    name: str
    model: BertForMaskedLM
    module: nn.Module
    gradient_divisor: float
    micro_batch: Callable[[bool], AbstractContextManager[None]]
    checkpoint_format: str
    end_evaluation: Callable[[], None] = lambda: None


def architecture(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys of the model group that stock BERT knows."""
    return {key: getattr(config, key) for key in ARCHITECTURE_KEYS}


def build_engine(config: Config, world: World, compute_dtype: torch.dtype, compile_blocks: bool) -> Engine:
    """Build, initialise, compile and distribute the model.

    It grows layer by layer; sharding engines shard each layer as soon as it is initialised, so that no rank
    ever holds the whole.

    Raises
    ------
    ConfigError
        An engine that this machine or installation cannot run.
    """
    if config.training.use_nvfsdp:
        raise ConfigError("training.use_nvfsdp=True: this engine is not available yet; use training.use_fsdp2=True.")
    shard: Callable[[nn.Module], None] = lambda module: None  # noqa: E731
    if config.training.use_fsdp2:
        shard = fsdp2_sharding(world, compute_dtype)
    use_te = config.model.use_te_layers
    stock_config = BertConfig(**architecture(config.model))

    def initialize(module: nn.Module, prefix: str) -> None:
        initialize_weights(
            module, prefix, config.training.seed, config.model.initializer_range, config.model.pad_token_id
        )

    with world.device:
        model = BertForMaskedLM(BertConfig(**architecture(config.model) | {"num_hidden_layers": 0}), use_te)
        initialize(model, "")
        for number in range(config.model.num_hidden_layers):
            layer = BertLayer(stock_config, use_te)
            initialize(layer, f"bert.encoder.layer.{number}")
            if compile_blocks:
                layer.compile_in_place()
            shard(layer)
            model.bert.encoder.layer.append(layer)
    model.config.num_hidden_layers = config.model.num_hidden_layers
    model.bert.embeddings.compute_dtype = compute_dtype
    model.set_attention(choose_attention(config, world.device, compute_dtype))
    if compile_blocks:
        model.compile_ends()
    model.train()
    if config.training.use_fsdp2:
        return _fsdp2(model, shard, world)
    return _ddp(model, world)


def _ddp(model: BertForMaskedLM, world: World) -> Engine:
    if world.size == 1:
        return Engine("ddp", model, model, 1.0, lambda last: nullcontext(), "full")
    module = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )

    def micro_batch(last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else module.no_sync()

    return Engine("ddp", model, module, float(world.size), micro_batch, "full")


def fsdp2_sharding(world: World, compute_dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Sharding of a module over all ranks: weights gathered in the compute dtype, gradients reduced in FP32."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )

    def shard(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy)

    return shard


def _fsdp2(model: BertForMaskedLM, shard: Callable[[nn.Module], None], world: World) -> Engine:
    shard(model)

    def micro_batch(last: bool) -> AbstractContextManager[None]:
        model.set_requires_gradient_sync(last)
        return nullcontext()

    # Without a backward, the root's weights stay gathered: the optimizer's shards would not be its parameters.
    return Engine("fsdp2", model, model, float(world.size), micro_batch, "sharded", model.reshard)
