"""The Triton kernels in the form in which the model takes them.

A module of its own because Triton is not there on every platform.
"""

import torch
from torch import Tensor

from geneformer_pretrain.kernels.attention import packed_attention, tile_list
from geneformer_pretrain.kernels.linear import FeedForward, LinearBesideResidual, linear_cross_entropy
from geneformer_pretrain.kernels.norm import residual_norm


class TritonAttention:
    """`modeling_bert_te.Attention` by the kernels of `triton_attention`."""

    finds_bias_gradient = True

    def plan(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Tensor:
        """The list of tiles."""
        return tile_list(cu_seqlens, num_tokens)

    def __call__(self, qkv: Tensor, plan: Tensor, dropout: float, bias: Tensor | None = None) -> Tensor:
        """[T, 3, A, D] -> [T, A, D]; the seed of dropout is drawn from the device's default generator."""
        return packed_attention(qkv, bias, plan, draw_seed(qkv.device), dropout)[0]


class TritonFused:
    """`modeling_bert_te.FusedKernels` by the kernels of `triton_norm` and `triton_linear`."""

    def residual_norm(
        self, x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """The seed of dropout is drawn as for attention."""
        return residual_norm(x, b, residual, weight, bias, draw_seed(x.device), eps, dropout)[0]

    def linear_beside_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x are added in place."""
        return LinearBesideResidual.apply(x, weight, bias)

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x are added in place."""
        return FeedForward.apply(x, expand, bias, contract)

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Logits are replaced by their gradient in place."""
        return linear_cross_entropy(x, weight, bias, labels)


def draw_seed(device: torch.device) -> Tensor:
    """A seed for a kernel, from the device's default generator: int64 [1]."""
    return torch.randint(2**31, (1,), device=device)
