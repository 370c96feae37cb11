"""FP8 forward passes written out in float64: a reference for the kernels, and their accuracy without a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.inference.fp8 import Fp8Layer, Fp8Linear


class Fp8Reference:
    """`modeling_bert_te.FusedKernels` of a layer; asserts that no number exceeds the range of E4M3."""

    def __init__(self, layer: Fp8Layer) -> None:
        self.layer = layer
        self.largest: list[float] = []

    def _cast(self, x: Tensor, linear: Fp8Linear) -> Tensor:
        scaled = x.double() * linear.scale.double()
        self.largest.append(scaled.abs().max().item())
        assert self.largest[-1] <= 464  # rounded to 448, the largest number
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).double() / linear.scale.double()

    def _multiply(self, low: Tensor, linear: Fp8Linear, bias: Tensor | None = None) -> Tensor:
        weight = linear.weight.double() * linear.inverse_weight.double()
        return F.linear(low, weight, None if bias is None else bias.double())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.numel():
            return F.linear(x, weight)
        return self._multiply(self._cast(x, self.layer.project), self.layer.project).to(x.dtype)

    def linear_with_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self._multiply(self._cast(x, self.layer.qkv), self.layer.qkv, bias).to(x.dtype), x

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.layer.expand, self.layer.contract
        hidden = self._multiply(self._cast(x, first), first, bias).relu()
        return self._multiply(self._cast(hidden, second), second).to(x.dtype), x

    def residual_norm(
        self, x: Tensor, b: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        total = x.float() + b.float() + residual.float()
        return F.layer_norm(total, weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
