"""FP8 forward passes: weights and scales of the linear layers of an encoder, from the model alone.

All tensors are E4M3 with one scale each, a power of two: rounding is relative, so that a scale decides only on what is
too small or too large. Nothing is too large, because scales come from bounds that hold for every input. By the
Cauchy-Schwarz inequality:

- The output of a LayerNorm over H features with weight g and bias b is g * n + b, where the 2-norm of n is at most
  sqrt(H). No element exceeds max|g| sqrt(H) + max|b|, and its 2-norm not max|g| sqrt(H) + ||b||.
- The output of a linear layer, w . x + b, is at most ||w|| ||x|| + |b|. So are the hidden tensor behind ReLU and the
  attention's output, a weighted mean of values.

So an embedding depends neither on the other cells of a job nor on the order of work.

Means over many tokens lose the errors of rounded activations, but not those of rounded weights, which all tokens share.
Weights are therefore rounded so that their product with a *typical input* is kept (`round_weight`): the mean input of
that layer over cells of random genes. This is bias correction (Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction") applied to weights in place of biases: where real cells have another mean, these
weights are as near to the original ones as any, whereas a corrected bias would be off.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from modeling_bert_te import BertForMaskedLM, BertLayer, BertResidualOutput, BertSelfAttention

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of E4M3. Up to 464, numbers are rounded to it: room for what BF16 adds to a bound."""
ROUNDED = 1 + 2**-4
"""Most that rounding to E4M3 adds to a number, as a factor."""

TYPICAL_CELLS, TYPICAL_LENGTH = 8, 512
"""Cells of random genes that typical inputs are the means of, and their genes."""
ROUNDS = 16
"""Attempts at rounding a weight."""


@dataclass(frozen=True)
class Fp8Linear:
    """A linear layer in FP8.

    Attributes
    ----------
    weight
        E4M3 [F, H].
    inverse_weight
        FP32 [1], what it has to be multiplied by.
    scale, inverse_scale
        FP32 [1], what an input is multiplied by before it is cast, and its reciprocal.
    """

    weight: Tensor
    inverse_weight: Tensor
    scale: Tensor
    inverse_scale: Tensor

    def exact_weight(self) -> Tensor:
        """The weight in FP32, which holds it exactly."""
        return self.weight.float() * self.inverse_weight


@dataclass(frozen=True)
class Fp8Layer:
    """The linear layers of an encoder layer; those of the feed-forward half are None unless ReLU is between them."""

    qkv: Fp8Linear
    project: Fp8Linear
    expand: Fp8Linear | None
    contract: Fp8Linear | None


def scale_for(bound: float) -> float:
    """The largest power of two by which numbers up to `bound` may be multiplied; 1 if there are none but zero."""
    return 2.0 ** (math.frexp(LARGEST / bound)[1] - 1) if bound > 0 else 1.0


def norm_bounds(norm: nn.LayerNorm) -> tuple[float, float]:
    """Bounds of the elements and of the 2-norm of a LayerNorm's output."""
    weight, bias = norm.weight.double(), norm.bias.double()
    largest = weight.abs().max().item() * math.sqrt(len(weight))
    return largest + bias.abs().max().item(), largest + bias.norm().item()


def linear_bound(weight: Tensor, bias: Tensor, input_norm: float) -> float:
    """Bound of weight @ x + bias for any x of at most this 2-norm, and for x rounded to E4M3: [F, H], [F]."""
    return (weight.double().norm(dim=1) * (ROUNDED * input_norm) + bias.double().abs()).max().item()


def round_weight(weight: Tensor, scale: float, typical: Tensor) -> Tensor:
    """Round weight * scale to E4M3 so that the product with a typical input is kept: FP32 [F, H], [H] -> E4M3 [F, H].

    Half of what rounding changed of the product is spread over the weights of a row, and these are rounded again: the
    few that were near the middle between two numbers of E4M3 become the other one. The best of each row is kept.
    """
    direction = typical / typical.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    aim = torch.zeros_like(weight[:, :1])
    best, least = weight, torch.full_like(aim, torch.inf)
    for _ in range(ROUNDS):
        rounded = ((weight + aim * direction) * scale).clamp(-LARGEST, LARGEST).to(DTYPE).float()
        error = (weight - rounded / scale) @ typical[:, None]
        best = torch.where(error.abs() < least, rounded, best)
        least = torch.minimum(least, error.abs())
        aim = aim + error / 2
    return best.to(DTYPE)


