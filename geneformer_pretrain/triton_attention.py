"""Self-attention of packed cells with dropout, as Triton kernels for Hopper-class GPUs.

The algorithm is FlashAttention-2 (Dao, 2023): softmax in one pass over the keys, weights recomputed in the
backward. What is specific here:

- Work is cut into tiles of each cell's own rows, so no block is spent on the difference between a cell and
  the longest cell. The list of tiles is made on the device, once for all layers.
- Query, key and value are read from one [T, 3, A, D] tensor, and their gradients are written into one: the
  projection's backward needs no copy.
- No dropout mask is stored. A weight is dropped where `a[row] * b[column] + rotated(a[row])` modulo 2**32 is
  below a threshold, where a and b are strong hashes of (seed, head, row) tabled once per call: multiply-shift
  hashing (Dietzfelbinger, 1996), one multiply-add, one comparison and one selection per weight. Instructions are
  what limits dropout: Philox or a finalizer for each weight costs more than the matrix products.
- Tables by row (dropout keys, softmax denominators) are laid out by tile, each cell padded to whole tiles. So they
  are read in aligned pairs and without masks, which would cost more instructions than the dropout itself.
- The backward has two kernels, for keys and values and for queries, which recompute the weights twice and need
  neither atomics nor a conversion pass: gradients are deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from .triton_hash import dropout_constants, mix

TILE = 128
"""Rows of a tile; a program takes one, or an equal part of one."""


def tile_list(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The tiles of all cells: int32 [tiles, 4].

    Columns: first token of the cell, end of the cell, first token of the tile, and TILE times the number of the
    cell's first tile, which is where the cell begins in tables by row. The number of tiles depends on the shapes
    alone; unused ones are empty cells at the end.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    tiles_up_to = ((ends - starts + TILE - 1) // TILE).cumsum(0)
    capacity = num_tokens // TILE + len(starts)
    number = torch.arange(capacity, device=cu_seqlens.device, dtype=tiles_up_to.dtype)
    cell = torch.searchsorted(tiles_up_to, number, right=True)
    used = cell < len(starts)
    cell = cell.clamp(max=len(starts) - 1)
    first_tile = tiles_up_to[cell] - (ends[cell] - starts[cell] + TILE - 1) // TILE
    start, end = starts[cell], torch.where(used, ends[cell], starts[cell])
    first_token = start + (number - first_tile) * TILE
    return torch.stack([start, end, first_token, first_tile * TILE], dim=1).int().contiguous()


@triton.jit
def _make_keys(keys, seed_pointer, num_rows, BLOCK: tl.constexpr):
    """Table int32 [1 + A, R]: b by row, then a by (head, row); all odd."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(1)
    seed = tl.load(seed_pointer).to(tl.uint32)
    value = mix((mix(row.to(tl.uint32)) ^ seed) + line.to(tl.uint32) * 0x9E3779B9) | 1
    tl.store(keys + line * num_rows + row, value.to(tl.int32, bitcast=True), mask=row < num_rows)


@triton.jit
def _rotate(a):
    a = a.to(tl.uint32, bitcast=True)
    return ((a << 13) | (a >> 19)).to(tl.int32, bitcast=True)


