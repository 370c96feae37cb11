"""Linear layers with what surrounds them: residual connection, ReLU, cross-entropy over a vocabulary.

The matrix products are PyTorch's. What follows or precedes them reads and writes each tensor once: the gradient of a
residual connection is added by a matrix product, those of ReLU and bias are found in one pass, and a row of logits
is replaced by its gradient while it is there. The last two are Triton kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from .triton_norm import MULTIPROCESSORS

RELU_ROWS, RELU_COLUMNS = 8, 512
"""Block of a program of ReLU's backward."""

RELU_PROGRAMS = 8 * MULTIPROCESSORS


def require_contiguous(x: Tensor) -> None:
    """Raise ValueError for a tensor that a kernel would read in the wrong order."""
    if not x.is_contiguous():
        raise ValueError(f"A tensor of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous.")


@triton.jit
def _relu_backward(
    grad_out, out, grad, partial, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        where = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        valid = (rows < num_rows)[:, None] & inside[None, :]
        passed = tl.load(out + where, mask=valid, other=0.0) > 0
        value = tl.where(passed, tl.load(grad_out + where, mask=valid, other=0.0), 0.0)
        tl.store(grad + where, value, mask=valid)
        total += value.to(tl.float32)
    tl.store(partial + tl.program_id(0) * WIDTH + columns, tl.sum(total, 0), mask=inside)


@library.custom_op("geneformer::relu_backward", mutates_args=())
def relu_backward(grad_out: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient before a ReLU, from that after it and the ReLU's output, [T, F] each; and its sum over T, FP32 [F].

    Raises
    ------
    ValueError
        The output is not contiguous.
    """
    require_contiguous(out)
    num_rows, width = out.shape
    grad = torch.empty_like(out)
    blocks = triton.cdiv(width, RELU_COLUMNS)
    partial = torch.empty(triton.cdiv(RELU_PROGRAMS, blocks), width, dtype=torch.float32, device=out.device)
    _relu_backward[(len(partial), blocks)](
        grad_out.contiguous(), out, grad, partial, num_rows, WIDTH=width, ROWS=RELU_ROWS, BLOCK=RELU_COLUMNS
    )
    return grad, partial.sum(0)


@relu_backward.register_fake
def _(grad_out: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), out.new_empty(out.shape[1], dtype=torch.float32)


@library.custom_op("geneformer::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`. An operator of its own because compiled code would copy the total first."""
    total.addmm_(a, b)


@add_product_.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


class LinearBesideResidual(torch.autograd.Function):
    """x @ weight.T + bias, after ReLU on request, and x once more, for the residual connection around it.

    [T, H], [F, H], [F] of one dtype -> [T, F], [T, H]. The two gradients of x are added by the matrix product, in the
    memory of the residual connection's: nothing else may hold that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        out = torch.ops.aten._addmm_activation(bias, x, weight.t()) if relu else F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, *([out] if relu else []))
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *out = ctx.saved_tensors
        if out:
            grad, grad_bias = relu_backward(grad, *out)
        else:
            grad_bias = grad.sum(0)
        # Not the gradient itself: the compiler traces with the forward's outputs in place of gradients, and would take
        # x, which FSDP2 hands over as a view, to be modified.
        add_product_(grad_residual.data, grad, weight)
        return grad_residual, grad.t() @ x, grad_bias.to(grad.dtype), None


@triton.jit
def _cross_entropy(logits, labels, losses, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row a program, whole in registers."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    pointers = logits + row.to(tl.int64) * WIDTH + columns
    label = tl.load(labels + row)
    if label == -100:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            tl.store(pointers, tl.zeros([BLOCK], logits.dtype.element_ty), mask=inside)
        return
    # The label's logit is read before the barriers of the reductions, so before any gradient takes its place.
    known = (label >= 0) & (label < WIDTH)
    of_label = tl.load(logits + row.to(tl.int64) * WIDTH + label, mask=known, other=float("nan")).to(tl.float32)
    x = tl.load(pointers, mask=inside, other=float("-inf"))
    log2_e: tl.constexpr = 1.4426950408889634
    top = tl.max(x, 0).to(tl.float32) * log2_e
    log_total = top + tl.log2(tl.sum(tl.exp2(x.to(tl.float32) * log2_e - top), 0))
    tl.store(losses + row, log_total / log2_e - of_label)
    if GRADIENT:
        grad = tl.exp2(x.to(tl.float32) * log2_e - log_total)
        grad = tl.where(columns == label, grad - 1.0, grad)
        tl.store(pointers, grad.to(logits.dtype.element_ty), mask=inside)


@library.custom_op("geneformer::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    """Cross-entropy of each row, FP32 [K]; zero where the label is -100, NaN where it is no column.

    Parameters
    ----------
    logits
        [K, V], contiguous, V at most 65,536; the gradient of the rows' sum takes their place if it is asked for.
    labels
        Integers [K].

    Raises
    ------
    ValueError
        The logits are not contiguous.
    """
    require_contiguous(logits)
    num_rows, width = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(num_rows,)](
        logits, labels, losses, WIDTH=width, BLOCK=triton.next_power_of_2(width), GRADIENT=with_gradient,
        num_warps=8, maxnreg=128,
    )  # fmt: skip
    return losses


@cross_entropy_.register_fake
def _(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of x @ weight.T + bias: [K, H], [V, H], [V], labels [K] -> FP32 scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        losses = cross_entropy_(logits, labels, True)
        ctx.save_for_backward(x, weight, logits)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, grad = ctx.saved_tensors
        grads = grad @ weight, grad.t() @ x, grad.sum(0)
        return *((g.float() * grad_out).to(g.dtype) for g in grads), None


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sum of cross-entropies of x @ weight.T + bias over the rows whose label is not -100, FP32 scalar.

    Parameters
    ----------
    x, weight, bias
        [K, H], [V, H], [V], all of one dtype, V at most 65,536.
    labels
        Integers [K]; one that is neither -100 nor a column makes the sum NaN.
    """
    if torch.is_grad_enabled():
        return LinearCrossEntropy.apply(x, weight, bias, labels)
    return cross_entropy_(F.linear(x, weight, bias), labels, False).sum()
