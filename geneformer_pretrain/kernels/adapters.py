"""Adapters from the Triton kernels to the protocols of modeling_bert_te.py.

Only this module and the kernels import Triton, which does not exist on every platform.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.kernels.attention import packed_attention, tile_list
from geneformer_pretrain.kernels.fp8 import Fp8FeedForward, Fp8Linear
from geneformer_pretrain.kernels.fp8_scaling import PROJECTION, QKV, LayerScales
from geneformer_pretrain.kernels.linear import FeedForward, LinearWithResidual, linear_cross_entropy
from geneformer_pretrain.kernels.norm import residual_norm


class TritonAttention:
    """`modeling_bert_te.Attention` by the kernels of `kernels.attention`."""

    computes_bias_grad = True

    def prepare(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Tensor:
        """Return the list of tiles."""
        return tile_list(cu_seqlens, num_tokens)

    def __call__(self, qkv: Tensor, prepared: Tensor, dropout: float, bias: Tensor | None = None) -> Tensor:
        """Attend: [T, 3, A, D] -> [T, A, D]; the seed of dropout is drawn from the device's default generator."""
        return packed_attention(qkv, bias, prepared, draw_seed(qkv.device), dropout)[0]


class TritonFused:
    """`modeling_bert_te.FusedKernels` by the kernels of `kernels.norm` and `kernels.linear`."""

    def residual_norm(
        self, x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """Draw the seed of dropout as for attention."""
        return residual_norm(x, b, residual, weight, bias, draw_seed(x.device), eps, dropout)[0]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Leave the product to cuBLAS."""
        return F.linear(x, weight.to(x.dtype))

    def linear_with_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of x in place."""
        return LinearWithResidual.apply(x, weight.to(x.dtype), bias)

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of x in place."""
        return FeedForward.apply(x, expand.to(x.dtype), bias, contract.to(x.dtype))

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Replace the logits by their gradient in place."""
        return linear_cross_entropy(x, weight, bias, labels)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed for a kernel from the device's default generator: int64 [1]."""
    return torch.randint(2**31, (1,), device=device)


class TritonFp8(TritonFused):
    """`modeling_bert_te.FusedKernels` of one encoder layer whose matrix products are in FP8."""

    def __init__(self, scales: LayerScales) -> None:
        self.scales = scales

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Project the attention's output."""
        return self._linear(x, weight, None, PROJECTION)[0]

    def linear_with_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Project to query, key and value."""
        return self._linear(x, weight, bias, QKV)

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the hidden tensor in FP8 alone."""
        scales = self.scales
        return Fp8FeedForward.apply(
            x, expand, bias, contract, scales.forward_scales, scales.forward_maxima, scales.backward_scales,
            scales.backward_maxima, torch.is_grad_enabled(),
        )  # fmt: skip

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
        scales = self.scales
        return Fp8Linear.apply(
            x, weight, bias, scales.forward_scales, scales.forward_maxima, scales.backward_scales,
            scales.backward_maxima, number, torch.is_grad_enabled(),
        )  # fmt: skip
