"""BERT for masked-gene modelling, packed and fast. One file that imports nothing of this project.

The mathematics is that of `transformers.BertForMaskedLM`; with the same weights, outputs, loss and
gradients agree. What differs, and why:

- One path inside: every call runs on *packed* tokens, cells laid end to end without padding, with
  attention confined to each cell by `cu_seqlens`. Padded input [B, S] is unpadded at the door and its
  logits are padded again with zeros. Padding is never computed, attends to nothing and is attended by nothing.
- Training calls give `masked_index` and `labels` for the masked positions alone: the vocabulary
  projection, the costliest matrix product of small models, runs on 15% of the tokens.
- The vocabulary projection uses the word-embedding weight directly. There is no decoder parameter to tie.
- Query, key and value keep their Hugging Face parameters but run as one matrix product.
- Weights may be kept in FP32 and are cast where they are used, so the residual stream has one
  dtype (`compute_dtype`) on every engine. Statistics, softmax and cross-entropy are in FP32.
- No causal decoder, cross-attention, cache, pooler or next-sentence head: their arguments are refused by name.
- A layer is computed from its weights, with fused kernels. Once a part of it is hooked, wrapped, replaced, quantized or
  offloaded, every part is called instead, as in stock BERT (`is_fusible`).
- `use_te_layers` puts Transformer Engine's linear layers in place of PyTorch's, for FP8. All else is shared.

Shapes: B batch, S padded length, T packed tokens, N cells, K masked positions, H hidden size,
A attention heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

__all__ = ["BertConfig", "BertForMaskedLM", "MaskedLMOutput"]

# The vocabulary projection is padded to a multiple of this many columns: 25,426 BF16 columns are not
# aligned to 16 bytes, which keeps matrix units from their fast path.
VOCAB_ALIGNMENT = 64

SUPPORTED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
}
"""Values of keys of the configuration that would make another model of it."""

ATTENTION_NAMES = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Values of `attn_implementation` that are accepted. All name the attention that this class computes anyway."""


@dataclass
class MaskedLMOutput(ModelOutput):
    """Results of a forward call; absent parts are None.

    `loss` is the mean cross-entropy over labelled positions, FP32; NaN if there are none, as in stock BERT. `logits`
    are [B, S, V], zero at padding, or in packed calls without labels [T, V], or [K, V] at `masked_index`.
    `hidden_states`, on request, are the embedding output and each layer's, [B, S, H] or [T, H]. Packed calls with
    labels also give `loss_sum` (FP32) and `num_labels` (int64).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loss_sum: Tensor | None = None
    num_labels: Tensor | None = None

    @property
    def prediction_logits(self) -> Tensor | None:
        """The logits, by the name that `BertForPreTraining` gives them."""
        return self.logits


def compile_method(module: nn.Module, name: str) -> None:
    """Compile a method of one module in place, for constant shapes.

    A method rather than the module: hooks that engines put on the module stay outside of the graph.
    """
    setattr(module, name, torch.compile(getattr(module, name), dynamic=False))


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of the module does more than its class says: it has hooks, or its forward was replaced."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def is_fusible(parts: Iterable[nn.Module], kinds: list[type[nn.Module]]) -> bool:
    """Return True if modules of these kinds may be computed from their weights instead of being called.

    Adapters and torch.ao put modules of other kinds in their place, hooks and offloading need the calls, and quantized
    weights are tensors of their own class.
    """
    parts = list(parts)
    return [type(part) for part in parts] == kinds and not any(
        has_hooks(part) or any(hasattr(weight, "__tensor_flatten__") for weight in part._parameters.values())
        for part in parts
    )


def cast_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer to x, its weights cast to the dtype of x."""
    return F.linear(x, cast(Tensor, module.weight).to(x.dtype), cast(Tensor, module.bias).to(x.dtype))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer as `cast_linear` does, or call it where it is no longer a plain one."""
    if is_fusible([module], [nn.Linear]):
        return cast_linear(module, x)
    return module(x)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose weights are cast to the dtype of its input; statistics are in FP32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LinearReLU(torch.autograd.Function):
    """relu(x @ weight.T + bias) by one kernel where cuBLAS has it: [T, H], [F, H], [F] -> [T, F]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.aten._addmm_activation(bias, x, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight, out = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        return grad @ weight, grad.t() @ x, grad.sum(0)


class Dropout(nn.Dropout):
    """`nn.Dropout`, with a cheaper generator in compiled code.

    There, an element is dropped where a 32-bit integer hash with little bias (Wellons, "Prospecting for hash
    functions", lowbias32) of its number and a seed is low. Philox, which the compiler would use, takes longer than
    reading and writing the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and self.training and 0 < self.p < 1):
            return super().forward(x)
        seed = torch.randint(2**31, (1,), device=x.device, dtype=torch.int32)
        threshold = min(round(self.p * 2**32), 2**32 - 1) - 2**31
        return torch.where(hashed(x.shape, seed) < threshold, 0.0, x * (1 / (1 - self.p)))


def hashed(shape: torch.Size, seed: Tensor) -> Tensor:
    """An int32 hash of each element's number and the seed, evenly spread over all of int32."""
    # Shifts of int32 drag the sign along; the masks take it away. Products wrap around.
    x = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape) ^ seed
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


