"""Self-attention of packed cells with dropout, as Triton kernels for Hopper-class GPUs.

The algorithm is FlashAttention-2 (Dao, 2023): softmax in one pass over the keys, weights recomputed in the
backward. What is specific here:

- Softmax needs no running maximum: a row's weights are relative to that of its own key, and FP32 has room for the
  rest. Where a row runs out of room, which takes scores 69 nats above that of the own key, its block of rows is
  computed once more the usual way.
- Hopper's copy engine (TMA) moves blocks of tokens to shared memory: what it spares in registers and instructions of
  address arithmetic decides how many programs share a multiprocessor. Rows beyond a cell's end are then those of the
  next cell; their weights are zero, so they add nothing as long as they are finite.
- Work is cut into tiles of each cell's own rows, so no block is spent on the difference between a cell and
  the longest cell. The list of tiles is made on the device, once for all layers.
- Query, key and value are read from one [T, 3, A, D] tensor, and their gradients are written into one: the
  projection's backward needs no copy. Nor does it read them for the gradient of its bias: each program of the backward
  sums its rows before it writes them.
- No dropout mask is stored. A weight is dropped where `a[row] * b[column] + rotated(a[row])` modulo 2**32 is
  below a threshold, where a and b are strong hashes of (seed, head, row) tabled once per call: multiply-shift
  hashing (Dietzfelbinger, 1996), one multiply-add, one comparison and at most one selection per weight.
  Instructions are what limits dropout: Philox or a finalizer for each weight costs more than the matrix products.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from geneformer_pretrain.kernels.dropout import dropout_constants, mix

MAX_TOTAL = tl.constexpr(2.0**100)
"""Largest sum of a row's weights with which neither the sum nor the weighted values can overflow FP32."""

TILE = 128
"""Rows of a tile; a program takes one, or an equal part of one."""


def tile_list(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the tiles of all cells: int32 [tiles, 4].

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
    """Return the weights, zero where the hash of row (a, and a rotated) and column (b) is below the threshold.

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
def _grad_of_scores(weights, grad_weights, minus_delta, a, rotated, b, threshold):
    """Compute the gradient of scores: weights * (grad_weights - delta), or weights * (0 - delta) where one is dropped.

    In PTX for the reason given above, and because a multiply-add under a predicate needs no selection.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .pred kept;
        .reg .u32 hash;
        .reg .f32 grad;
        mad.lo.u32 hash, $4, $6, $5;
        setp.hs.u32 kept, hash, $7;
        mul.f32 grad, $1, $3;
        @kept fma.rn.f32 grad, $1, $2, grad;
        mov.f32 $0, grad;
        }""",
        "=f,f,f,f,r,r,r,r",
        [weights, grad_weights, minus_delta, a, rotated, b, tl.cast(threshold, tl.uint32)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _block(tiles, BLOCK: tl.constexpr):
    """Return a program's block of rows in a tile of a cell.

    They are: first token and end of the cell, first token of the block, first row of the cell in tables by row.
    """
    tl.static_assert(128 % BLOCK == 0)
    in_tile: tl.constexpr = 128 // BLOCK
    tile = tiles + tl.program_id(0) // in_tile * 4
    first = tl.load(tile + 2) + tl.program_id(0) % in_tile * BLOCK
    return tl.load(tile), tl.load(tile + 1), first, tl.multiple_of(tl.load(tile + 3), 128)


@triton.jit
def _forward_step(
    q, kv_rows, column, first, end, key_column, b_pointer, a, rotated, m, total, acc, scale, threshold,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    k = kv_rows.load([first, WIDTH + column])
    scores = tl.dot(q, k.T)
    if MASKED:
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
    if ONLINE:
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        shrink = tl.exp2(m - m_new)
        m, total, acc = m_new, total * shrink, acc * shrink[:, None]
    weights = tl.exp2(scores * scale - m[:, None])
    total += tl.sum(weights, 1)
    if DROPOUT:
        b = tl.load(b_pointer + key_column + tl.arange(0, BLOCK_N))
        weights = _drop(weights, a[:, None], rotated[:, None], b[None, :], threshold)
    v = kv_rows.load([first, 2 * WIDTH + column])
    acc = tl.dot(weights.to(v.dtype), v, acc)
    return m, total, acc


@triton.jit
def _forward(
    q_rows, kv_rows, out, lse, tiles, keys, scale, threshold, keep_scale, num_rows,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute output and logarithm of the softmax's denominator, for a tile of queries against all keys of its cell.

    Rows beyond the cell are not written; their denominators are infinite, which makes weights of zero in the backward.
    """
    tl.static_assert(128 % BLOCK_N == 0)
    start, end, first, padded = _block(tiles, BLOCK_M)
    head = tl.program_id(1)
    table_rows = head * num_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if first >= end:
        tl.store(lse + table_rows, float("inf"))
        return
    width: tl.constexpr = NUM_HEADS * D
    column = head * D
    rows = first + tl.arange(0, BLOCK_M)
    q = q_rows.load([first, column])
    a = rows
    if DROPOUT:
        a = tl.load(keys + num_rows + table_rows)
    rotated = _rotate(a)
    # A row's weights are relative to that of its own key, which is among them.
    own = q_rows.load([first, width + column])
    m = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    whole = (end - start) // BLOCK_N * BLOCK_N
    for offset in tl.range(0, whole, BLOCK_N):
        m, total, acc = _forward_step(
            q, kv_rows, column, start + offset, end, padded + offset, keys, a, rotated, m, total, acc, scale, threshold,
            width, BLOCK_N, False, DROPOUT, False,
        )  # fmt: skip
    if whole < end - start:
        m, total, acc = _forward_step(
            q, kv_rows, column, start + whole, end, padded + whole, keys, a, rotated, m, total, acc, scale, threshold,
            width, BLOCK_N, True, DROPOUT, False,
        )  # fmt: skip
    if tl.max(total) > MAX_TOTAL:  # Again, with a running maximum.
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        for offset in tl.range(0, end - start, BLOCK_N, num_stages=1):
            m, total, acc = _forward_step(
                q, kv_rows, column, start + offset, end, padded + offset, keys, a, rotated, m, total, acc, scale,
                threshold, width, BLOCK_N, True, DROPOUT, True,
            )  # fmt: skip
    acc = acc * (keep_scale / total)[:, None]
    where = out + (rows[:, None] * NUM_HEADS + head) * D + tl.arange(0, D)[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None])
    tl.store(lse + table_rows, tl.where(rows < end, m + tl.log2(total), float("inf")))