def fp8_linear(weight: Tensor, typical: Tensor, bound: float) -> Fp8Linear:
    """Cast a linear layer whose inputs do not exceed `bound`: FP32 [F, H], [H]."""

    def tensor(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=weight.device)

    of_weight, of_input = scale_for(weight.abs().max().item()), scale_for(bound)
    return Fp8Linear(
        round_weight(weight, of_weight, typical), tensor(1 / of_weight), tensor(of_input), tensor(1 / of_input)
    )


def _layers(model: BertForMaskedLM) -> list[BertLayer]:
    return [cast(BertLayer, layer) for layer in model.bert.encoder["layer"].children()]


def _linears(layer: BertLayer) -> list[nn.Linear]:
    """Query, key, value, projection, expansion and contraction."""
    attention = cast(BertSelfAttention, layer.attention["self"])
    projections = attention.query, attention.key, attention.value, layer.attention["output"].dense
    return cast(list[nn.Linear], [*projections, layer.intermediate["dense"], layer.output.dense])


@torch.no_grad()
def typical_inputs(model: BertForMaskedLM, num_special_tokens: int, max_tokens: int) -> dict[nn.Module, Tensor]:
    """Mean input of each linear layer over cells of random genes, FP32 [H] or [F]."""
    embeddings = model.bert.embeddings.word_embeddings
    num_genes, device = embeddings.num_embeddings - num_special_tokens, embeddings.weight.device
    length = min(TYPICAL_LENGTH, max_tokens, num_genes)
    rng = np.random.default_rng(0)
    cells = [num_special_tokens + rng.permutation(num_genes)[:length] for _ in range(TYPICAL_CELLS)]
    means: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        means[module] = inputs[0].mean(0)

    with ExitStack() as hooks:
        for layer in _layers(model):
            for linear in _linears(layer):
                hooks.enter_context(linear.register_forward_pre_hook(record))
        model.bert(
            input_ids=torch.from_numpy(np.concatenate(cells)).to(device),
            position_ids=torch.arange(length, device=device).repeat(TYPICAL_CELLS),
            cu_seqlens=torch.arange(TYPICAL_CELLS + 1, dtype=torch.int32, device=device) * length,
            max_seqlen=length,
        )
    return means


@torch.no_grad()
def take_linear_layers(model: BertForMaskedLM, num_special_tokens: int, max_tokens: int) -> list[Fp8Layer]:
    """Cast the linear layers of a model's encoder, in FP32 on its device, to FP8.

    The weights that were cast are left empty in the model: calls of its parts fail, and its layers run with kernels
    that bring these weights (`kernels.InferenceFp8`).

    Parameters
    ----------
    num_special_tokens
        Tokens of the lowest numbers, which are no genes.
    max_tokens
        Longest cell that the model can read.
    """
    typical = typical_inputs(model, num_special_tokens, max_tokens)
    norm, taken = model.bert.embeddings.LayerNorm, []
    for layer in _layers(model):
        query, key, value, projection, expansion, contraction = linears = _linears(layer)
        element, length = norm_bounds(norm)
        qkv = fp8_linear(torch.cat([each.weight for each in (query, key, value)]), typical[query], element)
        bound = linear_bound(qkv.exact_weight()[-len(value.bias) :], value.bias, length)
        project, expand, contract = fp8_linear(projection.weight, typical[projection], bound), None, None
        if type(layer.activation) is nn.ReLU:
            element, length = norm_bounds(cast(BertResidualOutput, layer.attention["output"]).LayerNorm)
            expand = fp8_linear(expansion.weight, typical[expansion], element)
            bound = linear_bound(expand.exact_weight(), expansion.bias, length)
            contract = fp8_linear(contraction.weight, typical[contraction], bound)
        for linear in linears if expand else linears[:4]:
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        taken.append(Fp8Layer(qkv, project, expand, contract))
        norm = layer.output.LayerNorm
    return taken
