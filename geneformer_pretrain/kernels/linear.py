"""Linear layers fused with their neighbours: residual connection, ReLU, cross-entropy over a vocabulary.

Element-wise operations read and write each tensor once, if at all: a matrix product adds the gradient of a residual
connection, a Triton kernel computes the gradients of ReLU and bias within another product, and a second kernel replaces
each row of logits by its gradient while the row is in registers. All other products are PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS = 128
PRODUCT = {"ROWS": ROWS, "COLUMNS": 128, "DEPTH": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3}
WIDE_PRODUCT = PRODUCT | {"COLUMNS": 256, "num_warps": 8, "num_stages": 4}
WIDE_FROM = 2048
"""Block sizes of a product, and the inner dimension from which wider blocks are faster (measured on an H100)."""


def require_contiguous(x: Tensor) -> None:
    """Raise ValueError for a tensor that a kernel would read in the wrong order."""
    if not x.is_contiguous():
        raise ValueError(f"A tensor of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous.")


@triton.jit
def block_of_product(num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and column of a program's block of a product.

    Blocks of GROUP times ROWS rows come one column after the other, so that they and b stay in the L2 cache.
    """
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(num_rows, ROWS)
    group, in_group = tl.program_id(0) // (GROUP * across), tl.program_id(0) % (GROUP * across)
    height = min(GROUP, down - group * GROUP)
    return (group * GROUP + in_group % height) * ROWS, in_group // height * COLUMNS


@triton.jit
def _product_where_positive(
    a_rows, b_rows, gate_rows, product_rows, partial, num_rows, width,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = block_of_product(num_rows, width, ROWS, COLUMNS, GROUP)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for inner in tl.range(0, INNER, DEPTH):
        product = tl.dot(a_rows.load([row, inner]), b_rows.load([inner, column]), product)
    product = tl.where(gate_rows.load([row, column]) > 0, product, 0.0)
    product_rows.store([row, column], product.to(product_rows.dtype))
    columns = column + tl.arange(0, COLUMNS)
    tl.store(partial + row // ROWS * width + columns, tl.sum(product, 0), mask=columns < width)


@library.custom_op("geneformer::product_where_positive", mutates_args=())
def product_where_positive(a: Tensor, b: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply a and b where the gate is positive; elsewhere the product is zero.

    Parameters
    ----------
    a, b, gate
        [T, H], [H, F], [T, F] of BF16, H and F multiples of 8.

    Returns
    -------
    The product [T, F]; and the sums over the rows of each of its P blocks, FP32 [P, F].

    Raises
    ------
    ValueError
        b or the gate is not contiguous.
    """
    require_contiguous(b)
    require_contiguous(gate)
    num_rows, width = gate.shape
    inner = len(b)
    shape = WIDE_PRODUCT if inner >= WIDE_FROM else PRODUCT
    columns, depth = shape["COLUMNS"], shape["DEPTH"]
    product = torch.empty_like(gate)
    partial = torch.empty(triton.cdiv(num_rows, ROWS), width, dtype=torch.float32, device=gate.device)
    _product_where_positive[(len(partial) * triton.cdiv(width, columns),)](
        TensorDescriptor.from_tensor(a.contiguous(), [ROWS, depth]),
        TensorDescriptor.from_tensor(b, [depth, columns]),
        TensorDescriptor.from_tensor(gate, [ROWS, columns]),
        TensorDescriptor.from_tensor(product, [ROWS, columns]),
        partial, num_rows, width, INNER=inner, **shape,
    )  # fmt: skip
    return product, partial


@product_where_positive.register_fake
def _(a: Tensor, b: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = gate.shape
    return torch.empty_like(gate), gate.new_empty(triton.cdiv(num_rows, ROWS), width, dtype=torch.float32)


@library.custom_op("geneformer::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`. An operator of its own because compiled code would copy the total first."""
    total.addmm_(a, b)


@add_product_.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


class LinearWithResidual(torch.autograd.Function):
    """Compute x @ weight.T + bias, and return x beside it for the residual connection.

    [T, H], [F, H], [F] of one dtype -> [T, F], [T, H]. The two gradients of x are added by the matrix product, in the
    memory of the residual connection's: nothing else may hold that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Not the gradient itself: the compiler traces with the forward's outputs in place of gradients, and would take
        # x, which FSDP2 hands over as a view, to be modified.
        add_product_(grad_residual.data, grad, weight)
        return grad_residual, grad.t() @ x, grad.sum(0) if ctx.needs_input_grad[2] else None


class FeedForward(torch.autograd.Function):
    """Compute relu(x @ expand.T + bias) @ contract.T, and return x beside it for the residual connection.

    [T, H], [F, H], [F], [H, F] of one dtype -> [T, H], [T, H]. One kernel computes the gradient of the hidden tensor,
    ReLU's and the bias'. As for `LinearWithResidual`, nothing else may hold the residual connection's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.ops.aten._addmm_activation(bias, x, expand.t())
        ctx.save_for_backward(x, expand, hidden, contract)
        return F.linear(hidden, contract), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor, ...]:
        x, expand, hidden, contract = ctx.saved_tensors
        grad_hidden, partial = product_where_positive(grad, contract, hidden)
        add_product_(grad_residual.data, grad_hidden, expand)
        return grad_residual, grad_hidden.t() @ x, partial.sum(0).to(grad.dtype), grad.t() @ hidden


@triton.jit
def _cross_entropy(logits, labels, losses, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """Compute one row per program, whole in registers."""
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
    """Compute the cross-entropy of each row, FP32 [K]; zero where the label is -100, NaN where it is no column.

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
    """Sum the cross-entropies of x @ weight.T + bias: [K, H], [V, H], [V], labels [K] -> FP32 scalar."""

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
        # One more column of ones, and seven for alignment: the bias' gradient without reading `grad` once more.
        of_weight, of_bias = (grad.t() @ F.pad(x, (0, 8), value=1.0)).split([x.shape[1], 8], dim=1)
        grads = grad @ weight, of_weight, of_bias[:, 0]
        return *((g.float() * grad_out).to(g.dtype) for g in grads), None


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropies of x @ weight.T + bias over the rows whose label is not -100, FP32 scalar.

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