@triton.jit
def _row_dot(
    out, grad_out, delta, tiles, factor, num_rows, NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Compute delta = factor times the sum over D of out * grad_out, FP32 [A, R]."""
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
    q_rows, kv_rows, do_rows, lse, delta, grad_qkv, sums, tiles, keys, scale, grad_scale, threshold, keep_scale,
    num_rows, NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values: a tile of keys against all queries of its cell.

    Rows beyond the cell have weights of zero: they add nothing.
    """
    tl.static_assert(128 % BLOCK_M == 0)
    start, end, first, padded = _block(tiles, BLOCK_N)
    head = tl.program_id(1)
    width: tl.constexpr = NUM_HEADS * D
    column = head * D
    sums += tl.program_id(0) * 3 * width + column + tl.arange(0, D)
    if first >= end:
        if SUMS:
            tl.store(sums + width, tl.zeros([D], tl.float32))
            tl.store(sums + 2 * width, tl.zeros([D], tl.float32))
        return
    columns = first + tl.arange(0, BLOCK_N)
    k = kv_rows.load([first, width + column])
    v = kv_rows.load([first, 2 * width + column])
    if DROPOUT:
        b = tl.load(keys + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))
    grad_k = tl.zeros([BLOCK_N, D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, D], tl.float32)
    table_row = head * num_rows + padded
    lse, delta, a_pointer = lse + table_row, delta + table_row, keys + num_rows + table_row
    in_block = tl.arange(0, BLOCK_M)
    for offset in tl.range(0, end - start, BLOCK_M):
        q = q_rows.load([start + offset, column])
        do = do_rows.load([start + offset, column])
        scores = tl.dot(k, q.T)
        grad_weights = tl.dot(v, do.T)
        weights = tl.exp2(scores * scale - tl.load(lse + offset + in_block)[None, :])
        dropped = weights
        if DROPOUT:
            a = tl.load(a_pointer + offset + in_block)
            dropped = _drop(weights, a[None, :], _rotate(a)[None, :], b[:, None], threshold)
        grad_scores = dropped * grad_weights - weights * tl.load(delta + offset + in_block)[None, :]
        grad_v = tl.dot(dropped.to(do.dtype), do, grad_v)
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k)
    where = grad_qkv + columns[:, None] * (3 * width) + column + tl.arange(0, D)[None, :]
    valid = (columns < end)[:, None]
    kind = grad_qkv.dtype.element_ty
    grad_k *= grad_scale
    grad_v *= keep_scale
    tl.store(where + width, grad_k.to(kind), mask=valid)
    tl.store(where + 2 * width, grad_v.to(kind), mask=valid)
    if SUMS:
        tl.store(sums + width, tl.sum(tl.where(valid, grad_k, 0.0), 0))
        tl.store(sums + 2 * width, tl.sum(tl.where(valid, grad_v, 0.0), 0))


