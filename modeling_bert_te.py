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
- No decoder, cross-attention, cache, pooler or next-sentence head.
- `use_te_layers` puts Transformer Engine's linear layers in place of PyTorch's, for FP8. All else is shared.

Shapes: B batch, S padded length, T packed tokens, N cells, K masked positions, H hidden size,
A attention heads, D head size, V vocabulary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

__all__ = ["BertConfig", "BertForMaskedLM", "MaskedLMOutput"]

# The vocabulary projection is padded to a multiple of this many columns: 25,426 BF16 columns are not
# aligned to 16 bytes, which keeps matrix units from their fast path.
VOCAB_ALIGNMENT = 64


@dataclass
class MaskedLMOutput(ModelOutput):
    """What a forward call returns; absent parts are None.

    `loss` is the mean cross-entropy over labelled positions, FP32. `logits` are [B, S, V], zero at padding, or
    [T, V] in packed calls without labels. `hidden_states`, on request, are the embedding output and each layer's,
    [B, S, H] or [T, H]. Packed calls with labels also give `loss_sum` (FP32) and `num_labels` (int64).
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


class Linear(nn.Linear):
    """`nn.Linear` whose weights are cast to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def is_watched(*modules: nn.Module) -> bool:
    """Whether any module has to be called for others, which hooked into it or replaced its forward."""
    for m in modules:
        hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        if hooks or "forward" in m.__dict__:
            return True
    return False


