"""Triton kernels for LayerNorm(residual + dropout(x + b)), the end of both halves of a BERT layer.

Each tensor is read and written once. The forward keeps the sum that is normalised, and its statistics; the backward
computes the dropout mask again. There, each program sums the gradients of LayerNorm's weight and bias and of b over its
rows; these partial sums are added up outside of the operators, where the compiler sees it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from geneformer_pretrain.kernels.dropout import dropout_constants, is_dropped

FORWARD = {256: (8, 4), 512: (4, 4), 1024: (4, 4), 2048: (1, 4), 4096: (1, 4)}
"""Rows per program and warps, by the width rounded up to a power of two."""

BACKWARD = {256: (2, 1, 16), 512: (1, 1, 16), 1024: (1, 1, 8), 2048: (1, 2, 8), 4096: (1, 2, 4)}
"""Rows at a time, warps, and programs per multiprocessor, which share the rows.

Both tables were chosen on an H200 for widths of 256, 768 and 2560. With few warps a row is summed without waiting for
other warps.
"""

MULTIPROCESSORS = 132
"""Number of multiprocessors of a Hopper GPU."""


@triton.jit
def _norm_forward(
    x, b, residual, weight, bias, seed, out, sums, mean, rstd, num_rows, eps, threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_B: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    valid = (rows < num_rows)[:, None] & inside[None, :]
    where = rows[:, None] * WIDTH + columns[None, :]
    kind = out.dtype.element_ty
    value = tl.load(x + where, mask=valid, other=0.0).to(tl.float32)
    if HAS_B:
        value += tl.load(b + columns, mask=inside, other=0.0).to(kind).to(tl.float32)[None, :]
    if DROPOUT:
        value = tl.where(is_dropped(where, tl.load(seed), threshold), 0.0, value * keep_scale)
    value += tl.load(residual + where, mask=valid, other=0.0).to(tl.float32)
    total = value.to(kind)
    tl.store(sums + where, total, mask=valid)
    # Statistics belong to what the backward will read.
    value = total.to(tl.float32)
    average = tl.sum(value, 1) / WIDTH
    deviation = tl.where(inside[None, :], value - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / WIDTH + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(kind).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(kind).to(tl.float32)
    tl.store(out + where, (deviation * scale[:, None] * w[None, :] + shift[None, :]).to(kind), mask=valid)
    tl.store(mean + rows, average, mask=rows < num_rows)
    tl.store(rstd + rows, scale, mask=rows < num_rows)


@triton.jit
def _norm_backward(
    grad_out, sums, mean, rstd, weight, seed, grad_x, grad_residual, partial, num_rows, threshold, keep_scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_B: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    kind = grad_x.dtype.element_ty
    w = tl.load(weight + columns, mask=inside, other=0.0).to(kind).to(tl.float32)
    # A sum for each row of a block: the rows are added up once, at the end.
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_b = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = (rows < num_rows)[:, None] & inside[None, :]
        where = rows[:, None] * WIDTH + columns[None, :]
        grad = tl.load(grad_out + where, mask=valid, other=0.0).to(tl.float32)
        value = tl.load(sums + where, mask=valid, other=0.0).to(tl.float32)
        average = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        normal = tl.where(valid, (value - average[:, None]) * scale[:, None], 0.0)
        grad_weight += grad * normal
        grad_bias += grad
        grad *= w[None, :]
        along_mean = tl.sum(grad, 1) / WIDTH
        along_scale = tl.sum(grad * normal, 1) / WIDTH
        grad = (grad - along_mean[:, None] - normal * along_scale[:, None]) * scale[:, None]
        tl.store(grad_residual + where, grad.to(kind), mask=valid)
        if DROPOUT:
            grad = tl.where(is_dropped(where, tl.load(seed), threshold), 0.0, grad * keep_scale)
        tl.store(grad_x + where, grad.to(kind), mask=valid)
        if HAS_B:
            grad_b += tl.where(valid, grad, 0.0)
    row = partial + tl.program_id(0) * (2 + HAS_B) * WIDTH + columns
    tl.store(row, tl.sum(grad_weight, 0), mask=inside)
    tl.store(row + WIDTH, tl.sum(grad_bias, 0), mask=inside)
    if HAS_B:
        tl.store(row + 2 * WIDTH, tl.sum(grad_b, 0), mask=inside)


def _block(width: int) -> int:
    return max(256, triton.next_power_of_2(width))


@library.custom_op("geneformer::residual_norm", mutates_args=())
def residual_norm(
    x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute LayerNorm(residual + dropout(x + b)); b, weight and bias are first rounded to the dtype of x.

    Parameters
    ----------
    x, residual
        [T, H], fewer than 2**31 elements, H at most 4,096.
    b
        Bias of the linear layer that x comes from, [H], or None.
    weight, bias
        LayerNorm's, [H].
    seed
        int64 [1] on the device; decides which elements are dropped.
    eps, dropout
        LayerNorm's epsilon; probability of dropping an element.

    Returns
    -------
    The output [T, H], and for the backward the sum [T, H] and its means and reciprocal standard deviations, FP32 [T].

    Raises
    ------
    ValueError
        More elements than the kernels' 32-bit offsets can reach.
    """
    num_rows, width = x.shape
    if x.numel() >= 2**31:
        raise ValueError(f"{num_rows:,} tokens are too many for one micro-batch; lower model.micro_batch_size.")
    x, residual = x.contiguous(), residual.contiguous()
    out, sums = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    block = _block(width)
    rows, warps = FORWARD[block]
    threshold, keep_scale = dropout_constants(dropout)
    _norm_forward[(triton.cdiv(num_rows, rows),)](
        x, b, residual, weight, bias, seed, out, sums, mean, rstd, num_rows, eps, threshold, keep_scale,
        WIDTH=width, BLOCK=block, ROWS=rows, HAS_B=b is not None, DROPOUT=dropout > 0, num_warps=warps,
    )  # fmt: skip
    return out, sums, mean, rstd