@triton.jit
def _backward_queries_step(
    q, do, kv_rows, column, first, end, key_column, b_pointer, a, rotated, row_lse, minus_delta, grad_q, scale,
    threshold, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    k = kv_rows.load([first, WIDTH + column])
    v = kv_rows.load([first, 2 * WIDTH + column])
    scores = tl.dot(q, k.T)
    if MASKED:
        scores = tl.where((first + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
    grad_weights = tl.dot(do, v.T)
    weights = tl.exp2(scores * scale - row_lse[:, None])
    if DROPOUT:
        b = tl.load(b_pointer + key_column + tl.arange(0, BLOCK_N))
        grad_scores = _grad_of_scores(
            weights, grad_weights, minus_delta[:, None], a[:, None], rotated[:, None], b[None, :], threshold
        )
    else:
        grad_scores = weights * (grad_weights + minus_delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q)


@triton.jit
def _backward_queries(
    q_rows, kv_rows, do_rows, lse, delta, grad_qkv, sums, tiles, keys, scale, grad_scale, threshold, keep_scale,
    num_rows, NUM_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of queries: a tile of queries against all keys of its cell."""
    tl.static_assert(128 % BLOCK_N == 0)
    start, end, first, padded = _block(tiles, BLOCK_M)
    head = tl.program_id(1)
    width: tl.constexpr = NUM_HEADS * D
    column = head * D
    sums += tl.program_id(0) * 3 * width + column + tl.arange(0, D)
    if first >= end:
        if SUMS:
            tl.store(sums, tl.zeros([D], tl.float32))
        return
    rows = first + tl.arange(0, BLOCK_M)
    table_rows = head * num_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = q_rows.load([first, column])
    do = do_rows.load([first, column])
    row_lse = tl.load(lse + table_rows)
    minus_delta = -tl.load(delta + table_rows)
    a = rows
    if DROPOUT:
        a = tl.load(keys + num_rows + table_rows)
    rotated = _rotate(a)
    grad_q = tl.zeros([BLOCK_M, D], tl.float32)
    whole = (end - start) // BLOCK_N * BLOCK_N
    for offset in tl.range(0, whole, BLOCK_N):
        grad_q = _backward_queries_step(
            q, do, kv_rows, column, start + offset, end, padded + offset, keys, a, rotated, row_lse, minus_delta,
            grad_q, scale, threshold, width, BLOCK_N, False, DROPOUT,
        )  # fmt: skip
    if whole < end - start:
        grad_q = _backward_queries_step(
            q, do, kv_rows, column, start + whole, end, padded + whole, keys, a, rotated, row_lse, minus_delta,
            grad_q, scale, threshold, width, BLOCK_N, True, DROPOUT,
        )  # fmt: skip
    grad_q *= grad_scale
    where = grad_qkv + rows[:, None] * (3 * width) + column + tl.arange(0, D)[None, :]
    valid = (rows < end)[:, None]
    tl.store(where, grad_q.to(grad_qkv.dtype.element_ty), mask=valid)
    if SUMS:
        tl.store(sums, tl.sum(tl.where(valid, grad_q, 0.0), 0))


LOG2_E = 1.4426950408889634
OWN_ROWS = 64
"""Rows whose gradient one backward program writes."""

FORWARD = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
BACKWARD_KEYS = {"BLOCK_M": 64, "BLOCK_N": OWN_ROWS, "num_warps": 4, "num_stages": 2, "maxnreg": 168}
BACKWARD_QUERIES = {"BLOCK_M": OWN_ROWS, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128}
"""Chosen on an H200 at head size 64. Limits on registers let 16 warps, or 12 for keys, share a multiprocessor."""


def row_blocks(x: Tensor, rows: int) -> TensorDescriptor:
    """View a contiguous [T, ..., D] as a matrix with a row for each token, from which kernels read [rows, D] blocks.

    Hopper's copy engine reads them, without a thread's registers and instructions; rows beyond T are zeros.
    """
    return TensorDescriptor.from_tensor(x.view(len(x), -1), [rows, x.shape[-1]])


@library.custom_op("geneformer::packed_attention", mutates_args=())
def packed_attention(
    qkv: Tensor, bias: Tensor | None, tiles: Tensor, seed: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend within each cell of a pack.

    Parameters
    ----------
    qkv
        [T, 3, A, D], contiguous, BF16, fewer than 2**31 elements, D a power of two of at least 16.
    bias
        [3 * A * D], or None. The bias that qkv already holds, added detached: it is not read, but the backward returns
        its gradient, the sum of qkv's over T.
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
    lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=qkv.device)
    keys = torch.empty(1 + num_heads if dropout else 0, num_rows, dtype=torch.int32, device=qkv.device)
    if dropout:
        _make_keys[(triton.cdiv(num_rows, 1024), len(keys))](keys, seed, num_rows, BLOCK=1024)
    threshold, keep_scale = dropout_constants(dropout)
    _forward[(num_rows // FORWARD["BLOCK_M"], num_heads)](
        row_blocks(qkv, FORWARD["BLOCK_M"]), row_blocks(qkv, FORWARD["BLOCK_N"]), out, lse, tiles, keys,
        LOG2_E / d**0.5, threshold, keep_scale, num_rows,
        NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, **FORWARD,
    )  # fmt: skip
    return out, lse, keys


@packed_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, tiles: Tensor, seed: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, _, num_heads, d = qkv.shape
    num_rows = TILE * len(tiles)
    return (
        qkv.new_empty(num_tokens, num_heads, d),
        qkv.new_empty(num_heads, num_rows, dtype=torch.float32),
        qkv.new_empty(1 + num_heads if dropout else 0, num_rows, dtype=torch.int32),
    )


@library.custom_op("geneformer::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor, tiles: Tensor, dropout: float, sums: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of `packed_attention` with respect to qkv, [T, 3, A, D].

    With `sums`, also its sums over P parts of the tokens, FP32 [P, 3 * A * D]; otherwise P is 0.
    """
    _, _, num_heads, d = qkv.shape
    num_rows = TILE * len(tiles)
    grad_out = grad_out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    blocks = num_rows // OWN_ROWS if sums else 0
    partial = torch.empty(blocks, 3 * num_heads * d, dtype=torch.float32, device=qkv.device)
    threshold, keep_scale = dropout_constants(dropout)
    _row_dot[(len(tiles), num_heads)](
        out, grad_out, delta, tiles, 1 / keep_scale, num_rows, NUM_HEADS=num_heads, D=d, BLOCK_M=TILE
    )
    for kernel, shape, own in (
        (_backward_keys, BACKWARD_KEYS, BACKWARD_KEYS["BLOCK_N"]),
        (_backward_queries, BACKWARD_QUERIES, BACKWARD_QUERIES["BLOCK_M"]),
    ):
        kernel[(num_rows // own, num_heads)](
            row_blocks(qkv, shape["BLOCK_M"]), row_blocks(qkv, shape["BLOCK_N"]),
            row_blocks(grad_out, shape["BLOCK_M"]), lse, delta, grad_qkv, partial, tiles, keys,
            LOG2_E / d**0.5, keep_scale * d**-0.5, threshold, keep_scale, num_rows,
            NUM_HEADS=num_heads, D=d, DROPOUT=dropout > 0, SUMS=sums, **shape,
        )  # fmt: skip
    return grad_qkv, partial


@packed_attention_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, keys: Tensor, tiles: Tensor, dropout: float, sums: bool
) -> tuple[Tensor, Tensor]:
    blocks = TILE * len(tiles) // OWN_ROWS if sums else 0
    return torch.empty_like(qkv), qkv.new_empty(blocks, qkv[0].numel(), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, bias, tiles, _, ctx.dropout = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output, tiles)


def _backward(ctx: Any, grad_out: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    sums = ctx.bias_dtype is not None
    grad_qkv, partial = packed_attention_backward(grad_out, *ctx.saved_tensors, ctx.dropout, sums)
    return grad_qkv, partial.sum(0).to(ctx.bias_dtype) if sums else None, None, None, None


packed_attention.register_autograd(_backward, setup_context=_save_for_backward)