class Attention(Protocol):
    """Self-attention within each cell of a pack; exchangeable, see `set_attention`."""

    computes_bias_grad: bool
    """True if the backward returns the gradient of the QKV bias itself; the bias then reaches qkv detached."""

    def prepare(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Any:
        """Prepare once per call what all layers share.

        `cu_seqlens` is int32 [N+1], starts at 0 and ends at `num_tokens`; empty cells are allowed. `max_seqlen`
        bounds the lengths.
        """

    def __call__(self, qkv: Tensor, prepared: Any, dropout: float, bias: Tensor | None = None) -> Tensor:
        """Attend: [T, 3, A, D] -> [T, A, D]; `dropout` is the probability of dropping an attention weight.

        `bias`, [3 * A * D], is given if `computes_bias_grad`; qkv holds it already.
        """


class FusedKernels(Protocol):
    """Fused element-wise kernels: dropout, residual, LayerNorm, activation, loss; see `set_fused_kernels`."""

    def residual_norm(
        self, x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """Compute LayerNorm(residual + dropout(x + b)): [T, H], [H] or None, [T, H] -> [T, H].

        Weight and bias are LayerNorm's, [H]; they and b may have any dtype.
        """

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute x @ weight.T: [T, H], [F, H] of any dtype -> [T, F]."""

    def linear_with_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Project x and return x beside it: [T, H], [F, H] of any dtype, [F] -> [T, F], [T, H].

        The x returned is for the residual connection alone, so that its two gradients may be added in place.
        """

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """Project x, apply ReLU, project again, return x beside it: [T, H], [F, H], [F], [H, F] -> [T, H], [T, H].

        The weights may have any dtype; the x returned is for the residual connection alone, as above.
        """

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross-entropies of x @ weight.T + bias: [K, H], [V, H], [V], labels [K] (or -100) -> FP32 scalar."""


class FlashAttention:
    """PyTorch's attention kernels: FlashAttention for half precision, else memory-efficient attention.

    Both need a GPU, and the latter serves those before Ampere and FP32. Elsewhere: one exact call per cell.
    """

    computes_bias_grad = False

    def prepare(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> tuple[Tensor, int, bool]:
        """Return both, and whether the GPU is one that FlashAttention runs on (compute capability 8.0)."""
        device = cu_seqlens.device
        return cu_seqlens, max_seqlen, cu_seqlens.is_cuda and torch.cuda.get_device_capability(device) >= (8, 0)

    def __call__(
        self, qkv: Tensor, prepared: tuple[Tensor, int, bool], dropout: float, bias: Tensor | None = None
    ) -> Tensor:
        """Attend: [T, 3, A, D] -> [T, A, D]."""
        cu_seqlens, max_seqlen, has_flash = prepared
        q, k, v = qkv.unbind(1)
        half, head_size = q.dtype in (torch.bfloat16, torch.float16), q.shape[-1]
        if has_flash and half and head_size % 8 == 0 and head_size <= 256:
            return torch.ops.aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
            )[0]
        if q.is_cuda and q.dtype in (torch.float32, torch.float16) and head_size % 8 == 0:
            batch = (x.unsqueeze(0) for x in (q, k, v))
            return torch.ops.aten._efficient_attention_forward(
                *batch, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, 0, torch.is_grad_enabled()
            )[0].squeeze(0)
        return _attention_by_cell(q, k, v, cu_seqlens, dropout)


@torch.compiler.disable
def _attention_by_cell(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, dropout: float) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not dropout:
            return F.scaled_dot_product_attention(q, k, v)
        # Without a fused kernel for dropout, fewer passes over the weights than scaled_dot_product_attention makes.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(-1)
        return F.dropout(weights, dropout) @ v

    lengths = cu_seqlens.diff().tolist()
    cells = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*cell) for cell in cells if cell[0].shape[1]], dim=1).transpose(0, 1)


@functools.cache
def te_linear() -> type[nn.Module]:
    """Return Transformer Engine's linear layer, made to cast its weights to the dtype of its input.

    Raises
    ------
    ImportError
        Transformer Engine is not installed, or does not fit this PyTorch or CUDA.
    """
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise ImportError(
            "Transformer Engine layers were asked for (use_te_layers), but transformer_engine.pytorch cannot be "
            f"imported: {error}. Install transformer-engine[pytorch], or use PyTorch layers."
        ) from error

    class TELinear(te.Linear):
        def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
            super().__init__(in_features, out_features, params_dtype=torch.get_default_dtype(), **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            # Autocast is what makes Transformer Engine accept FP32 weights for BF16 input.
            with torch.autocast("cuda", x.dtype, enabled=x.dtype != torch.float32, cache_enabled=False):
                return super().forward(x)

    return TELinear


def checkpoint_function(use_te_layers: bool) -> Callable[..., Tensor]:
    """Return activation checkpointing that repeats dropout, and with Transformer Engine layers FP8's scaling too."""
    if use_te_layers:
        import transformer_engine.pytorch as te

        return functools.partial(te.checkpoint, use_reentrant=False)
    return functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


class WordEmbeddings(nn.Embedding):
    """The word embeddings, whose weight also projects hidden states on the vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        """Embed ids [*] -> [*, H], or project hidden states [*, H] -> [*, V].

        Both are calls because offloaded weights are in memory only during a call.
        """
        return F.linear(x, self.weight.to(x.dtype)) if x.is_floating_point() else super().forward(x)


class BertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = WordEmbeddings(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.compute_dtype: torch.dtype | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Embed packed tokens: [T], [T], [T] or None (all of type 0) -> [T, H]."""
        dtype = self.compute_dtype or self.word_embeddings.weight.dtype
        if token_type_ids is None:
            token_type = self.token_type_embeddings.weight[0]
        else:
            token_type = self.token_type_embeddings(token_type_ids)
        x = self.word_embeddings(input_ids).to(dtype) + token_type.to(dtype)
        x = x + self.position_embeddings(position_ids).to(dtype)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    """Self-attention within each cell; query, key and value are projected by one matrix product."""

    def __init__(self, config: BertConfig, use_te_layers: bool) -> None:
        super().__init__()
        size = config.hidden_size
        if use_te_layers:
            self.qkv = te_linear()(size, 3 * size, parameters_split=("query_", "key_", "value_"))
        else:
            self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.use_te_layers = use_te_layers
        self.num_heads, self.head_size = config.num_attention_heads, size // config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attention: Attention = FlashAttention()
        self.fused: FusedKernels | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return query, key and value; x for the residual connection; the bias, if attention computes its gradient."""
        if self.use_te_layers:
            return self.qkv(x), x, None
        projections = (self.query, self.key, self.value)
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections]).to(x.dtype)
        if self.fused is None:
            return F.linear(x, weight.to(x.dtype), bias), x, None
        detached = self.attention.computes_bias_grad
        qkv, x = self.fused.linear_with_residual(x, weight, bias.detach() if detached else bias)
        return qkv, x, bias if detached else None

    def attend(self, qkv: Tensor, prepared: Any, bias: Tensor | None = None) -> Tensor:
        """[T, 3 * H] -> [T, H]."""
        qkv = qkv.view(len(qkv), 3, self.num_heads, self.head_size)
        dropout = self.dropout_prob if self.training else 0.0
        return self.attention(qkv, prepared, dropout, bias).flatten(1)

    def forward(self, x: Tensor, prepared: Any) -> Tensor:
        """Call each part: [T, H] -> [T, H]."""
        if self.use_te_layers:
            return self.attend(self.qkv(x), prepared)
        projections = (self.query, self.key, self.value)
        return self.attend(torch.cat([linear(projection, x) for projection in projections], dim=-1), prepared)


class BertResidualOutput(nn.Module):
    """Projection, dropout, residual connection, LayerNorm: the end of both halves of a layer."""

    def __init__(self, config: BertConfig, in_features: int, linear_type: type[nn.Module]) -> None:
        super().__init__()
        self.dense = linear_type(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.fused: FusedKernels | None = None

    def add_norm(self, x: Tensor, residual: Tensor, b: Tensor | None = None) -> Tensor:
        """Compute LayerNorm(residual + dropout(x + b)): [T, H], [T, H], [H] or None -> [T, H]."""
        norm = self.LayerNorm
        if self.fused is None:
            return norm(residual + self.dropout(x))
        dropout = self.dropout.p if self.training else 0.0
        return self.fused.residual_norm(x, b, residual, norm.weight, norm.bias, norm.eps, dropout)

    def project_add_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """Compute the module from its weights: [T, F], [T, H] -> [T, H]."""
        dense = self.dense
        if not isinstance(dense, nn.Linear):  # Transformer Engine's
            return self.add_norm(dense(x), residual)
        if self.fused is None:
            return self.add_norm(cast_linear(dense, x), residual)
        return self.add_norm(self.fused.linear(x, dense.weight), residual, dense.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Call each part: [T, F], [T, H] -> [T, H]."""
        return self.LayerNorm(residual + self.dropout(linear(self.dense, x)))


class BertLayer(nn.Module):
    """One post-LayerNorm encoder layer; with `gradient_checkpointing` it keeps only its input for the backward."""

    def __init__(self, config: BertConfig, use_te_layers: bool) -> None:
        super().__init__()
        linear_type = te_linear() if use_te_layers else nn.Linear
        self.attention = nn.ModuleDict(
            {
                "self": BertSelfAttention(config, use_te_layers),
                "output": BertResidualOutput(config, config.hidden_size, linear_type),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": linear_type(config.hidden_size, config.intermediate_size)})
        self.output = BertResidualOutput(config, config.intermediate_size, linear_type)
        self.activation = ACT2FN[config.hidden_act]
        self.fused: FusedKernels | None = None
        self.use_te_layers = use_te_layers
        # By the names that transformers' gradient_checkpointing_enable sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = checkpoint_function(use_te_layers)
        self.kinds = [type(part) for part in self.parts()]

    def set_fused_kernels(self, fused: FusedKernels | None) -> None:
        """Use fused kernels in this layer; None for PyTorch's operations."""
        self.fused = fused
        for part in (self.attention["self"], self.attention["output"], self.output):
            cast(BertSelfAttention | BertResidualOutput, part).fused = fused

    def parts(self) -> Iterator[nn.Module]:
        """Yield the modules within the layer, except those of Transformer Engine, which are always called."""
        called = te_linear() if self.use_te_layers else None
        return (module for child in self.children() for module in child.modules() if type(module) is not called)

    def forward(self, x: Tensor, prepared: Any) -> Tensor:
        """[T, H] -> [T, H]."""
        # Autocast knows calls of linear layers, but not the operators that fused kernels are made of.
        fusible = is_fusible(self.parts(), self.kinds) and not torch.is_autocast_enabled(x.device.type)
        run = self.compute if fusible else self.call_parts
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, x, prepared)
        return run(x, prepared)

    def compute(self, x: Tensor, prepared: Any) -> Tensor:
        """Compute the layer from its weights: [T, H] -> [T, H]."""
        attention = cast(BertSelfAttention, self.attention["self"])
        output = cast(BertResidualOutput, self.attention["output"])
        qkv, residual, bias = attention.project(x)
        attended = attention.attend(qkv, prepared, bias)
        return self.feed_forward(output.project_add_norm(attended, residual))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Compute the second half of the layer from its weights: [T, H] -> [T, H]."""
        expand, contract = cast(nn.Linear, self.intermediate["dense"]), cast(nn.Linear, self.output.dense)
        if self.use_te_layers or type(self.activation) is not nn.ReLU:
            return self.output.project_add_norm(self.activation(linear(expand, x)), x)
        bias = expand.bias.to(x.dtype)
        if self.fused is None:
            return self.output.project_add_norm(LinearReLU.apply(x, expand.weight.to(x.dtype), bias), x)
        x, residual = self.fused.feed_forward(x, expand.weight, bias, contract.weight)
        return self.output.add_norm(x, residual, contract.bias)

    def call_parts(self, x: Tensor, prepared: Any) -> Tensor:
        """Call each part of the layer, as stock BERT does: [T, H] -> [T, H]."""
        x = self.attention["output"](self.attention["self"](x, prepared), x)
        return self.output(self.activation(linear(self.intermediate["dense"], x)), x)

    def compile_in_place(self) -> None:
        """Compile the layer; with Transformer Engine, the operations between its matrix products."""
        if self.use_te_layers:
            compile_method(self.attention["output"], "add_norm")
            compile_method(self.output, "add_norm")
        else:
            compile_method(self, "compute")


class Padding:
    """Places of the tokens among padded cells [B, S].

    Parameters
    ----------
    attention_mask
        [B, S], 1 for tokens and 0 for padding, of any dtype.

    Raises
    ------
    ValueError
        The mask has other values, or a cell without tokens where they might be numbers that are added to scores.
    """

    def __init__(self, attention_mask: Tensor) -> None:
        valid = attention_mask.bool()
        if not torch.equal(valid.to(attention_mask.dtype), attention_mask):
            raise ValueError(
                "attention_mask has values other than 0 and 1; give 1 for tokens and 0 for padding, not numbers to be "
                "added to scores."
            )
        # In a mask of numbers to be added, a cell without padding is all zeros.
        has_tokens = valid.any(1)
        if not (has_tokens.all() if attention_mask.is_floating_point() else has_tokens.any()):
            raise ValueError("attention_mask has a cell without tokens; give 1 for tokens and 0 for padding.")
        self.batch_size, self.length = valid.shape
        self.index = valid.flatten().nonzero().squeeze(1)
        self.cu_seqlens = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()

    def remove(self, x: Tensor) -> Tensor:
        """[B, S], [1, S] or [S] -> [T]."""
        return x.expand(self.batch_size, self.length).flatten()[self.index.to(x.device)]

    def add(self, x: Tensor) -> Tensor:
        """[T, *] -> [B, S, *], zero at padding."""
        padded = x.new_zeros(self.batch_size * self.length, x.shape[-1])
        return padded.index_copy(0, self.index.to(x.device), x).view(self.batch_size, self.length, -1)


def as_pack(
    config: BertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Padding | None, dict[str, Any]]:
    """Return the arguments of a packed call, and of a padded one where its padding was.

    Raises
    ------
    ValueError
        Arguments that do not fit together, a mask that is not supported, or a cell longer than the model's positions.
    """
    if input_ids is None:
        raise ValueError("input_ids is missing.")
    arguments = {
        "input_ids": input_ids,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
    }
    if cu_seqlens is not None:
        if input_ids.dim() != 1 or attention_mask is not None or position_ids is None or max_seqlen is None:
            raise ValueError(
                "Packed calls take input_ids [T], position_ids, cu_seqlens, max_seqlen, no attention_mask."
            )
        return None, arguments
    if max_seqlen is not None:
        raise ValueError("max_seqlen belongs to packed calls, which need cu_seqlens.")
    if input_ids.dim() != 2:
        raise ValueError(f"Padded calls take input_ids [B, S]; got the shape {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; only [B, S] = "
            f"{tuple(input_ids.shape)} with 1 for tokens and 0 for padding is supported."
        )
    padding, most = Padding(attention_mask), config.max_position_embeddings
    if position_ids is None:
        if padding.length > most and attention_mask[:, most:].any():
            raise ValueError(f"A cell has tokens beyond position {most - 1}; this model has {most} positions.")
        position_ids = torch.arange(padding.length, device=input_ids.device)
    return padding, {
        "input_ids": padding.remove(input_ids),
        "token_type_ids": None if token_type_ids is None else padding.remove(token_type_ids),
        "position_ids": padding.remove(position_ids),
        "cu_seqlens": padding.cu_seqlens,
        "max_seqlen": padding.length,
    }


def refuse(arguments: dict[str, Any], config: BertConfig, output_attentions: bool | None) -> None:
    """Refuse arguments that stock BERT takes and this class has no use for.

    Raises
    ------
    ValueError
        One that is neither None nor False, or attentions.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is not supported by this packed BERT; load the model with stock transformers.BertForMaskedLM "
                "to use it."
            )
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(
            "output_attentions is not supported: the attention kernels never form the weights. Stock "
            "transformers.BertForMaskedLM returns them, loaded with attn_implementation='eager'."
        )


class BertModel(nn.Module):
    """Embeddings and encoder layers over packed tokens."""

    def __init__(self, config: BertConfig, use_te_layers: bool) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        layers = (BertLayer(config, use_te_layers) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.attention: Attention = FlashAttention()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **unsupported: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode padded cells, or packed cells when `cu_seqlens` is given; parameters as in `BertForMaskedLM.forward`.

        Returns
        -------
        `last_hidden_state`, [B, S, H] and zero at padding, or [T, H]; on request `hidden_states`, the embeddings'
        output and each layer's.

        Raises
        ------
        ValueError
            An argument that is not supported, or arguments that do not fit together.
        """
        refuse(unsupported, self.config, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        padding, packed = as_pack(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        )
        states = self.encode(**packed, output_hidden_states=output_hidden_states)
        if padding is not None:
            states = [padding.add(x) for x in states]
        output = BaseModelOutput(states[-1], tuple(states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output_hidden_states: bool,
    ) -> list[Tensor]:
        """[T] -> [T, H] each: the last layer's output, preceded on request by the embeddings and the others."""
        token_types = self.embeddings.token_type_embeddings
        if token_type_ids is None and not is_fusible([token_types], [nn.Embedding]):
            token_type_ids = torch.zeros_like(input_ids)
        prepared = self.attention.prepare(cu_seqlens, max_seqlen, len(input_ids))
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        before = []
        for layer in self.encoder["layer"].children():
            if output_hidden_states:  # Otherwise they are freed: in FP8, the backward does without.
                before.append(x)
            x = layer(x, prepared)
        return [*before, x]


class Decoder(nn.Module):
    """The projection on the vocabulary, which has no parameters of its own: those of two other modules."""

    def __init__(self, embeddings: BertEmbeddings, predictions: BertPredictions) -> None:
        super().__init__()
        self._owners = (embeddings, predictions)  # In a tuple, so that they are no parts of this module.

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        """Copy as a part of a model.

        Raises
        ------
        ValueError
            Copied alone, as `modules_to_save` of PEFT does: the copy would have weights that nothing trains or saves.
        """
        if id(self._owners[0]) not in memo:
            raise ValueError(
                "The decoder cannot be copied alone, because its weight is that of the word embeddings; name "
                "word_embeddings in its place."
            )
        memo[id(self)] = copied = Decoder.__new__(Decoder)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def weight(self) -> Tensor:
        """The word embeddings, [V, H]."""
        return self._owners[0].word_embeddings.weight

    @property
    def bias(self) -> Tensor:
        """The head's bias, [V]."""
        return self._owners[1].bias

    def forward(self, x: Tensor) -> Tensor:
        """[*, H] -> [*, V]."""
        if self.weight.is_meta:  # Offloaded: loaded for the time of the call.
            return self._owners[0].word_embeddings(x) + self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x), self.bias.to(x))


class BertPredictions(nn.Module):
    """The masked-language-model head: dense, activation, LayerNorm, projection on the word embeddings."""

    def __init__(self, config: BertConfig, embeddings: BertEmbeddings) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = Decoder(embeddings, self)
        self.activation = ACT2FN[config.hidden_act]
        self.fused: FusedKernels | None = None

    def features(self, hidden: Tensor) -> Tensor:
        """[*, H] -> [*, H]."""
        return self.transform["LayerNorm"](self.activation(linear(self.transform["dense"], hidden)))

    def forward(
        self, hidden: Tensor, masked_index: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, [*, H] -> [*, V], or with labels what `loss` does."""
        if masked_index is None or labels is None:
            return self.decoder(self.features(hidden))
        return self.loss(hidden, masked_index, labels, self.decoder.weight)

    def loss(
        self, hidden: Tensor, masked_index: Tensor, labels: Tensor, word_embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies over masked positions, and count these.

        [T, H], [K], [K] (-100 where unused), [V, H] -> FP32 scalar, int64 scalar.
        """
        x = self.features(hidden.index_select(0, masked_index))
        padding = -word_embeddings.shape[0] % VOCAB_ALIGNMENT
        weight = F.pad(word_embeddings.to(x.dtype), (0, 0, 0, padding))
        bias = F.pad(self.bias.to(x.dtype), (0, padding), value=float("-inf"))
        labels = labels.long()
        num_labels = (labels != -100).sum()
        if self.fused is not None:
            return self.fused.linear_cross_entropy(x, weight, bias, labels), num_labels
        loss_sum = F.cross_entropy(F.linear(x, weight, bias).float(), labels, ignore_index=-100, reduction="sum")
        return loss_sum, num_labels


def canonical_name(name: str) -> str:
    """Return the name that Hugging Face gives a parameter, from the one it has with either kind of layers."""
    return re.sub(r"\.qkv\.(query|key|value)_(weight|bias)$", r".\1.\2", name)


class BertForMaskedLM(PreTrainedModel):
    """Packed BERT with a masked-language-model head.

    Parameters
    ----------
    config
        A stock `transformers.BertConfig`.
    use_te_layers
        Build the encoder layers from Transformer Engine modules: other kernels, the same mathematics.
        Accepted by `from_pretrained` too.

    Raises
    ------
    ImportError
        `use_te_layers` without Transformer Engine.
    ValueError
        A configuration of a model that this class does not compute.
    """

    config_class = BertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # Trainer divides the mean loss by the number of accumulated micro-batches, unless the model does.
    accepts_loss_kwargs = False
    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "BertLayer"]
    # Stock checkpoints may also hold the tied decoder, the pooler and the next-sentence head.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"cls\.predictions\.decoder\.",
        r"bert\.pooler\.",
        r"cls\.seq_relationship\.",
        r"bert\.embeddings\.position_ids",
    ]

    def __init__(self, config: BertConfig, use_te_layers: bool = False) -> None:
        super().__init__(config)
        for key, supported in SUPPORTED.items():
            value = getattr(config, key, supported)
            if value != supported:
                raise ValueError(f"config.{key} is {value!r}; this packed BERT supports {supported!r} alone.")
        if config.pad_token_id is None:
            raise ValueError("config.pad_token_id is None; give the id of the padding token (0 for Geneformer).")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"config.hidden_size={config.hidden_size} is not a multiple of "
                f"config.num_attention_heads={config.num_attention_heads}."
            )
        self.bert = BertModel(config, use_te_layers)
        self.cls = nn.ModuleDict({"predictions": BertPredictions(config, self.bert.embeddings)})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertPredictions):
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.bert.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection on the vocabulary; its `weight` is that of the word embeddings."""
        return self.head.decoder

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the projection on the vocabulary has no weights of its own that could be untied."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse, before anything is changed.

        Raises
        ------
        ValueError
            Always, with the way round.
        """
        raise ValueError(
            "This class does not resize or replace its vocabulary: load the model with stock "
            "transformers.BertForMaskedLM, resize it there, save it, and load that with this class."
        )

    set_input_embeddings = set_output_embeddings = resize_token_embeddings

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Accept, on behalf of transformers, any `attn_implementation` that computes what this class does."""
        if attn_implementation not in (None, *ATTENTION_NAMES):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is not supported; leave it out, or give one of "
                f"{', '.join(ATTENTION_NAMES)}, which all stand for this class's own attention."
            )
        return attn_implementation or "eager"

    @classmethod
    def from_pretrained(cls, *args: Any, use_te_layers: bool = False, **kwargs: Any) -> Any:
        """Load as any Hugging Face model; `use_te_layers` then moves the weights into Transformer Engine layers."""
        loaded = super().from_pretrained(*args, **kwargs)
        if not use_te_layers:
            return loaded
        plain, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        model = cls(plain.config, use_te_layers=True).to(plain.device, plain.dtype).eval()
        weights = dict(plain.named_parameters())
        with torch.no_grad():
            for name, parameter in model.canonical_parameters():
                parameter.copy_(weights[name])
        return (model, *info) if info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as any Hugging Face model: a plain BERT, whatever the layers are made of."""
        weights = kwargs.pop("state_dict", None) or dict(self.named_parameters())
        super().save_pretrained(*args, state_dict={canonical_name(k): v for k, v in weights.items()}, **kwargs)

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that Hugging Face gives them, for both kinds of layers."""
        for name, parameter in self.named_parameters():
            yield canonical_name(name), parameter

    @property
    def head(self) -> BertPredictions:
        """The masked-language-model head."""
        return cast(BertPredictions, self.cls["predictions"])

    def set_attention(self, attention: Attention) -> None:
        """Use another implementation of self-attention in all layers."""
        for module in self.modules():
            if isinstance(module, BertModel | BertSelfAttention):
                module.attention = attention

    def set_fused_kernels(self, fused: FusedKernels | None) -> None:
        """Use fused element-wise kernels (dropout, residual, LayerNorm, activation, loss); None for PyTorch's."""
        self.head.fused = fused
        for layer in cast(Iterable[BertLayer], self.bert.encoder["layer"].children()):
            layer.set_fused_kernels(fused)

    def compile_embeddings_and_head(self) -> None:
        """Compile embeddings and loss head in place, for packed calls of constant shape; layers compile themselves.

        Blocks rather than the whole: layers share one compiled graph, so start-up does not grow with depth,
        and gradients become ready layer by layer, so engines can overlap their communication.
        """
        compile_method(self.bert.embeddings, "forward")
        compile_method(self.head, "loss")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_index: Tensor | None = None,
        **unsupported: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Run padded cells, or packed cells when `cu_seqlens` is given.

        Parameters
        ----------
        input_ids
            Padded: [B, S]. Packed: [T], int32 or int64.
        attention_mask
            Padded: [B, S], 1 for tokens and 0 for padding, of any dtype; None attends to everything, as in stock BERT.
        token_type_ids, position_ids
            Shaped as input_ids. Defaults: type 0; positions 0..S-1 (required when packed).
        labels
            Padded: [B, S], -100 where nothing is to be predicted. Packed: [K], beside `masked_index`.
        output_hidden_states, output_attentions, return_dict
            As in stock BERT, by default those of the configuration; attentions are refused.
        cu_seqlens, max_seqlen
            Packed: int32 [N+1] boundaries of the cells, which cover all T tokens, and a bound of their lengths.
        masked_index
            Packed: [K], flat positions of `labels`; without labels, the positions of the logits that are returned.
        **unsupported
            Other arguments of stock BERT, refused unless they are None or False.

        Raises
        ------
        ValueError
            An argument that is not supported, or arguments that do not fit together.
        """
        refuse(unsupported, self.config, output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if cu_seqlens is None and masked_index is not None:
            raise ValueError("masked_index belongs to packed calls, which need cu_seqlens.")
        if cu_seqlens is not None and labels is not None and masked_index is None:
            raise ValueError("Packed calls take labels [K] together with masked_index [K].")
        padding, packed = as_pack(
            self.config, input_ids, attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        )
        encoded = self.bert(
            **packed, output_hidden_states=output_hidden_states, output_attentions=False, return_dict=True
        )
        hidden, states = encoded.last_hidden_state, encoded.hidden_states
        if masked_index is not None and labels is not None:
            loss_sum, num_labels = self.head(hidden, masked_index, labels)
            output = MaskedLMOutput(loss_sum / num_labels, None, states, loss_sum, num_labels)
        elif padding is None:
            chosen = hidden if masked_index is None else hidden.index_select(0, masked_index)
            output = MaskedLMOutput(None, self.head(chosen), states)
        else:
            logits, loss = self.head(hidden), None
            if labels is not None:
                loss = F.cross_entropy(logits.float(), padding.remove(labels).to(logits.device), ignore_index=-100)
            output = MaskedLMOutput(loss, padding.add(logits), states and tuple(padding.add(x) for x in states))
        return output if return_dict else output.to_tuple()