@triton.jit
def _drop(weights, a, rotated, b, threshold):
    """The weights, zero where the keys of row (a, and a rotated) and column (b) say so.

    In PTX because Triton's compiler collects the comparisons of a whole tile as bits and unpacks them again, five
    instructions a weight instead of three.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred dropped;
        .reg .u32 hash;
        mad.lo.u32 hash, $2, $4, $3;
        setp.lo.u32 dropped, hash, $5;
        selp.f32 $0, 0f00000000, $1, dropped;
        }""",
        "=f,f,r,r,r,r",
        [weights, a, rotated, b, tl.cast(threshold, tl.uint32)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _block(tiles, BLOCK: tl.constexpr):
    """What a program works on: a block of rows in a tile of a cell.

    First token and end of the cell, first token of the block, first row of the cell in tables by row.
    """
    tl.static_assert(128 % BLOCK == 0)
    in_tile: tl.constexpr = 128 // BLOCK
    tile = tiles + tl.program_id(0) // in_tile * 4
    first = tl.load(tile + 2) + tl.program_id(0) % in_tile * BLOCK
    return tl.load(tile), tl.load(tile + 1), first, tl.multiple_of(tl.load(tile + 3), 128)


@triton.jit
def _load_keys(k_pointer, v_pointer, columns, end, stride, MASKED: tl.constexpr):
    """Keys and values of some columns; zeros beyond the cell's end, which is looked at only if MASKED."""
    if MASKED:
        inside = (columns < end)[:, None]
        k = tl.load(k_pointer + columns[:, None] * stride, mask=inside, other=0.0)
        v = tl.load(v_pointer + columns[:, None] * stride, mask=inside, other=0.0)
    else:
        k = tl.load(k_pointer + columns[:, None] * stride)
        v = tl.load(v_pointer + columns[:, None] * stride)
    return k, v


@triton.jit
def _forward_step(
    q, k_pointer, v_pointer, columns, end, b_pointer, a, rotated, m, total, acc, scale, threshold,
    stride, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    k, v = _load_keys(k_pointer, v_pointer, columns, end, stride, MASKED)
    scores = tl.dot(q, k.T)
    if MASKED:
        scores = tl.where((columns < end)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        b = tl.load(b_pointer + tl.arange(0, columns.shape[0]))
        weights = _drop(weights, a[:, None], rotated[:, None], b[None, :], threshold)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return m_new, total, acc


@triton.jit
def _forward(
    qkv, out, lse, tiles, keys, scale, threshold, keep_scale, num_rows,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Output, and the logarithm of the softmax's denominator, for a tile of queries against all keys of its cell.

    Rows beyond the cell are zeros; their denominators are finite, and that is all the backward needs of them.
    """
    tl.static_assert(128 % BLOCK_N == 0)
    start, end, first, padded = _block(tiles, BLOCK_M)
    if first >= end:
        return
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * NUM_HEADS * D
    rows = first + tl.arange(0, BLOCK_M)
    table_rows = head * num_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    valid = (rows < end)[:, None]
    base = qkv + head * D + d[None, :]
    q = tl.load(base + rows[:, None] * stride, mask=valid, other=0.0)
    a = rows
    if DROPOUT:
        a = tl.load(keys + num_rows + table_rows)
    rotated = _rotate(a)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    k_pointer, v_pointer = base + NUM_HEADS * D, base + 2 * NUM_HEADS * D
    whole = (end - start) // BLOCK_N * BLOCK_N
    for offset in tl.range(0, whole, BLOCK_N):
        columns = start + offset + tl.arange(0, BLOCK_N)
        m, total, acc = _forward_step(
            q, k_pointer, v_pointer, columns, end, keys + padded + offset, a, rotated, m, total, acc, scale, threshold,
            stride, False, DROPOUT,
        )  # fmt: skip
    if whole < end - start:
        columns = start + whole + tl.arange(0, BLOCK_N)
        m, total, acc = _forward_step(
            q, k_pointer, v_pointer, columns, end, keys + padded + whole, a, rotated, m, total, acc, scale, threshold,
            stride, True, DROPOUT,
        )  # fmt: skip
    acc = acc * (keep_scale / total)[:, None]
    tl.store(out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], acc.to(out.dtype.element_ty), mask=valid)
    tl.store(lse + table_rows, m + tl.log2(total))


@triton.jit
def _row_dot(
    out, grad_out, delta, tiles, factor, num_rows, NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Delta = factor times the sum over D of out * grad_out, FP32 [A, R]."""
    _, end, first, _ = _block(tiles, BLOCK_M)
    if first >= end:
        return
    head = tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_M)
    where = (rows[:, None] * NUM_HEADS + head) * D + tl.arange(0, D)[None, :]
    valid = (rows < end)[:, None]
    o = tl.load(out + where, mask=valid, other=0.0).to(tl.float32)
    do = tl.load(grad_out + where, mask=valid, other=0.0).to(tl.float32)
    table_rows = head * num_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(delta + table_rows, tl.sum(o * do, 1) * factor)


@triton.jit
def _backward_keys(
    qkv, grad_out, lse, delta, grad_qkv, tiles, keys, scale, grad_scale, threshold, keep_scale, num_rows,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: a tile of keys against all queries of its cell.

    Rows beyond the cell are loaded as zeros: they add nothing.
    """
    tl.static_assert(128 % BLOCK_M == 0)
    start, end, first, padded = _block(tiles, BLOCK_N)
    if first >= end:
        return
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * NUM_HEADS * D
    columns = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    valid = (columns < end)[:, None]
    base = qkv + head * D + d[None, :]
    k = tl.load(base + NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
    v = tl.load(base + 2 * NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
    if DROPOUT:
        b = tl.load(keys + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))
    grad_k = tl.zeros([BLOCK_N, D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, D], tl.float32)
    table_row = head * num_rows + padded
    for offset in tl.range(0, end - start, BLOCK_M):
        rows = start + offset + tl.arange(0, BLOCK_M)
        inside = (rows < end)[:, None]
        q = tl.load(base + rows[:, None] * stride, mask=inside, other=0.0)
        do = tl.load(grad_out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], mask=inside, other=0.0)
        row_lse = tl.load(lse + table_row + offset + tl.arange(0, BLOCK_M))
        row_delta = tl.load(delta + table_row + offset + tl.arange(0, BLOCK_M))
        weights = tl.exp2(tl.dot(k, q.T) * scale - row_lse[None, :])
        grad_weights = tl.dot(v, do.T)
        dropped = weights
        if DROPOUT:
            a = tl.load(keys + num_rows + table_row + offset + tl.arange(0, BLOCK_M))
            dropped = _drop(weights, a[None, :], _rotate(a)[None, :], b[:, None], threshold)
        grad_v = tl.dot(dropped.to(do.dtype), do, grad_v)
        grad_scores = dropped * grad_weights - weights * row_delta[None, :]
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    where = grad_qkv + columns[:, None] * stride + head * D + d[None, :]
    kind = grad_qkv.dtype.element_ty
    tl.store(where + NUM_HEADS * D, (grad_k * grad_scale).to(kind), mask=valid)
    tl.store(where + 2 * NUM_HEADS * D, (grad_v * keep_scale).to(kind), mask=valid)


@triton.jit
def _backward_queries_step(
    q, do, k_pointer, v_pointer, columns, end, b_pointer, a, rotated, row_lse, row_delta, grad_q, scale, threshold,
    stride, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    k, v = _load_keys(k_pointer, v_pointer, columns, end, stride, MASKED)
    scores = tl.dot(q, k.T)
    if MASKED:  # A score of zero could be far above those of the cell, and its weight infinite.
        scores = tl.where((columns < end)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * scale - row_lse[:, None])
    grad_weights = tl.dot(do, v.T)
    dropped = weights
    if DROPOUT:
        b = tl.load(b_pointer + tl.arange(0, columns.shape[0]))
        dropped = _drop(weights, a[:, None], rotated[:, None], b[None, :], threshold)
    grad_scores = dropped * grad_weights - weights * row_delta[:, None]
    return tl.dot(grad_scores.to(k.dtype), k, grad_q)


@triton.jit
def _backward_queries(
    qkv, grad_out, lse, delta, grad_qkv, tiles, keys, scale, grad_scale, threshold, keep_scale, num_rows,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of queries: a tile of queries against all keys of its cell."""
    tl.static_assert(128 % BLOCK_N == 0)
    start, end, first, padded = _block(tiles, BLOCK_M)
    if first >= end:
        return
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * NUM_HEADS * D
    rows = first + tl.arange(0, BLOCK_M)
    table_rows = head * num_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    valid = (rows < end)[:, None]
    base = qkv + head * D + d[None, :]
    q = tl.load(base + rows[:, None] * stride, mask=valid, other=0.0)
    do = tl.load(grad_out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], mask=valid, other=0.0)
    row_lse = tl.load(lse + table_rows)
    row_delta = tl.load(delta + table_rows)
    a = rows
    if DROPOUT:
        a = tl.load(keys + num_rows + table_rows)
    rotated = _rotate(a)
    grad_q = tl.zeros([BLOCK_M, D], tl.float32)
    k_pointer, v_pointer = base + NUM_HEADS * D, base + 2 * NUM_HEADS * D
    whole = (end - start) // BLOCK_N * BLOCK_N
    for offset in tl.range(0, whole, BLOCK_N):
        columns = start + offset + tl.arange(0, BLOCK_N)
        grad_q = _backward_queries_step(
            q, do, k_pointer, v_pointer, columns, end, keys + padded + offset, a, rotated, row_lse, row_delta, grad_q,
            scale, threshold, stride, False, DROPOUT,
        )  # fmt: skip
    if whole < end - start:
        columns = start + whole + tl.arange(0, BLOCK_N)
        grad_q = _backward_queries_step(
            q, do, k_pointer, v_pointer, columns, end, keys + padded + whole, a, rotated, row_lse, row_delta, grad_q,
            scale, threshold, stride, True, DROPOUT,
        )  # fmt: skip
    where = grad_qkv + rows[:, None] * stride + head * D + d[None, :]
    tl.store(where, (grad_q * grad_scale).to(grad_qkv.dtype.element_ty), mask=valid)


LOG2_E = 1.4426950408889634
FORWARD = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
BACKWARD_KEYS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
BACKWARD_QUERIES = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
"""Chosen on an H200 at head size 64. Registers are limited so that 16 warps, or 12 for keys, share a multiprocessor."""


@library.custom_op("geneformer::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor, tiles: Tensor, seed: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention within each cell of a pack.

    Parameters
    ----------
    qkv
        [T, 3, A, D], contiguous, BF16, fewer than 2**31 elements, D a power of two of at least 16.
    tiles
        `tile_list` of the cells, which cover all T tokens.
    seed
        int64 [1] on the device; decides which weights are dropped.
    dropout
        Probability of dropping a weight.

    Returns
    -------
    The output [T, A, D], and for the backward, with R = TILE * tiles, the logarithm to base 2 of each softmax's
    denominator, FP32 [A, R], and the table of dropout keys, int32 [1 + A, R], empty without dropout.

    Raises
    ------
    ValueError
        More elements than the kernels' 32-bit offsets can reach, or not contiguous.
    """
    if not qkv.is_contiguous():
        raise ValueError("qkv is not contiguous.")
    if qkv.numel() >= 2**31:
        raise ValueError(f"{len(qkv):,} tokens are too many for one micro-batch; lower model.micro_batch_size.")
    num_tokens, _, num_heads, d = qkv.shape
    num_rows = TILE * len(tiles)
    out = torch.empty(num_tokens, num_heads, d, dtype=qkv.dtype, device=qkv.device)
    # Zeros: blocks that lie wholly beyond a cell are left out, and the backward may read their rows in larger blocks.
    lse = torch.zeros(num_heads, num_rows, dtype=torch.float32, device=qkv.device)
    keys = torch.empty(1 + num_heads if dropout else 0, num_rows, dtype=torch.int32, device=qkv.device)
    if dropout:
        _make_keys[(triton.cdiv(num_rows, 1024), len(keys))](keys, seed, num_rows, BLOCK=1024)
    threshold, keep_scale = dropout_constants(dropout)
    _forward[(num_rows // FORWARD["BLOCK_M"], num_heads)](
        qkv, out, lse, tiles, keys, LOG2_E / d**0.5, threshold, keep_scale, num_rows,
        NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, **FORWARD,
    )  # fmt: skip
    return out, lse, keys


@packed_attention.register_fake
def _(qkv: Tensor, tiles: Tensor, seed: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, _, num_heads, d = qkv.shape
    num_rows = TILE * len(tiles)
    return (
        qkv.new_empty(num_tokens, num_heads, d),
        qkv.new_empty(num_heads, num_rows, dtype=torch.float32),
        qkv.new_empty(1 + num_heads if dropout else 0, num_rows, dtype=torch.int32),
    )


@library.custom_op("geneformer::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor, tiles: Tensor, dropout: float
) -> Tensor:
    """Gradient of `packed_attention` with respect to qkv, [T, 3, A, D]."""
    _, _, num_heads, d = qkv.shape
    num_rows = TILE * len(tiles)
    grad_out = grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    threshold, keep_scale = dropout_constants(dropout)
    _row_dot[(len(tiles), num_heads)](
        out, grad_out, delta, tiles, 1 / keep_scale, num_rows, NUM_HEADS=num_heads, D=d, BLOCK_M=TILE
    )
    for kernel, shape, rows in (
        (_backward_keys, BACKWARD_KEYS, BACKWARD_KEYS["BLOCK_N"]),
        (_backward_queries, BACKWARD_QUERIES, BACKWARD_QUERIES["BLOCK_M"]),
    ):
        kernel[(num_rows // rows, num_heads)](
            qkv, grad_out, lse, delta, grad_qkv, tiles, keys, LOG2_E / d**0.5, keep_scale * d**-0.5, threshold,
            keep_scale, num_rows, NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, **shape,
        )  # fmt: skip
    return grad_qkv


@packed_attention_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor, tiles: Tensor, dropout: float) -> Tensor:
    return torch.empty_like(qkv)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, tiles, _, ctx.dropout = inputs
    ctx.save_for_backward(qkv, *output, tiles)


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None]:
    grad_qkv = packed_attention_backward(grad_out, *ctx.saved_tensors, ctx.dropout)
    return grad_qkv, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save_for_backward)
