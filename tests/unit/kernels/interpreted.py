"""The Triton kernels in FP32 on a CPU, by Triton's interpreter; `test_interpreter.py` runs this file.

References are written out in float64, and dropout's masks are computed from the documented hash in Python's integers.
The interpreter knows no PTX: the two functions written in it are replaced by the same arithmetic in Triton's language.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.testing import assert_close
from triton.runtime import interpreter

from geneformer_pretrain.kernels import attention, fp8, linear, norm
from geneformer_pretrain.kernels.adapters import TritonFp8
from geneformer_pretrain.kernels.dropout import dropout_constants
from geneformer_pretrain.kernels.fp8_scaling import DelayedScaling

SEED = 11
interpreted_conversion = interpreter._convert_float
# Compiled Triton wraps silently around at 32 bits, and weights of masked keys overflow on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def drop(weights, a, rotated, b, threshold):
    """`attention._drop` without PTX."""
    dropped = (a * b + rotated).to(tl.uint32, bitcast=True) < threshold
    return tl.where(dropped, 0.0, weights)


@triton.jit
def grad_of_scores(weights, grad_weights, minus_delta, a, rotated, b, threshold):
    """`attention._grad_of_scores` without PTX."""
    dropped = (a * b + rotated).to(tl.uint32, bitcast=True) < threshold
    return weights * (minus_delta + tl.where(dropped, 0.0, grad_weights))


def convert_float(values, source, target, rounding):
    """Triton's conversion, except to FP8, where the interpreter loses carries: PyTorch's, and saturated as on GPUs."""
    kinds = {"fp8e4nv": (torch.float8_e4m3fn, 448.0), "fp8e5": (torch.float8_e5m2, 57344.0)}
    if str(target) not in kinds:
        return interpreted_conversion(values, source, target, rounding)
    kind, largest = kinds[str(target)]
    wide = interpreted_conversion(values, source, tl.float32, None).view(np.float32) if source != tl.float32 else values
    return torch.from_numpy(wide.clip(-largest, largest)).to(kind).view(torch.uint8).numpy()


@pytest.fixture(autouse=True)
def _small_and_without_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(attention, "_drop", drop)
    monkeypatch.setattr(attention, "_grad_of_scores", grad_of_scores)
    monkeypatch.setattr(norm, "MULTIPROCESSORS", 1)


def mix(x: np.ndarray) -> np.ndarray:
    """Wellons' lowbias32 on integers kept below 2**32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def kept(lengths: list[int], heads: int, dropout: float) -> list[Tensor]:
    """The attention weights that are kept: bool [A, n, n] for each cell, by the formula in the kernel's docstring."""
    tiles = sum(-(-n // 128) for n in lengths)
    row = np.arange(128 * tiles, dtype=np.uint64)
    keys = [mix((mix(row) ^ SEED) + line * 0x9E3779B9 & 0xFFFFFFFF) | 1 for line in range(1 + heads)]
    masks, first = [], 0
    for n in lengths:
        b = keys[0][first : first + n]
        a = np.stack([key[first : first + n] for key in keys[1:]])[:, :, None]
        rotated = (a << 13 | a >> 19) & 0xFFFFFFFF
        masks.append(torch.from_numpy((a * b + rotated) % 2**32 >= round(dropout * 2**32)))
        first += 128 * -(-n // 128)
    return masks


def reference(qkv: Tensor, bounds: list[int], keep: list[Tensor], dropout: float) -> Tensor:
    """Attention within each cell: [T, 3, A, D] -> [T, A, D]."""
    outputs = []
    for mask, (start, end) in zip(keep, pairwise(bounds), strict=True):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append((weights * mask / (1 - dropout) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[1], [5, 64, 1, 70], [130, 33]], ids=str)
def test_attention(lengths, dropout):
    heads, size = 2, 16
    bounds = np.cumsum([0, *lengths]).tolist()
    qkv = torch.randn(bounds[-1], 3, heads, size, requires_grad=True)
    bias = torch.zeros(3 * heads * size, requires_grad=True)
    cu_seqlens = torch.tensor([*bounds, bounds[-1], bounds[-1]]).int()  # empty cells, as the loader leaves them
    tiles = attention.tile_list(cu_seqlens, len(qkv))
    out, _, _ = attention.packed_attention(qkv, bias, tiles, torch.tensor([SEED]), dropout)
    grad = torch.randn_like(out)
    out.backward(grad)

    exact = qkv.detach().double().requires_grad_()
    expected = reference(exact, bounds, kept(lengths, heads, dropout), dropout)
    expected.backward(grad.double())
    assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert_close(qkv.grad.double(), exact.grad, atol=2e-5, rtol=1e-4)
    assert_close(bias.grad.double(), exact.grad.flatten(1).sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_of_rows_that_outgrow_their_own_key(dropout):
    """FP32 has no room for weights relative to the own key: the kernel starts again with a running maximum."""
    qkv = torch.randn(70, 3, 1, 16)
    qkv[::3, :2] *= 30
    scores = qkv[:, 0, 0] @ qkv[:, 1, 0].T / 4
    assert (scores.max(1).values - scores.diagonal()).max() > 100
    tiles = attention.tile_list(torch.tensor([0, 70]).int(), 70)
    out, _, _ = attention.packed_attention(qkv, None, tiles, torch.tensor([SEED]), dropout)
    expected = reference(qkv.double(), [0, 70], kept([70], 1, dropout), dropout)
    assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (21, 300)])
def test_residual_norm(rows, width, dropout, with_b):
    x, residual, weight, bias, b = leaves = [
        torch.randn(*shape, requires_grad=True)
        for shape in ((rows, width), (rows, width), (width,), (width,), (width,))
    ]
    seed, grad = torch.tensor([SEED]), torch.randn(rows, width)
    out = norm.residual_norm(x, b if with_b else None, residual, weight, bias, seed, 1e-12, dropout)[0]
    out.backward(grad)

    numbers = mix(np.arange(rows * width, dtype=np.uint64) ^ SEED).reshape(rows, width)
    keep = torch.from_numpy(numbers >= dropout_constants(dropout)[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    total = exact[1] + (exact[0] + (exact[4] if with_b else 0.0)) * keep / (1 - dropout)
    expected = F.layer_norm(total, (width,), exact[2], exact[3], 1e-12)
    expected.backward(grad.double())
    assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(leaves[: 4 + with_b], exact, strict=False):
        assert_close(found.grad.double(), wanted.grad, atol=1e-4, rtol=1e-4)


def test_linear_cross_entropy():
    rows, width, columns = 9, 16, 50
    x, weight, bias = leaves = [
        torch.randn(*shape, requires_grad=True) for shape in ((rows, width), (columns, width), (columns,))
    ]
    with torch.no_grad():
        bias[40:] = float("-inf")  # padding of the vocabulary
    labels = torch.randint(40, (rows,))
    labels[2] = -100
    loss = linear.linear_cross_entropy(x, weight, bias, labels)
    (0.37 * loss).backward()
    with torch.no_grad():
        assert torch.equal(linear.linear_cross_entropy(x, weight, bias, labels), loss)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    (0.37 * expected).backward()
    assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)
    for found, wanted in zip(leaves, exact, strict=True):
        assert_close(found.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_cross_entropy_of_labels_that_are_no_column_is_nan():
    losses = linear.cross_entropy_(torch.zeros(4, 16), torch.tensor([3, -100, 16, -5]), True)
    assert losses.isnan().tolist() == [False, False, True, True]
    assert losses[1] == 0


@pytest.mark.parametrize("rows", [1, 130])
def test_feed_forward_and_its_residual_gradient(rows):
    shapes = ((rows, 64), (136, 64), (136,), (64, 136))
    leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    grads = [torch.randn(rows, 64) for _ in range(2)]
    out = linear.FeedForward.apply(*leaves)
    torch.autograd.backward(out, [grad.clone() for grad in grads])
    x, expand, bias, contract = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.linear(F.linear(x, expand, bias).relu(), contract)
    torch.autograd.backward([expected, x * 1.0], [grad.double() for grad in grads])
    assert_close(out[0].double(), expected, atol=1e-3, rtol=1e-4)
    for found, wanted in zip(leaves, exact, strict=True):
        assert_close(found.grad.double(), wanted.grad, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("is_gradient", "dtype"), [(False, torch.float8_e4m3fn), (True, torch.float8_e5m2)])
@pytest.mark.parametrize("record", [True, False])
def test_fp8_cast(record, is_gradient, dtype):
    x = torch.randn(80, 144).bfloat16()
    x[70, 130] = -(2.0**20)
    scales, maxima = torch.tensor([1.0, 40.0]), torch.tensor([5.0, 5.0])
    rows, columns = fp8.fp8_cast(x, scales, maxima, 1, is_gradient, record)
    largest = torch.finfo(dtype).max
    assert torch.equal(rows.view(torch.uint8), (40 * x.float()).clamp(-largest, largest).to(dtype).view(torch.uint8))
    assert torch.equal(columns.view(torch.uint8), rows.view(torch.uint8).T)
    assert maxima.tolist() == [5.0, 2.0**20 if record else 5.0]


def test_fp32_is_not_cast():
    with pytest.raises(ValueError, match=r"Only BF16 is cast to FP8, not torch\.float32"):
        fp8.fp8_cast(torch.zeros(16, 16), torch.ones(1), torch.zeros(1), 0, False, True)


def test_fp8_products_with_epilogues():
    """Reference in float64 from the casts; sums of these products are exact in FP32."""
    rows, inner, width = 144, 32, 48
    a, b, bias = (torch.randint(-4, 5, shape) / 4.0 for shape in ((rows, inner), (width, inner), (width,)))
    one, scales, maxima = torch.ones(1), torch.tensor([1.0, 0.3]), torch.zeros(2)
    hidden, transposed = fp8.fp8_expand(
        a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), 2 * one, one / 4, bias, scales, maxima, 1, True
    )
    expected = (a.double() @ b.double().T / 2 + bias.double()).relu().float()
    assert maxima.tolist() == [0.0, expected.max()]
    assert torch.equal(hidden.float(), (expected * scales[1]).to(torch.float8_e4m3fn).float())
    assert torch.equal(transposed.float(), hidden.float().T)

    maxima.zero_()
    grad, transposed_grad, partial = fp8.fp8_product_where_positive(
        a.to(torch.float8_e5m2), b.to(torch.float8_e4m3fn), 2 * one, one / 4, transposed, scales, maxima, 1
    )
    expected = (a.double() @ b.double().T / 2 * (hidden.double() > 0)).float()
    assert maxima.tolist() == [0.0, expected.abs().max()]
    assert torch.equal(grad.float(), (expected * scales[1]).to(torch.float8_e5m2).float())
    assert torch.equal(transposed_grad.float(), grad.float().T)
    assert_close(partial.sum(0), expected.sum(0))


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as FP8 holds it, in float64."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).double() / scale.double()


def test_linear_layers_in_fp8():
    """Outputs and gradients are those of float64 on tensors rounded to FP8; scales are those of the step before."""
    size, wide, rows = 32, 64, 96
    scaling = DelayedScaling(1, torch.device("cpu"))
    kernels = TritonFp8(scaling.layer(0))
    x, *weights = (torch.randn(*s) for s in ((rows, size), (3 * size, size), (size, size), (wide, size), (size, wide)))
    x, biases = x.bfloat16(), [torch.randn(width).bfloat16() for width in (3 * size, wide)]
    grads = [(1e-4 * torch.randn(rows, width)).bfloat16() for width in (3 * size, size, size, size, size)]

    def run(training: bool = True) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_(training) for leaf in (x, *weights, *biases)]
        x_, qkv, project, expand, contract, of_qkv, of_hidden = leaves
        projected, residual = kernels.linear_with_residual(x_, qkv, of_qkv)
        out, other = kernels.feed_forward(x_, expand, of_hidden, contract)
        outputs = [projected, residual, kernels.linear(x_, project), out, other]
        if training:
            torch.autograd.backward(outputs, grads)
        return [*outputs, *(leaf.grad for leaf in leaves)]

    run()
    scaling.update()
    found = run()
    before = scaling.layer(0).forward_maxima.clone()
    with torch.no_grad():  # Validation leaves no trace.
        weights[0] *= 9
        run(training=False)
        weights[0] /= 9
    assert torch.equal(scaling.layer(0).forward_maxima, before)

    scales = scaling.layer(0)
    low, gradient = torch.float8_e4m3fn, torch.float8_e5m2
    xs = [quantized(x, scales.forward_scales[3 * i], low) for i in range(3)]
    qkv, project, expand, contract = (
        quantized(weight.bfloat16(), scales.forward_scales[3 * i + 1], low) for i, weight in enumerate(weights)
    )
    hidden = quantized((xs[2] @ expand.T + biases[1].double()).relu(), scales.forward_scales[9], low)
    of_qkv, of_project, of_out = (
        quantized(grads[place], scales.backward_scales[2 * i], gradient) for place, i in ((0, 0), (2, 1), (3, 3))
    )
    of_hidden = of_out @ contract * (hidden > 0)
    rounded = quantized(of_hidden, scales.backward_scales[4], gradient)
    expected = {
        "qkv": xs[0] @ qkv.T + biases[0].double(),
        "residual": x,
        "projected": xs[1] @ project.T,
        "feed-forward": hidden @ contract.T,
        "other residual": x,
        "x": of_qkv @ qkv + of_project @ project + rounded @ expand + grads[1].double() + grads[4].double(),
        "query, key, value": of_qkv.T @ xs[0],
        "project": of_project.T @ xs[1],
        "expand": rounded.T @ xs[2],
        "contract": of_out.T @ hidden,
        "qkv bias": grads[0].double().sum(0),
        "hidden bias": of_hidden.sum(0),
    }
    for (name, wanted), tensor in zip(expected.items(), found, strict=True):
        assert (tensor.double() - wanted).norm() < 0.01 * wanted.double().norm(), name