@residual_norm.register_fake
def _(
    x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@library.custom_op("geneformer::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    grad_out: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor, has_b: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x and residual, [T, H], and in P parts of weight, bias and b, FP32 [P, 2 or 3, H]."""
    num_rows, width = sums.shape
    grad_x, grad_residual = torch.empty_like(sums), torch.empty_like(sums)
    block = _block(width)
    rows, warps, programs = BACKWARD[block]
    partial = torch.empty(programs * MULTIPROCESSORS, 2 + has_b, width, dtype=torch.float32, device=sums.device)
    threshold, keep_scale = dropout_constants(dropout)
    _norm_backward[(len(partial),)](
        grad_out.contiguous(), sums, mean, rstd, weight, seed, grad_x, grad_residual, partial, num_rows, threshold,
        keep_scale, WIDTH=width, BLOCK=block, ROWS=rows, HAS_B=has_b, DROPOUT=dropout > 0, num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_residual, partial


@residual_norm_backward.register_fake
def _(
    grad_out: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor, has_b: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = sums.shape[1]
    partial = sums.new_empty(BACKWARD[_block(width)][2] * MULTIPROCESSORS, 2 + has_b, width, dtype=torch.float32)
    return torch.empty_like(sums), torch.empty_like(sums), partial


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, b, _, weight, bias, seed, _, ctx.dropout = inputs
    ctx.dtypes = [weight.dtype, bias.dtype, *([] if b is None else [b.dtype])]
    ctx.save_for_backward(*output[1:], weight, seed)


def _backward_of_residual_norm(ctx: Any, grad_out: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    has_b = len(ctx.dtypes) == 3
    grad_x, grad_residual, partial = residual_norm_backward(grad_out, *ctx.saved_tensors, has_b, ctx.dropout)
    grad_weight, grad_bias, *grad_b = (grad.to(dtype) for grad, dtype in zip(partial.sum(0), ctx.dtypes, strict=True))
    return grad_x, grad_b[0] if has_b else None, grad_residual, grad_weight, grad_bias, None, None, None


residual_norm.register_autograd(_backward_of_residual_norm, setup_context=_save_for_backward)
