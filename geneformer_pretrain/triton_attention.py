"""Self-attention of packed cells with dropout, as Triton kernels for Hopper-class GPUs.

The algorithm is FlashAttention-2 (Dao, 2023): softmax in one pass over the keys, weights recomputed in the
backward. What is specific here:

- Work is cut into tiles of each cell's own rows, so no block is spent on the difference between a cell and
  the longest cell. The list of tiles is made on the device, once for all layers.
- Query, key and value are read from one [T, 3, A, D] tensor, and their gradients are written into one: the
  projection's backward needs no copy.
- No dropout mask is stored. A weight is dropped where `a[row] * b[column] + rotated(a[row])` modulo 2**32 is
  below a threshold, where a and b are strong hashes of (seed, head, position) tabled once per call: multiply-shift
  hashing (Dietzfelbinger, 1996), one multiply-add and one comparison per weight. Integer instructions are what
  limits dropout: Philox or a finalizer for each weight costs more than the matrix products.
- The backward has two kernels, for keys and values and for queries, which recompute the weights twice and need
  neither atomics nor a conversion pass: gradients are deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Rows of a tile, in every kernel."""


def tile_list(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The tiles of all cells: int32 [tiles, 3] of (first token of the cell, end of the cell, first row).

    The number of rows depends on the shapes alone; unused ones are empty cells at the end.
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
    return torch.stack([start, end, start + (number - first_tile).int() * TILE], dim=1).int().contiguous()


@triton.jit
def _mix(x):
    """A 32-bit integer hash with little bias (Wellons, "Prospecting for hash functions", lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _make_keys(keys, seed_pointer, num_tokens, BLOCK: tl.constexpr):
    """Table int32 [1 + A, T]: b by position, then a by (head, position); all odd."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(1)
    seed = tl.load(seed_pointer).to(tl.uint32)
    value = _mix(_mix(position.to(tl.uint32) ^ seed) + line.to(tl.uint32) * 0x9E3779B9) | 1
    tl.store(keys + line * num_tokens + position, value.to(tl.int32, bitcast=True), mask=position < num_tokens)


@triton.jit
def _keep(a, rotated, b, threshold):
    """Whether each weight is kept, from the keys of its row (a, and a rotated) and its column (b)."""
    return a * b + rotated >= threshold


@triton.jit
def _load_key(keys, line, position, inside, num_tokens):
    return tl.load(keys + line * num_tokens + position, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _rotate(a):
    return (a << 13) | (a >> 19)


@triton.jit
def _forward_step(
    q, k_pointer, v_pointer, columns, end, keys, a, rotated, num_tokens, m, total, acc, scale, threshold,
    stride, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    if MASKED:
        inside = (columns < end)[:, None]
        k = tl.load(k_pointer + columns[:, None] * stride, mask=inside, other=0.0)
        v = tl.load(v_pointer + columns[:, None] * stride, mask=inside, other=0.0)
    else:
        k = tl.load(k_pointer + columns[:, None] * stride)
        v = tl.load(v_pointer + columns[:, None] * stride)
    scores = tl.dot(q, k.T)
    if MASKED:
        scores = tl.where((columns < end)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        b = _load_key(keys, 0, columns, columns < end, num_tokens)
        keep = _keep(a[:, None], rotated[:, None], b[None, :], threshold)
        weights = tl.where(keep, weights, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return m_new, total, acc


@triton.jit
def _forward(
    qkv, out, lse, tiles, keys, scale, threshold, keep_scale, num_tokens,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * 3
    head = tl.program_id(1)
    start, end, first = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    if first >= end:
        return
    stride: tl.constexpr = 3 * NUM_HEADS * D
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    valid = (rows < end)[:, None]
    base = qkv + head * D + d[None, :]
    q = tl.load(base + rows[:, None] * stride, mask=valid, other=0.0)
    a = rows
    if DROPOUT:
        a = _load_key(keys, 1 + head, rows, rows < end, num_tokens)
    rotated = _rotate(a)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    k_pointer, v_pointer = base + NUM_HEADS * D, base + 2 * NUM_HEADS * D
    whole = start + (end - start) // BLOCK_N * BLOCK_N
    for column in tl.range(start, whole, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        m, total, acc = _forward_step(
            q, k_pointer, v_pointer, columns, end, keys, a, rotated, num_tokens, m, total, acc, scale, threshold,
            stride, False, DROPOUT,
        )  # fmt: skip
    if whole < end:
        columns = whole + tl.arange(0, BLOCK_N)
        m, total, acc = _forward_step(
            q, k_pointer, v_pointer, columns, end, keys, a, rotated, num_tokens, m, total, acc, scale, threshold,
            stride, True, DROPOUT,
        )  # fmt: skip
    acc = acc * (keep_scale / total)[:, None]
    tl.store(out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], acc.to(out.dtype.element_ty), mask=valid)
    tl.store(lse + head * num_tokens + rows, m + tl.log2(total), mask=rows < end)


@triton.jit
def _row_dot(out, grad_out, delta, num_tokens, NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Delta = sum over D of out * grad_out, FP32 [A, T]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    where = (rows[:, None] * NUM_HEADS + head) * D + tl.arange(0, D)[None, :]
    valid = rows < num_tokens
    o = tl.load(out + where, mask=valid[:, None], other=0.0).to(tl.float32)
    do = tl.load(grad_out + where, mask=valid[:, None], other=0.0).to(tl.float32)
    tl.store(delta + head * num_tokens + rows, tl.sum(o * do, 1), mask=valid)


@triton.jit
def _backward_keys(
    qkv, grad_out, lse, delta, grad_qkv, tiles, keys, scale, softmax_scale, threshold, keep_scale, num_tokens,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: a tile of keys against all queries of its cell.

    Rows beyond the cell are loaded as zeros: they add nothing.
    """
    tile = tl.program_id(0) * 3
    head = tl.program_id(1)
    start, end, first = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    if first >= end:
        return
    stride: tl.constexpr = 3 * NUM_HEADS * D
    columns = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    valid = (columns < end)[:, None]
    base = qkv + head * D + d[None, :]
    k = tl.load(base + NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
    v = tl.load(base + 2 * NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
    if DROPOUT:
        b = _load_key(keys, 0, columns, columns < end, num_tokens)
    grad_k = tl.zeros([BLOCK_N, D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, D], tl.float32)
    for row in tl.range(start, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        inside = rows < end
        q = tl.load(base + rows[:, None] * stride, mask=inside[:, None], other=0.0)
        do = tl.load(grad_out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], mask=inside[:, None], other=0.0)
        row_lse = tl.load(lse + head * num_tokens + rows, mask=inside, other=0.0)
        row_delta = tl.load(delta + head * num_tokens + rows, mask=inside, other=0.0)
        weights = tl.exp2(tl.dot(k, q.T) * scale - row_lse[None, :])
        grad_weights = tl.dot(v, do.T)
        if DROPOUT:
            a = _load_key(keys, 1 + head, rows, inside, num_tokens)
            keep = _keep(a[None, :], _rotate(a)[None, :], b[:, None], threshold)
            dropped = tl.where(keep, weights, 0.0)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        else:
            dropped = weights
        grad_v = tl.dot(dropped.to(do.dtype), do, grad_v)
        grad_scores = weights * (grad_weights - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    where = grad_qkv + columns[:, None] * stride + head * D + d[None, :]
    kind = grad_qkv.dtype.element_ty
    tl.store(where + NUM_HEADS * D, (grad_k * softmax_scale).to(kind), mask=valid)
    tl.store(where + 2 * NUM_HEADS * D, (grad_v * keep_scale).to(kind), mask=valid)


@triton.jit
def _backward_queries(
    qkv, grad_out, lse, delta, grad_qkv, tiles, keys, scale, softmax_scale, threshold, keep_scale, num_tokens,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of queries: a tile of queries against all keys of its cell; keys beyond it are zeros."""
    tile = tl.program_id(0) * 3
    head = tl.program_id(1)
    start, end, first = tl.load(tiles + tile), tl.load(tiles + tile + 1), tl.load(tiles + tile + 2)
    if first >= end:
        return
    stride: tl.constexpr = 3 * NUM_HEADS * D
    rows = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    inside = rows < end
    base = qkv + head * D + d[None, :]
    q = tl.load(base + rows[:, None] * stride, mask=inside[:, None], other=0.0)
    do = tl.load(grad_out + (rows[:, None] * NUM_HEADS + head) * D + d[None, :], mask=inside[:, None], other=0.0)
    row_lse = tl.load(lse + head * num_tokens + rows, mask=inside, other=0.0)
    row_delta = tl.load(delta + head * num_tokens + rows, mask=inside, other=0.0)
    if DROPOUT:
        a = _load_key(keys, 1 + head, rows, inside, num_tokens)
        rotated = _rotate(a)
    grad_q = tl.zeros([BLOCK_M, D], tl.float32)
    for column in tl.range(start, end, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        valid = (columns < end)[:, None]
        k = tl.load(base + NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
        v = tl.load(base + 2 * NUM_HEADS * D + columns[:, None] * stride, mask=valid, other=0.0)
        weights = tl.exp2(tl.dot(q, k.T) * scale - row_lse[:, None])
        grad_weights = tl.dot(do, v.T)
        if DROPOUT:
            b = _load_key(keys, 0, columns, columns < end, num_tokens)
            keep = _keep(a[:, None], rotated[:, None], b[None, :], threshold)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q)
    where = grad_qkv + rows[:, None] * stride + head * D + d[None, :]
    tl.store(where, (grad_q * softmax_scale).to(grad_qkv.dtype.element_ty), mask=inside[:, None])


LOG2_E = 1.4426950408889634
FORWARD = {"BLOCK_M": TILE, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
BACKWARD_KEYS = {"BLOCK_M": 32, "BLOCK_N": TILE, "num_warps": 4, "num_stages": 3}
BACKWARD_QUERIES = {"BLOCK_M": TILE, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
"""Measured on an H200 at head size 64."""


def _dropout_constants(dropout: float) -> tuple[int, float]:
    return min(round(dropout * 2**32), 2**32 - 1), 1.0 / (1.0 - dropout)


@torch.library.custom_op("geneformer::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor, tiles: Tensor, seed: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention within each cell of a pack.

    Parameters
    ----------
    qkv
        [T, 3, A, D], contiguous, BF16 or FP16, D a power of two of at least 16.
    tiles
        `tile_list` of the cells, which cover all T tokens.
    seed
        int64 [1] on the device; decides which weights are dropped.
    dropout
        Probability of dropping a weight.

    Returns
    -------
    The output [T, A, D], and for the backward the logarithm to base 2 of each softmax's denominator, FP32
    [A, T], and the table of dropout keys, int32 [1 + A, T], empty without dropout.
    """
    num_tokens, _, num_heads, d = qkv.shape
    out = torch.empty(num_tokens, num_heads, d, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=qkv.device)
    keys = torch.empty(1 + num_heads if dropout else 0, num_tokens, dtype=torch.int32, device=qkv.device)
    if dropout:
        _make_keys[(triton.cdiv(num_tokens, 1024), len(keys))](keys, seed, num_tokens, BLOCK=1024)
    threshold, keep_scale = _dropout_constants(dropout)
    _forward[(len(tiles), num_heads)](
        qkv, out, lse, tiles, keys, LOG2_E / d**0.5, threshold, keep_scale, num_tokens,
        NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, **FORWARD,
    )  # fmt: skip
    return out, lse, keys


@packed_attention.register_fake
def _(qkv: Tensor, tiles: Tensor, seed: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, _, num_heads, d = qkv.shape
    return (
        qkv.new_empty(num_tokens, num_heads, d),
        qkv.new_empty(num_heads, num_tokens, dtype=torch.float32),
        qkv.new_empty(1 + num_heads if dropout else 0, num_tokens, dtype=torch.int32),
    )


@torch.library.custom_op("geneformer::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor, tiles: Tensor, dropout: float
) -> Tensor:
    """Gradient of `packed_attention` with respect to qkv, [T, 3, A, D]."""
    num_tokens, _, num_heads, d = qkv.shape
    grad_out = grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    _row_dot[(triton.cdiv(num_tokens, TILE), num_heads)](
        out, grad_out, delta, num_tokens, NUM_HEADS=num_heads, D=d, BLOCK_M=TILE
    )
    threshold, keep_scale = _dropout_constants(dropout)
    for kernel, shape in ((_backward_keys, BACKWARD_KEYS), (_backward_queries, BACKWARD_QUERIES)):
        kernel[(len(tiles), num_heads)](
            qkv, grad_out, lse, delta, grad_qkv, tiles, keys, LOG2_E / d**0.5, d**-0.5, threshold, keep_scale,
            num_tokens, NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, **shape,
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
