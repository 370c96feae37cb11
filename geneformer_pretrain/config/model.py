"""The group `model`: architecture, micro-batch and kernels."""

import math
from dataclasses import dataclass
from enum import StrEnum

from transformers.activations import ACT2FN

from geneformer_pretrain.errors import ConfigError, require


class Kernel(StrEnum):
    """Implementation of a part of the model; both compute the same."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


ARCHITECTURE = (
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

MAX_TOKENS_KEY = "geneformer_max_tokens"
"""Key of an export's `config.json`: tokens of the longest cell in training, where the model has more positions."""


@dataclass
class ModelConfig:
    """The BERT architecture and the shape of a micro-batch."""

    model_type: str
    """Always "bert"."""
    vocab_size: int
    """Number of tokens, special ones included. A corpus with a larger token is refused."""
    hidden_size: int
    """Width of the residual stream; a multiple of num_attention_heads."""
    num_hidden_layers: int
    """Encoder layers."""
    num_attention_heads: int
    """Attention heads. Heads of 64 run fastest; the Triton kernels know heads of 16, 32, 64 and 128."""
    intermediate_size: int
    """Width of the feed-forward layer."""
    hidden_act: str
    """Activation of the feed-forward layer and of the head, by its name in transformers (gelu, swish, ...). One with
    trainable parameters is refused."""
    hidden_dropout_prob: float
    """Dropout on embeddings and on both residual branches."""
    attention_probs_dropout_prob: float
    """Dropout on attention weights."""
    max_position_embeddings: int
    """Rows of the position table; at least seq_length."""
    type_vocab_size: int
    """Rows of the token-type table; training uses row 0."""
    initializer_range: float
    """Standard deviation of the initial weights."""
    layer_norm_eps: float
    """Added to the variance in LayerNorm."""
    pad_token_id: int
    """Id of the padding token; below data.num_special_tokens."""
    micro_batch_size: int
    """Cells per device and micro-batch. With packing the token budget is micro_batch_size x seq_length, a multiple of
    128, and short cells make room for more cells."""
    seq_length: int
    """Longest cell in tokens. Longer cells lose their end (they are in rank order); the number of such cells is printed
    at the start."""
    use_te_layers: bool
    """Linear layers of the encoder from Transformer Engine instead of PyTorch: other kernels, the same mathematics.
    Needs a GPU and Transformer Engine."""
    attention_kernel: Kernel
    """triton: this project's kernels, for BF16 on GPUs from compute capability 9.0. torch: PyTorch's FlashAttention in
    BF16, memory-efficient attention in FP32 and on older GPUs, one exact call per cell on the CPU. auto: Triton on
    Hopper GPUs with heads of at most 64, else torch."""
    fused_kernels: Kernel
    """Fused element-wise kernels: dropout with residual connection and LayerNorm, the gradients of ReLU, biases and
    residual connections, cross-entropy; with Transformer Engine layers LayerNorm and cross-entropy alone. triton: this
    project's kernels, for BF16 on GPUs of compute capability 9 or 10. torch: PyTorch's operations, which the compiler
    fuses. auto: Triton on Hopper GPUs, else torch."""

    def __post_init__(self) -> None:
        require(self.model_type == "bert", f"model.model_type is {self.model_type!r}; only 'bert' is supported.")
        for name in [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "micro_batch_size",
            "seq_length",
        ]:
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"model.{name} is {value}; it must be positive and finite.")
        if self.hidden_size % self.num_attention_heads:
            fitting = [str(n) for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            remedy = f"numbers of heads that divide it: {', '.join(fitting)}"
            if self.hidden_size % 64 == 0:
                remedy = f"heads of 64 want {self.hidden_size // 64} heads"
            raise ConfigError(
                f"model.hidden_size ({self.hidden_size}) is not divisible by model.num_attention_heads "
                f"({self.num_attention_heads}); {remedy}."
            )
        require(
            self.seq_length <= self.max_position_embeddings,
            f"model.seq_length ({self.seq_length}) exceeds model.max_position_embeddings "
            f"({self.max_position_embeddings}); lower the first or raise the second.",
        )
        require(
            self.hidden_act in ACT2FN,
            f"model.hidden_act is {self.hidden_act!r}; transformers knows {', '.join(sorted(ACT2FN))}.",
        )
        require(
            not any(True for _ in ACT2FN[self.hidden_act].parameters()),
            f"model.hidden_act={self.hidden_act} has trainable parameters of its own, which are not supported.",
        )
        require(
            0 <= self.pad_token_id < self.vocab_size,
            f"model.pad_token_id ({self.pad_token_id}) is outside of the vocabulary of {self.vocab_size} tokens.",
        )

    def architecture(self) -> dict[str, int | float | str]:
        """Return the keys that stock BERT knows."""
        return {key: getattr(self, key) for key in ARCHITECTURE}

    @property
    def token_budget(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch_size * self.seq_length
