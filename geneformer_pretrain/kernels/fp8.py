"""Linear layers in FP8: casts, matrix products whose epilogues write FP8, and the three products of a layer.

Forward tensors are E4M3, gradients E5M2, each with one scale for the whole tensor, as in Transformer Engine's delayed
scaling (`fp8_scaling`). Hopper's matrix units read FP8 along the summed dimension only: the forward and the gradient
of x sum over features, the gradient of a weight over tokens. So whatever is cast is written twice, as it is and
transposed, while it is in registers. The largest magnitude is found in passing; the next step's scale comes of it.

Where a product's result is needed in FP8 alone (the hidden tensor of the feed-forward half, and its gradient), a kernel
of this module computes the product, and no tensor in BF16 exists. All other products are cuBLAS', which is faster.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from geneformer_pretrain.kernels.fp8_scaling import CONTRACT, EXPAND, backward_slot, forward_slots
from geneformer_pretrain.kernels.linear import block_of_product, require_contiguous

FORWARD_DTYPE, GRADIENT_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2

CAST = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}
PRODUCT = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 128, "GROUP": 8, "num_warps": 4, "num_stages": 3}


@triton.jit
def _record(maxima, slot, value):
    """Raise the largest magnitude seen of a tensor to that of a block; few programs need the atomic operation."""
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    if largest > tl.load(maxima + slot):
        tl.atomic_max(maxima + slot, largest, sem="relaxed")


@triton.jit
def _cast(
    x, scales, maxima, slot, rows_out, columns_out, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows < num_rows)[:, None] & (columns < width)[None, :]
    value = tl.load(x + rows[:, None] * width + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if RECORD:
        _record(maxima, slot, value)
    low = (value * tl.load(scales + slot)).to(rows_out.dtype.element_ty)
    tl.store(rows_out + rows[:, None] * width + columns[None, :], low, mask=valid)
    tl.store(columns_out + columns[:, None] * num_rows + rows[None, :], low.T, mask=valid.T)


@library.custom_op("geneformer::fp8_cast", mutates_args=("maxima",))
def fp8_cast(
    x: Tensor, scales: Tensor, maxima: Tensor, slot: int, is_gradient: bool, record: bool
) -> tuple[Tensor, Tensor]:
    """Cast a matrix to FP8, times its scale; values out of range become the largest that there is.

    Parameters
    ----------
    x
        BF16 [R, C], contiguous, fewer than 2**31 elements.
    scales
        FP32 [slots]: factors.
    maxima
        FP32 [slots]; that of `slot` is raised to the largest magnitude in x, if `record`.
    is_gradient
        True for E5M2, which has more range; False for E4M3, which has more precision.

    Returns
    -------
    The matrix [R, C], and transposed, [C, R].

    Raises
    ------
    ValueError
        Not contiguous, or of another dtype.
    """
    require_contiguous(x)
    if x.dtype != torch.bfloat16:
        raise ValueError(f"Only BF16 is cast to FP8, not {x.dtype}: from FP32, Triton 3.6 loses parts of the result.")
    num_rows, width = x.shape
    rows_out, columns_out = _pair(x, is_gradient)
    _cast[(triton.cdiv(num_rows, CAST["ROWS"]), triton.cdiv(width, CAST["COLUMNS"]))](
        x, scales, maxima, slot, rows_out, columns_out, num_rows, width, RECORD=record, **CAST
    )
    return rows_out, columns_out


@fp8_cast.register_fake
def _(x: Tensor, scales: Tensor, maxima: Tensor, slot: int, is_gradient: bool, record: bool) -> tuple[Tensor, Tensor]:
    return _pair(x, is_gradient)


def _pair(x: Tensor, is_gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = GRADIENT_DTYPE if is_gradient else FORWARD_DTYPE
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)


@triton.jit
def _product(a_rows, b_rows, row, column, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Multiply a block of rows of a with one of rows of b, summed in FP32: [ROWS, COLUMNS]."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for inner in tl.range(0, depth, DEPTH):
        product = tl.dot(a_rows.load([row, inner]), b_rows.load([column, inner]).T, product)
    return product


@triton.jit
def _expand(
    a_rows, b_rows, inverse_a, inverse_b, bias, scales, maxima, slot, rows_out, columns_out, num_rows, width,
    inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    row, column = block_of_product(num_rows, width, ROWS, COLUMNS, GROUP)
    product = _product(a_rows, b_rows, row, column, inner, ROWS, COLUMNS, DEPTH)
    columns = column + tl.arange(0, COLUMNS)
    shift = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    value = tl.maximum(product * (tl.load(inverse_a) * tl.load(inverse_b)) + shift[None, :], 0.0)
    if RECORD:
        _record(maxima, slot, tl.where((row + tl.arange(0, ROWS) < num_rows)[:, None], value, 0.0))
    low = (value * tl.load(scales + slot)).to(rows_out.dtype)
    rows_out.store([row, column], low)
    columns_out.store([column, row], low.T)


@triton.jit
def _product_where_positive(
    a_rows, b_rows, inverse_a, inverse_b, gate_columns, scales, maxima, slot, rows_out, columns_out, partial, num_rows,
    width, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = block_of_product(num_rows, width, ROWS, COLUMNS, GROUP)
    gate = gate_columns.load([column, row]).T  # Before the product: on its way meanwhile.
    product = _product(a_rows, b_rows, row, column, inner, ROWS, COLUMNS, DEPTH)
    value = tl.where(gate.to(tl.float32) > 0, product * (tl.load(inverse_a) * tl.load(inverse_b)), 0.0)
    _record(maxima, slot, value)
    low = (value * tl.load(scales + slot)).to(rows_out.dtype)
    rows_out.store([row, column], low)
    columns_out.store([column, row], low.T)
    columns = column + tl.arange(0, COLUMNS)
    tl.store(partial + row // ROWS * width + columns, tl.sum(value, 0), mask=columns < width)


def _operands(a: Tensor, b: Tensor, rows_out: Tensor, columns_out: Tensor) -> tuple[TensorDescriptor, ...]:
    """View the operands and results of a product as blocks."""
    rows, columns, depth = PRODUCT["ROWS"], PRODUCT["COLUMNS"], PRODUCT["DEPTH"]
    blocks = (a, rows, depth), (b, columns, depth), (rows_out, rows, columns), (columns_out, columns, rows)
    return tuple(TensorDescriptor.from_tensor(x, [height, width]) for x, height, width in blocks)


def _num_programs(num_rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(num_rows, PRODUCT["ROWS"]) * triton.cdiv(width, PRODUCT["COLUMNS"]),)


@library.custom_op("geneformer::fp8_expand", mutates_args=("maxima",))
def fp8_expand(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, bias: Tensor, scales: Tensor, maxima: Tensor,
    slot: int, record: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute relu(a @ b.T + bias) in FP8.

    Parameters
    ----------
    a, b
        E4M3 [T, H] and [F, H], contiguous, T, H and F multiples of 16.
    inverse_a, inverse_b
        FP32 [1]: reciprocals of their scales.
    bias
        [F].
    scales, maxima, slot, record
        Of the result, as in `fp8_cast`.

    Returns
    -------
    E4M3 [T, F], and transposed, [F, T].
    """
    num_rows, inner = a.shape
    width = len(b)
    rows_out, columns_out = a.new_empty(num_rows, width), a.new_empty(width, num_rows)
    a_rows, b_rows, *out = _operands(a, b, rows_out, columns_out)
    _expand[_num_programs(num_rows, width)](
        a_rows, b_rows, inverse_a, inverse_b, bias, scales, maxima, slot, *out, num_rows, width,
        inner, RECORD=record, **PRODUCT,
    )  # fmt: skip
    return rows_out, columns_out


