"""Builds the model layer by layer: each layer is initialized, compiled and sharded before the next one exists."""

from typing import cast

import torch
from torch import nn

from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed.engines import Shard
from geneformer_pretrain.kernels.select import attention, fused_kernels
from geneformer_pretrain.model.initialization import initialize_weights
from modeling_bert_te import BertConfig, BertForMaskedLM, BertLayer


def build_model(
    config: Config, resolved: Resolved, device: torch.device, compute_dtype: torch.dtype, shard: Shard | None
) -> BertForMaskedLM:
    """Build and initialize the model on a device.

    Parameters
    ----------
    compute_dtype
        Dtype of activations; weights are FP32.
    shard
        Shards a layer in place as soon as it is initialized, so that no rank ever holds the whole model; None keeps
        layers whole.
    """
    stock_config = BertConfig(**config.model.architecture())
    use_te, recompute = config.model.use_te_layers, config.training.recompute_every_n_layers

    def initialize(module: nn.Module, prefix: str) -> None:
        initialize_weights(
            module, prefix, config.training.seed, config.model.initializer_range, config.model.pad_token_id
        )

    with device:
        model = BertForMaskedLM(BertConfig(**config.model.architecture() | {"num_hidden_layers": 0}), use_te)
        initialize(model, "")
        layers = cast(nn.ModuleList, model.bert.encoder["layer"])
        for number in range(config.model.num_hidden_layers):
            layer = BertLayer(stock_config, use_te)
            initialize(layer, f"bert.encoder.layer.{number}")
            layer.gradient_checkpointing = recompute > 0 and number % recompute == 0
            if resolved.compile:
                layer.compile_in_place()
            if shard is not None:
                shard(layer)
            layers.append(layer)
    model.config.num_hidden_layers = config.model.num_hidden_layers
    model.bert.embeddings.compute_dtype = compute_dtype
    model.set_attention(attention(resolved.attention_kernel))
    model.set_fused_kernels(fused_kernels(resolved.fused_kernels))
    if resolved.compile:
        model.compile_embeddings_and_head()
    return model.train()
