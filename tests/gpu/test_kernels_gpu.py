"""The Triton kernels against attention and LayerNorm written out in float64."""

from itertools import pairwise

import pytest
import torch
from torch import library

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def reference(qkv, cu_seqlens, keep=None, dropout=0.0):
    """[T, 3, A, D] float64 -> [T, A, D]; `keep` is a list of bool [A, n, n], one for each cell."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for number, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            continue
        q, k, v = qkv[a:b].permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        if keep is not None:
            weights = weights * keep[number] / (1 - dropout)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def with_gradients(qkv, cu_seqlens, keep=None, dropout=0.0, seed=7):
    """Output and gradient of the kernels, and those of the reference."""
    leaf, out = run(qkv, cu_seqlens, dropout, seed)
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = qkv.double().requires_grad_()
    expected = reference(exact, cu_seqlens, keep, dropout)
    expected.backward(grad.double())
    return (out, leaf.grad), (expected, exact.grad)


def make(lengths, heads, size, scale=1.0, seed=0):
    torch.manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths, 0, 0], device="cuda").cumsum(0).int()
    qkv = (scale * torch.randn(sum(lengths), 3, heads, size, device="cuda")).bfloat16()
    return qkv, cu_seqlens


def run(qkv, cu_seqlens, dropout=0.0, seed=7, bias=None):
    from geneformer_pretrain.kernels.attention import packed_attention, tile_list

    qkv = qkv.detach().requires_grad_()
    tiles = tile_list(cu_seqlens, len(qkv))
    out, _, _ = packed_attention(qkv, bias, tiles, torch.tensor([seed], device="cuda"), dropout)
    return qkv, out


LENGTHS = [[1], [128], [129], [2048, 1, 127], [5, 300, 64, 1, 1, 700, 256], [100] * 30]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(4, 64), (2, 32), (1, 128)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_without_dropout(lengths, heads, size, scale):
    qkv, cu_seqlens = make(lengths, heads, size, scale)
    (out, grad), (expected, expected_grad) = with_gradients(qkv, cu_seqlens)
    assert error(out, expected) < 0.01
    if max(lengths) > 1:
        assert error(grad, expected_grad) < 0.02
    else:  # a single token attends to itself: no gradient for query and key
        assert (grad[:, :2].abs() < 1e-3).all()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(4, 64), (2, 32), (1, 128)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_of_the_bias_is_the_sum_over_tokens(lengths, heads, size, dropout):
    qkv, cu_seqlens = make(lengths, heads, size)
    bias = torch.zeros(3 * heads * size, device="cuda", requires_grad=True)
    leaf, out = run(qkv, cu_seqlens, dropout, bias=bias)
    out.backward(torch.randn_like(out))
    each = leaf.grad.double().flatten(1)
    # Sums of what is rounded afterwards: off by as much as each of the terms may be.
    assert ((bias.grad.double() - each.sum(0)).norm() <= 0.01 * each.norm(dim=0).norm()).item()


def dropped(qkv, cu_seqlens, dropout, seed, cell=0):
    """The mask that the kernels use in a cell, read off by attending with values that are unit vectors."""
    start, end = cu_seqlens[cell : cell + 2].tolist()
    length = end - start
    heads, size = qkv.shape[2:]
    keep = torch.zeros(heads, length, length, device="cuda", dtype=torch.bool)
    for first in range(0, length, size):
        probe = torch.zeros_like(qkv)  # equal weights
        n = min(size, length - first)
        probe[range(start + first, start + first + n), 2, :, range(n)] = 1
        _, out = run(probe, cu_seqlens, dropout, seed)
        keep[:, :, first : first + n] = (out[start:end, :, :n] > 0).permute(1, 0, 2)
    return keep


@pytest.mark.parametrize("lengths", [[200], [384], [128, 129, 1, 64, 65, 300]], ids=str)
def test_with_dropout_outputs_and_gradients_use_one_mask(lengths):
    dropout = 0.3
    qkv, cu_seqlens = make(lengths, 2, 64)
    keep = [dropped(qkv, cu_seqlens, dropout, 11, cell) for cell in range(len(lengths))]
    found, expected = with_gradients(qkv, cu_seqlens, keep, dropout, seed=11)
    assert error(found[0], expected[0]) < 0.01
    assert error(found[1], expected[1]) < 0.02


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_scores_far_below_zero(dropout):
    """Keys beyond a cell's end count as nothing even where their score of zero would be the largest by far."""
    qkv, cu_seqlens = make([70, 200], 2, 64)
    qkv[:, 0] = 8.0
    qkv[:, 1] = -8.0 + 0.1 * qkv[:, 1]
    leaf, out = run(qkv, cu_seqlens, dropout)
    out.backward(torch.randn_like(out))
    assert leaf.grad.isfinite().all()
    if not dropout:
        assert error(out, reference(qkv.double(), cu_seqlens)) < 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_that_outgrow_their_own_key(dropout):
    """Scores so far above that of the own key that FP32 has no room for the weights relative to it."""
    qkv, cu_seqlens = make([200, 70], 2, 64)
    qkv[::3, :2] *= 30
    scores = qkv[:200, 0, 0].float() @ qkv[:200, 1, 0].float().T / 8
    assert (scores.max(1).values - scores.diagonal()).max() > 100
    keep = [dropped(qkv, cu_seqlens, dropout, 11, cell) for cell in (0, 1)]
    found, expected = with_gradients(qkv, cu_seqlens, keep, dropout, seed=11)
    assert error(found[0], expected[0]) < 0.01
    assert error(found[1], expected[1]) < 0.02