@fp8_expand.register_fake
def _(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, bias: Tensor, scales: Tensor, maxima: Tensor,
    slot: int, record: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return a.new_empty(len(a), len(b)), a.new_empty(len(b), len(a))


@library.custom_op("geneformer::fp8_product_where_positive", mutates_args=("maxima",))
def fp8_product_where_positive(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, gate: Tensor, scales: Tensor, maxima: Tensor, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a @ b.T in FP8 where the gate is positive; elsewhere the product is zero.

    Parameters
    ----------
    a, b
        E5M2 [T, H] and E4M3 [F, H], contiguous, T, H and F multiples of 16.
    gate
        E4M3, transposed: [F, T].
    inverse_a, inverse_b
        FP32 [1]: reciprocals of the scales of a and b.
    scales, maxima, slot
        Of the result, as in `fp8_cast`.

    Returns
    -------
    E5M2 [T, F], and transposed, [F, T]; and the sums over the rows of each of its P blocks, FP32 [P, F].
    """
    width, num_rows = gate.shape
    rows_out, columns_out = a.new_empty(num_rows, width), a.new_empty(width, num_rows)
    rows = PRODUCT["ROWS"]
    partial = torch.empty(triton.cdiv(num_rows, rows), width, dtype=torch.float32, device=a.device)
    a_rows, b_rows, *out = _operands(a, b, rows_out, columns_out)
    _product_where_positive[_num_programs(num_rows, width)](
        a_rows, b_rows, inverse_a, inverse_b, TensorDescriptor.from_tensor(gate, [PRODUCT["COLUMNS"], rows]),
        scales, maxima, slot, *out, partial, num_rows, width, a.shape[1], **PRODUCT,
    )  # fmt: skip
    return rows_out, columns_out, partial


@fp8_product_where_positive.register_fake
def _(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, gate: Tensor, scales: Tensor, maxima: Tensor, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    width, num_rows = gate.shape
    partial = a.new_empty(triton.cdiv(num_rows, PRODUCT["ROWS"]), width, dtype=torch.float32)
    return a.new_empty(num_rows, width), a.new_empty(width, num_rows), partial


def product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a @ b.T + bias in BF16 from FP8: [M, K], [N, K], [1], [1], [N] -> [M, N].

    The matrix units' own sums have 14 bits, which is enough for a forward.
    """
    return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def gradient_product(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a @ b.T from FP8: [M, K], [N, K], [1], [1] -> [M, N]. Sums, of as much as all tokens, are in FP32."""
    return torch._scaled_mm(a, b.t(), inverse_a, inverse_b, out_dtype=dtype)


def reciprocals(scales: Tensor) -> Tensor:
    """Compute 1 / scales, four of each: [slots] -> [slots, 4]. cuBLAS reads scales at multiples of 16 bytes alone."""
    return scales.reciprocal()[:, None].repeat(1, 4)


def one(values: Tensor, slot: int) -> Tensor:
    """Return one of the values of `reciprocals`, [1]."""
    return values[slot, :1]


class Fp8Linear(torch.autograd.Function):
    """Compute x @ weight.T + bias in FP8, and return x beside it for the residual connection.

    [T, H], [F, H], [F] or None -> [T, F], [T, H]; the weight may have any dtype, the rest is BF16. The backward keeps
    the transposed cast of x alone, half as much memory as in BF16.

    Parameters
    ----------
    forward_scales, forward_maxima, backward_scales, backward_maxima
        Of one layer, see `fp8_scaling.LayerScales`.
    number
        Which of the layer's linear layers this is.
    record
        True if maxima of the forward are recorded; those of a backward always are.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, forward_scales: Tensor, forward_maxima: Tensor,
        backward_scales: Tensor, backward_maxima: Tensor, number: int, record: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        of_x, of_weight = forward_slots(number)
        x_rows, x_columns = fp8_cast(x, forward_scales, forward_maxima, of_x, False, record)
        weight_rows, weight_columns = fp8_cast(
            weight.to(x.dtype), forward_scales, forward_maxima, of_weight, False, record
        )
        inverse = reciprocals(forward_scales)
        inverse_x, inverse_weight = one(inverse, of_x), one(inverse, of_weight)
        ctx.save_for_backward(x_columns, weight_columns, inverse_x, inverse_weight, backward_scales)
        ctx.maxima = backward_maxima  # Not saved: each backward changes them, and none depends on them.
        ctx.number, ctx.has_bias, ctx.dtype = number, bias is not None, weight.dtype
        return product(x_rows, weight_rows, inverse_x, inverse_weight, bias), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_x, inverse_weight, scales = ctx.saved_tensors
        slot = backward_slot(ctx.number)
        rows, columns = fp8_cast(grad.contiguous(), scales, ctx.maxima, slot, True, True)
        inverse = one(reciprocals(scales), slot)
        grad_x = grad_residual + gradient_product(rows, weight, inverse, inverse_weight, grad.dtype)
        grad_weight = gradient_product(columns, x, inverse, inverse_x, ctx.dtype)
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, *(None,) * 6


class Fp8FeedForward(torch.autograd.Function):
    """Compute relu(x @ expand.T + bias) @ contract.T in FP8, and return x beside it for the residual connection.

    [T, H], [F, H], [F], [H, F] -> [T, H], [T, H]; the weights may have any dtype, the rest is BF16. Other parameters
    are those of `Fp8Linear`. The hidden tensor and its gradient exist in FP8 alone. What is zero there has no gradient,
    though it may have been positive: by less than 2.2 millionths of the largest maximum in its history.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor, forward_scales: Tensor,
        forward_maxima: Tensor, backward_scales: Tensor, backward_maxima: Tensor, record: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (of_x, of_expand), (of_hidden, of_contract) = forward_slots(EXPAND), forward_slots(CONTRACT)
        x_rows, x_columns = fp8_cast(x, forward_scales, forward_maxima, of_x, False, record)
        expand_rows, expand_columns = fp8_cast(
            expand.to(x.dtype), forward_scales, forward_maxima, of_expand, False, record
        )
        contract_rows, contract_columns = fp8_cast(
            contract.to(x.dtype), forward_scales, forward_maxima, of_contract, False, record
        )
        inverse = reciprocals(forward_scales)
        inverses = [one(inverse, slot) for slot in (of_x, of_expand, of_hidden, of_contract)]
        inverse_x, inverse_expand, inverse_hidden, inverse_contract = inverses
        hidden_rows, hidden_columns = fp8_expand(
            x_rows, expand_rows, inverse_x, inverse_expand, bias, forward_scales, forward_maxima, of_hidden, record
        )
        ctx.save_for_backward(x_columns, expand_columns, hidden_columns, contract_columns, *inverses, backward_scales)
        ctx.maxima, ctx.dtype = backward_maxima, expand.dtype
        return product(hidden_rows, contract_rows, inverse_hidden, inverse_contract), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        x, expand, hidden, contract, *inverses, scales = ctx.saved_tensors
        inverse_x, inverse_expand, inverse_hidden, inverse_contract = inverses
        inverse = reciprocals(scales)
        of_hidden, of_out = backward_slot(EXPAND), backward_slot(CONTRACT)
        rows, columns = fp8_cast(grad.contiguous(), scales, ctx.maxima, of_out, True, True)
        inverse_out, inverse_grad = one(inverse, of_out), one(inverse, of_hidden)
        hidden_rows, hidden_columns, partial = fp8_product_where_positive(
            rows, contract, inverse_out, inverse_contract, hidden, scales, ctx.maxima, of_hidden
        )
        grad_x = grad_residual + gradient_product(hidden_rows, expand, inverse_grad, inverse_expand, grad.dtype)
        grad_expand = gradient_product(hidden_columns, x, inverse_grad, inverse_x, ctx.dtype)
        grad_contract = gradient_product(columns, hidden, inverse_out, inverse_hidden, ctx.dtype)
        return grad_x, grad_expand, partial.sum(0).to(grad.dtype), grad_contract, *(None,) * 5