def is_plain(linear: nn.Module) -> TypeGuard[Linear]:
    """Whether a linear layer may be computed from its parameters.

    What wraps or watches it, an adapter or a hook, has to be called; autocast knows linear layers alone.
    """
    watched = is_watched(linear)
    return type(linear) is Linear and not watched and not torch.is_autocast_enabled(linear.weight.device.type)


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
    """A way to compute self-attention within each cell of a pack; exchangeable, see `set_attention`."""

    finds_bias_gradient: bool
    """Whether it finds the gradient of the bias in qkv, out of autograd's sight until then."""

    def plan(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Any:
        """Prepare what all layers of one call share.

        `cu_seqlens` is int32 [N+1], starts at 0 and ends at `num_tokens`; empty cells are allowed. `max_seqlen`
        bounds the lengths.
        """

    def __call__(self, qkv: Tensor, plan: Any, dropout: float, bias: Tensor | None = None) -> Tensor:
        """[T, 3, A, D] -> [T, A, D]; `dropout` is the probability of dropping an attention weight.

        `bias`, [3 * A * D], is given where its gradient is to be found; qkv holds it already.
        """


class FusedKernels(Protocol):
    """Ways to compute what surrounds the matrix products; exchangeable, see `set_fused_kernels`."""

    def residual_norm(
        self, x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """LayerNorm(residual + dropout(x + b)): [T, H], [H] or None, [T, H] -> [T, H].

        Weight and bias are LayerNorm's, [H]; they and b may have any dtype.
        """

    def linear_beside_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Project x; and x itself: [T, H], [F, H], [F] of one dtype -> [T, F], [T, H].

        The x returned is for the residual connection alone, so that its two gradients may be added in place.
        """

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """Project x, by ReLU after it, project again; and x: [T, H], [F, H], [F], [H, F] -> [T, H], [T, H].

        All are of one dtype, and the x returned is as above.
        """

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Sum of cross-entropies of x @ weight.T + bias: [K, H], [V, H], [V], labels [K] (or -100) -> FP32 scalar."""


class FlashAttention:
    """PyTorch's FlashAttention, for half precision on CUDA; elsewhere one exact call per cell."""

    finds_bias_gradient = False

    def plan(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> tuple[Tensor, int]:
        return cu_seqlens, max_seqlen

    def __call__(self, qkv: Tensor, plan: tuple[Tensor, int], dropout: float, bias: Tensor | None = None) -> Tensor:
        cu_seqlens, max_seqlen = plan
        q, k, v = qkv.unbind(1)
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return torch.ops.aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
            )[0]
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
    """Transformer Engine's linear layer, casting its weights to the dtype of its input as `Linear` does.

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
    """Activation checkpointing that repeats dropout, and with Transformer Engine layers FP8's scaling too."""
    if not use_te_layers:
        return torch.utils.checkpoint.checkpoint
    import transformer_engine.pytorch as te

    return te.checkpoint


class BertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
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
            self.query, self.key, self.value = (Linear(size, size) for _ in range(3))
        self.use_te_layers = use_te_layers
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attention: Attention = FlashAttention()
        self.fused: FusedKernels | None = None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query, key and value, x for the residual connection, and the bias if attention is to find its gradient."""
        if self.use_te_layers:
            return self.qkv(x), x, None
        projections = (self.query, self.key, self.value)
        if not all(is_plain(projection) for projection in projections):
            return torch.cat([projection(x) for projection in projections], dim=-1), x, None
        weight = torch.cat([p.weight for p in projections]).to(x.dtype)
        bias = torch.cat([p.bias for p in projections]).to(x.dtype)
        if self.fused is None or is_watched(self):
            return F.linear(x, weight, bias), x, None
        left = self.attention.finds_bias_gradient
        qkv, x = self.fused.linear_beside_residual(x, weight, bias.detach() if left else bias)
        return qkv, x, bias if left else None

    def forward(self, x: Tensor, plan: Any) -> tuple[Tensor, Tensor]:
        """[T, H] -> [T, H]; and x, for the residual connection."""
        qkv, residual, bias = self.project(x)
        qkv = qkv.view(x.shape[0], 3, self.num_heads, -1)
        dropout = self.dropout_prob if self.training else 0.0
        return self.attention(qkv, plan, dropout, bias).reshape(x.shape), residual


class BertResidualOutput(nn.Module):
    """Projection, dropout, residual connection, LayerNorm: the end of both halves of a layer."""

    def __init__(self, config: BertConfig, in_features: int, linear: type[nn.Module]) -> None:
        super().__init__()
        self.dense = linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.fused: FusedKernels | None = None

    @property
    def watched(self) -> bool:
        """Whether it or a part of it has to be called for others."""
        return is_watched(self, self.dense, self.dropout, self.LayerNorm)

    def add_norm(self, x: Tensor, residual: Tensor, b: Tensor | None = None) -> Tensor:
        norm = self.LayerNorm
        if self.fused is None or is_watched(self.dropout, norm):
            return norm(residual + self.dropout(x))
        dropout = self.dropout.p if self.training else 0.0
        return self.fused.residual_norm(x, b, residual, norm.weight, norm.bias, norm.eps, dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        dense = self.dense
        if self.fused is not None and not self.watched and is_plain(dense):
            return self.add_norm(F.linear(x, dense.weight.to(x.dtype)), residual, dense.bias)
        return self.add_norm(dense(x), residual)


class BertLayer(nn.Module):
    """One post-LayerNorm encoder layer; with `recompute` it keeps only its input for the backward."""

    def __init__(self, config: BertConfig, use_te_layers: bool) -> None:
        super().__init__()
        linear = te_linear() if use_te_layers else Linear
        self.attention = nn.ModuleDict(
            {
                "self": BertSelfAttention(config, use_te_layers),
                "output": BertResidualOutput(config, config.hidden_size, linear),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": linear(config.hidden_size, config.intermediate_size)})
        self.output = BertResidualOutput(config, config.intermediate_size, linear)
        self.activation = ACT2FN[config.hidden_act]
        self.fused: FusedKernels | None = None
        self.use_te_layers = use_te_layers
        self.recompute = False

    def forward(self, x: Tensor, plan: Any) -> Tensor:
        """[T, H] -> [T, H]."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self.compute(x, plan)
        return checkpoint_function(self.use_te_layers)(self.compute, x, plan, use_reentrant=False)

    def compute(self, x: Tensor, plan: Any) -> Tensor:
        attention, output = self.attention["self"], self.attention["output"]
        attended, residual = attention(x, plan)
        # Kernels add to the gradient of their residual in place: a hook must not see it before.
        return self.feed_forward(output(attended, x if output.watched else residual))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the layer: [T, H] -> [T, H]."""
        expand, contract = self.intermediate["dense"], self.output.dense
        if not is_plain(expand) or type(self.activation) is not nn.ReLU or is_watched(self.activation):
            return self.output(self.activation(expand(x)), x)
        weight, bias = expand.weight.to(x.dtype), expand.bias.to(x.dtype)
        if self.fused is None or self.output.watched or not is_plain(contract):
            return self.output(LinearReLU.apply(x, weight, bias), x)
        x, residual = self.fused.feed_forward(x, weight, bias, contract.weight.to(x.dtype))
        return self.output.add_norm(x, residual, contract.bias)

    def compile_in_place(self) -> None:
        """Compile the layer, or what lies between the matrix products of Transformer Engine."""
        if self.use_te_layers:
            compile_method(self.attention["output"], "add_norm")
            compile_method(self.output, "add_norm")
        else:
            compile_method(self, "compute")


class BertModel(nn.Module):
    """Embeddings and encoder layers over packed tokens."""

    def __init__(self, config: BertConfig, use_te_layers: bool) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        layers = (BertLayer(config, use_te_layers) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.attention: Attention = FlashAttention()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        output_hidden_states: bool,
    ) -> list[Tensor]:
        """[T] -> [T, H] each: the last layer's output, preceded on request by the embeddings and the others."""
        plan = self.attention.plan(cu_seqlens, max_seqlen, len(input_ids))
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        before = []
        for layer in self.encoder["layer"].children():
            if output_hidden_states:  # Otherwise they are freed: in FP8, the backward does without.
                before.append(x)
            x = layer(x, plan)
        return [*before, x]


class BertPredictions(nn.Module):
    """The masked-language-model head: dense, activation, LayerNorm, projection on the word embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": Linear(config.hidden_size, config.hidden_size),
                "LayerNorm": LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACT2FN[config.hidden_act]
        self.fused: FusedKernels | None = None

    def features(self, hidden: Tensor) -> Tensor:
        return self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden)))

    def logits(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[*, H], [V, H] -> [*, V]."""
        return F.linear(self.features(hidden), word_embeddings.to(hidden.dtype), self.bias.to(hidden.dtype))

    def forward(
        self, hidden: Tensor, masked_index: Tensor, labels: Tensor, word_embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies over masked positions, and their number.

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
    """The name that Hugging Face gives a parameter, from the one it has with either kind of layers."""
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
    """

    config_class = BertConfig
    base_model_prefix = "bert"
    _no_split_modules = ("BertEmbeddings", "BertLayer")
    # Stock checkpoints may also hold the tied decoder, the pooler and the next-sentence head.
    _keys_to_ignore_on_load_unexpected = (
        r"cls\.predictions\.decoder\.",
        r"bert\.pooler\.",
        r"cls\.seq_relationship\.",
        r"bert\.embeddings\.position_ids",
    )

    def __init__(self, config: BertConfig, use_te_layers: bool = False) -> None:
        super().__init__(config)
        if config.pad_token_id is None:
            raise ValueError("config.pad_token_id is None; give the id of the padding token (0 for Geneformer).")
        self.bert = BertModel(config, use_te_layers)
        self.cls = nn.ModuleDict({"predictions": BertPredictions(config)})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertPredictions):
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.embeddings.word_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse, before anything is changed.

        Raises
        ------
        ValueError
            Always, with the way round.
        """
        raise ValueError(
            "This class does not resize its vocabulary: load the model with stock transformers.BertForMaskedLM, resize "
            "it there, save it, and load that with this class."
        )

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
        kwargs.setdefault("state_dict", dict(self.canonical_parameters()))
        super().save_pretrained(*args, **kwargs)

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
        """Use other implementations of what surrounds the matrix products; None for PyTorch's operations."""
        for module in self.modules():
            if isinstance(module, BertSelfAttention | BertLayer | BertResidualOutput | BertPredictions):
                module.fused = fused

    def compile_ends(self) -> None:
        """Compile embeddings and loss head in place, for packed calls of constant shape; layers compile themselves.

        Blocks rather than the whole: layers share one compiled graph, so start-up does not grow with depth,
        and gradients become ready layer by layer, so engines can overlap their communication.
        """
        compile_method(self.bert.embeddings, "forward")
        compile_method(self.head, "forward")

    def forward(
        self,
        input_ids: Tensor,
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
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Run padded cells, or packed cells when `cu_seqlens` is given.

        Parameters
        ----------
        input_ids
            Padded: [B, S]. Packed: [T], int32 or int64.
        attention_mask
            Padded: [B, S], 1 for tokens and 0 for padding; None attends to everything, as stock BERT does.
        token_type_ids, position_ids
            Shaped as input_ids. Defaults: type 0; positions 0..S-1 (required when packed).
        labels
            Padded: [B, S], -100 where nothing is to be predicted. Packed: [K], beside `masked_index`.
        output_hidden_states, output_attentions, return_dict
            As in stock BERT, by default those of the configuration; attentions are refused.
        cu_seqlens, max_seqlen
            Packed: int32 [N+1] boundaries of the cells, which cover all T tokens, and a bound of their lengths.
        masked_index
            Packed: [K], flat positions of `labels`.

        Raises
        ------
        ValueError
            An argument that is not supported, or arguments that do not fit together.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: the attention kernels never form the weights. Stock "
                "transformers.BertForMaskedLM returns them, loaded with attn_implementation='eager'."
            )
        if cu_seqlens is None:
            if masked_index is not None or max_seqlen is not None:
                raise ValueError("masked_index and max_seqlen belong to packed calls, which need cu_seqlens.")
            output = self._padded(input_ids, attention_mask, token_type_ids, position_ids, labels, output_hidden_states)
            return output if return_dict else output.to_tuple()
        if input_ids.dim() != 1 or attention_mask is not None or position_ids is None or max_seqlen is None:
            raise ValueError(
                "Packed calls take input_ids [T], position_ids, cu_seqlens, max_seqlen, no attention_mask."
            )
        if (labels is None) != (masked_index is None):
            raise ValueError("Packed calls take labels [K] and masked_index [K] together.")
        hidden_states = self.bert(input_ids, position_ids, token_type_ids, cu_seqlens, max_seqlen, output_hidden_states)
        word_embeddings = self.bert.embeddings.word_embeddings.weight
        parts: dict[str, Any] = {"hidden_states": tuple(hidden_states)} if output_hidden_states else {}
        if labels is None:
            parts["logits"] = self.head.logits(hidden_states[-1], word_embeddings)
        else:
            loss_sum, num_labels = self.head(hidden_states[-1], masked_index, labels, word_embeddings)
            parts |= {"loss": loss_sum / num_labels, "loss_sum": loss_sum, "num_labels": num_labels}
        output = MaskedLMOutput(**parts)
        return output if return_dict else output.to_tuple()

    def _padded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        output_hidden_states: bool,
    ) -> MaskedLMOutput:
        if input_ids.dim() != 2:
            raise ValueError(f"Padded calls take input_ids [B, S]; got the shape {tuple(input_ids.shape)}.")
        batch_size, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; only [B, S] = "
                f"{tuple(input_ids.shape)} with 1 for tokens and 0 for padding is supported."
            )
        if position_ids is None:
            most = self.config.max_position_embeddings
            if length > most and attention_mask[:, most:].any():
                raise ValueError(f"A cell has tokens beyond position {most - 1}; this model has {most} positions.")
            position_ids = torch.arange(length, device=input_ids.device)
        valid = attention_mask.bool()
        index = valid.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()

        def unpad(x: Tensor) -> Tensor:
            return x.expand(batch_size, length).flatten()[index]

        def pad(x: Tensor) -> Tensor:
            padded = x.new_zeros(batch_size * length, x.shape[-1]).index_copy(0, index, x)
            return padded.view(batch_size, length, -1)

        hidden_states = self.bert(
            unpad(input_ids),
            unpad(position_ids),
            None if token_type_ids is None else unpad(token_type_ids),
            cu_seqlens,
            length,
            output_hidden_states,
        )
        logits = self.head.logits(hidden_states[-1], self.bert.embeddings.word_embeddings.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), unpad(labels), ignore_index=-100)
        return MaskedLMOutput(
            loss=loss,
            logits=pad(logits),
            hidden_states=tuple(pad(x) for x in hidden_states) if output_hidden_states else None,
        )