def test_dropout_masks_look_random():
    dropout, length = 0.1, 1024
    qkv, cu_seqlens = make([length], 4, 64)
    masks = torch.stack([~dropped(qkv, cu_seqlens, dropout, seed) for seed in (1, 2)]).double()
    sigma = (dropout * (1 - dropout)) ** 0.5
    assert abs(masks.mean() - dropout) < 5 * sigma / masks.numel() ** 0.5
    for along in (-1, -2):  # no row and no column is dropped more than chance allows
        deviation = (masks.mean(along) - dropout).abs().max() / (sigma / length**0.5)
        assert deviation < 5.5
    flat = (masks - dropout).flatten(1) / sigma
    assert abs((flat[0] * flat[1]).mean()) < 5 / flat.shape[1] ** 0.5  # seeds
    heads = (masks[0] - dropout).flatten(1) / sigma
    assert abs((heads[0] * heads[1]).mean()) < 5 / heads.shape[1] ** 0.5
    rows = (masks[0, 0] - dropout) / sigma
    between_rows = (rows @ rows.T / length).fill_diagonal_(0)
    assert between_rows.abs().max() < 6.5 / length**0.5
    between_columns = (rows.T @ rows / length).fill_diagonal_(0)
    assert between_columns.abs().max() < 6.5 / length**0.5


def test_gradients_are_deterministic():
    qkv, cu_seqlens = make([700, 1, 300, 55], 4, 64)
    grad = torch.randn(len(qkv), 4, 64, device="cuda", dtype=torch.bfloat16)
    grads = []
    for _ in range(2):
        leaf, out = run(qkv, cu_seqlens, 0.1)
        out.backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("rows", [1, 7, 5000])
@pytest.mark.parametrize("width", [64, 256, 320, 768, 1100, 2560])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_b", [False, True])
def test_residual_norm(rows, width, dropout, dtype, with_b):
    from geneformer_pretrain.kernels.norm import residual_norm

    torch.manual_seed(rows + width)
    x, residual, grad = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(3))
    weight, bias, b = (torch.randn(width, device="cuda").bfloat16().to(dtype) for _ in range(3))
    leaves = [x, b if with_b else torch.zeros_like(b), residual, weight, bias]
    for tensor in leaves:
        tensor.requires_grad_()
    seed = torch.tensor([5], device="cuda")
    given = [x, b if with_b else None, *leaves[2:]]
    out = residual_norm(*given, seed, 1e-12, dropout)[0]
    out.backward(grad)

    # The sum of ones and zeros is the mask.
    _, mask, _, _ = residual_norm(torch.ones_like(x), None, torch.zeros_like(x), weight, bias, seed, 1e-12, dropout)
    keep = mask.detach() > 0
    assert abs((~keep).double().mean().item() - dropout) <= 5 * (dropout / keep.numel()) ** 0.5
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    total = exact[2] + (exact[0] + exact[1]) * keep / (1 - dropout)
    expected = torch.nn.functional.layer_norm(total, (width,), exact[3], exact[4], 1e-12)
    expected.backward(grad.double())
    assert error(out, expected) < 0.01
    for given_one, found, reference in zip(given, leaves, exact, strict=True):
        if given_one is not None:
            assert found.grad.dtype == found.dtype
            assert error(found.grad, reference.grad) < 0.01


