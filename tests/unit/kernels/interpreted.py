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

from geneformer_pretrain.kernels import attention, linear, norm
from geneformer_pretrain.kernels.dropout import dropout_constants

SEED = 11
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


@pytest.fixture(autouse=True)
def _small_and_without_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
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