def test_residual_norm_repeats_itself():
    from geneformer_pretrain.kernels.norm import residual_norm

    x, residual, grad = (torch.randn(3000, 256, device="cuda").bfloat16() for _ in range(3))
    grads = []
    for _ in range(2):
        b, weight, bias = (torch.ones(256, device="cuda", requires_grad=True) for _ in range(3))
        residual_norm(x, b, residual, weight, bias, torch.tensor([1], device="cuda"), 1e-12, 0.1)[0].backward(grad)
        grads.append(torch.stack([weight.grad, bias.grad, b.grad]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("rows", [1, 130, 3001])
@pytest.mark.parametrize(("width", "inner"), [(512, 256), (3072, 768), (1000, 72), (264, 2560)])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_products_beside_a_residual_connection(rows, width, inner, feed_forward):
    from geneformer_pretrain.kernels.linear import FeedForward, LinearWithResidual

    torch.manual_seed(rows + width)
    x, expand, bias, contract = (
        torch.randn(*s, device="cuda") for s in ((rows, inner), (width, inner), (width,), (inner, width))
    )
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (x, expand / inner**0.5, bias, contract / width**0.5)]
    leaves = leaves if feed_forward else leaves[:3]
    grads = [torch.randn(rows, size, device="cuda").bfloat16() for size in (inner if feed_forward else width, inner)]
    out = (FeedForward if feed_forward else LinearWithResidual).apply(*leaves)
    torch.autograd.backward(out, [grad.clone() for grad in grads])
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = torch.nn.functional.linear(*exact[:3])
    if feed_forward:
        # The ReLU's gradient is that of what was found: signs of sums near zero are a matter of rounding.
        passed = torch.ops.aten._addmm_activation(leaves[2], leaves[0], leaves[1].t()) > 0
        expected = torch.nn.functional.linear(expected * passed, exact[3])
    assert error(out[0], expected) < 0.01
    assert torch.equal(out[1], leaves[0])
    torch.autograd.backward([expected, exact[0] * 1.0], [grad.double() for grad in grads])
    for found, reference in zip(leaves, exact, strict=True):
        assert error(found.grad, reference.grad) < 0.01


def test_labels_that_are_no_column_make_the_loss_nan():
    from geneformer_pretrain.kernels.linear import cross_entropy_

    losses = cross_entropy_(torch.zeros(4, 16, device="cuda"), torch.tensor([3, -100, 16, -5], device="cuda"), True)
    assert losses.isnan().tolist() == [False, False, True, True]
    assert losses[1] == 0


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (257, 1000), (64, 25472), (3, 65536)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_linear_cross_entropy(rows, width, spread):
    from geneformer_pretrain.kernels.linear import linear_cross_entropy

    torch.manual_seed(rows)
    x, weight, bias = (torch.randn(*size, device="cuda") for size in ((rows, 64), (width, 64), (width,)))
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (x, weight * spread / 8, bias)]
    with torch.no_grad():
        leaves[2][width // 2 + 1 :] = float("-inf")  # what pads the vocabulary
    labels = torch.randint(width // 2 + 1, (rows,), device="cuda")
    labels[1::5] = -100
    loss = linear_cross_entropy(*leaves, labels)
    (0.37 * loss).backward()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*leaves, labels), loss)

    # Logits are BF16, so the reference takes them from the same product.
    logits = torch.nn.functional.linear(*leaves).detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (0.37 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
    x, weight, _ = (tensor.detach().double() for tensor in leaves)
    for found, reference in zip(leaves, (logits.grad @ weight, logits.grad.T @ x, logits.grad.sum(0)), strict=True):
        # A lone row may be predicted with certainty: no gradient.
        assert (found.grad.double() - reference).norm() <= 0.02 * reference.norm() + 1e-4


def test_operators_are_what_the_compiler_is_told():
    from geneformer_pretrain.kernels import attention as triton_attention
    from geneformer_pretrain.kernels import linear as triton_linear
    from geneformer_pretrain.kernels import norm as triton_norm

    def half(*size):
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    qkv, cu_seqlens = make([100, 30], 2, 64)
    qkv.requires_grad_()
    added = half(3 * 2 * 64).requires_grad_()
    tiles, seed = triton_attention.tile_list(cu_seqlens, len(qkv)), torch.tensor([3], device="cuda")
    attended = triton_attention.packed_attention(qkv, None, tiles, seed, 0.1)
    x, residual = (half(130, 64).requires_grad_() for _ in range(2))
    w, b, bias = (torch.randn(64, device="cuda", requires_grad=True) for _ in range(3))
    normed = triton_norm.residual_norm(x, b, residual, w, bias, seed, 1e-12, 0.1)
    x, qkv_alone, *saved = (tensor.detach() for tensor in (x, qkv, *attended, *normed))
    for operator, arguments in (
        (triton_attention.packed_attention, (qkv, None, tiles, seed, 0.1)),
        (triton_attention.packed_attention, (qkv, added, tiles, seed, 0.1)),
        (triton_attention.packed_attention_backward, (saved[0], qkv_alone, *saved[:3], tiles, 0.1, True)),
        (triton_norm.residual_norm, (residual, b, residual, w, bias, seed, 1e-12, 0.1)),
        (triton_norm.residual_norm_backward, (x, *saved[4:], w.detach(), seed, True, 0.1)),
        (triton_linear.product_where_positive, (x, half(64, 96), half(130, 96))),
        (triton_linear.add_product_, (half(130, 64), x, half(64, 64))),
        (triton_linear.cross_entropy_, (half(4, 128), torch.tensor([1, 2, -100, 4], device="cuda"), True)),
    ):
        library.opcheck(operator, arguments)
