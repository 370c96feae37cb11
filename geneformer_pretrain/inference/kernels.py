"""Triton kernels of forward passes without a backward: embeddings, the end of a layer's halves, means over cells.

Sums run over tiles of a cell's own tokens and then over its tiles, in an order that depends on nothing but the length
of the cell: results are the same whatever a cell is packed with.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geneformer_pretrain.kernels.attention import TILE, packed_attention, tile_list
from modeling_bert_te import BertEmbeddings

ROWS = {256: (8, 4), 512: (4, 4), 1024: (4, 4), 2048: (1, 4), 4096: (1, 4)}
"""Tokens that a program of LayerNorm works on at a time, and its warps, by the width rounded up to a power of two."""

MAX_WIDTH = 4096
"""Largest hidden size: a row has to fit into the registers of one program."""

ELEMENTS = 4096
"""Elements that a program of the sums holds at a time."""


def _block(width: int) -> int:
    return max(256, triton.next_power_of_2(width))


@triton.jit
def _residual_norm(
    x, b, residual, weight, bias, x_rows, residual_rows, out, num_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HAS_B: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """Compute LayerNorm(x + b + residual), of the rows of x and residual that are named, if they are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    is_row = rows < num_rows
    valid = is_row[:, None] & inside[None, :]
    x_row, residual_row = rows, rows
    if GATHERS:
        x_row = tl.load(x_rows + rows, mask=is_row, other=0)
        residual_row = tl.load(residual_rows + rows, mask=is_row, other=0)
    value = tl.load(x + x_row[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_B:
        value += tl.load(b + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(residual + residual_row[:, None] * WIDTH + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    average = tl.sum(value, 1) / WIDTH
    deviation = tl.where(inside[None, :], value - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / WIDTH + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    value = deviation * scale[:, None] * w[None, :] + shift[None, :]
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], value.to(out.dtype.element_ty), mask=valid)


def _normalized_sum(
    x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
    rows_of: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Compute LayerNorm(x + b + residual): [R, H], [H] or None, [S, H] -> [T, H].

    `rows_of` names T rows of x and T of residual, int32; by default all of both.
    """
    width = x.shape[1]
    num_rows = len(x) if rows_of is None else len(rows_of[0])
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    block = _block(width)
    rows, warps = ROWS[block]
    _residual_norm[(triton.cdiv(num_rows, rows),)](
        x, b, residual, weight, bias, *(rows_of or (None, None)), out, num_rows, eps,
        WIDTH=width, BLOCK=block, ROWS=rows, HAS_B=b is not None, GATHERS=rows_of is not None, num_warps=warps,
    )  # fmt: skip
    return out


class InferenceAttention:
    """`modeling_bert_te.Attention` by this project's kernel, without dropout."""

    computes_bias_grad = False

    def prepare(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The list of tiles, and a seed that nothing depends on."""
        return tile_list(cu_seqlens, num_tokens), cu_seqlens.new_zeros(1, dtype=torch.int64)

    def __call__(
        self, qkv: Tensor, prepared: tuple[Tensor, Tensor], dropout: float, bias: Tensor | None = None
    ) -> Tensor:
        """[T, 3, A, D] -> [T, A, D]."""
        return packed_attention(qkv, None, *prepared, 0.0)[0]


class InferenceFused:
    """`modeling_bert_te.FusedKernels` without what only a backward needs, and embeddings."""

    def embed(self, tables: BertEmbeddings, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Look up, add and normalise in one pass: int32 [T], int32 [T] -> [T, H]."""
        norm = tables.LayerNorm
        return _normalized_sum(
            tables.word_embeddings.weight,
            tables.token_type_embeddings.weight[0],
            tables.position_embeddings.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            (input_ids, position_ids),
        )

    def residual_norm(
        self, x: Tensor, b: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
    ) -> Tensor:
        """Normalise the sum without storing it."""
        return _normalized_sum(x, b, residual, weight, bias, eps)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Leave the product to PyTorch."""
        return torch.nn.functional.linear(x, weight.to(x.dtype))

    def linear_with_residual(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Project x."""
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias), x

    def feed_forward(self, x: Tensor, expand: Tensor, bias: Tensor, contract: Tensor) -> tuple[Tensor, Tensor]:
        """Project x, by ReLU after it, project again."""
        hidden = torch.ops.aten._addmm_activation(bias, x, expand.to(x.dtype).t())
        return torch.nn.functional.linear(hidden, contract.to(x.dtype)), x

    def linear_cross_entropy(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Sum of cross-entropies, as PyTorch computes it."""
        logits = torch.nn.functional.linear(x, weight, bias).float()
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@triton.jit
def _tile_sums(
    hidden, store, rows, tiles, sums, counts, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COMPARES: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of one tile: of genes, of compared genes, of what these are compared with, of cosines."""
    tile = tl.program_id(0)
    end, first = tl.load(tiles + tile * 4 + 1), tl.load(tiles + tile * 4 + 2)
    if first >= end:
        return
    columns = tl.arange(0, BLOCK)
    inside = (columns < WIDTH)[None, :]
    of_genes = tl.zeros([BLOCK], tl.float32)
    of_compared = tl.zeros([BLOCK], tl.float32)
    of_others = tl.zeros([BLOCK], tl.float32)
    genes = tl.zeros([ROWS], tl.float32)
    compared = tl.zeros([ROWS], tl.float32)
    cosines = tl.zeros([ROWS], tl.float32)
    stop = min(first + 128, end)
    for token in range(first, stop, ROWS):
        tokens = token + tl.arange(0, ROWS)
        row = tl.load(rows + tokens, mask=tokens < stop, other=-2)
        is_gene = row > -2
        h = tl.load(hidden + tokens[:, None] * WIDTH + columns[None, :], mask=is_gene[:, None] & inside, other=0.0)
        h = h.to(tl.float32)
        of_genes += tl.sum(h, 0)
        genes += tl.where(is_gene, 1.0, 0.0)
        if COMPARES:
            has_other = row >= 0
            s = tl.load(store + row[:, None] * WIDTH + columns[None, :], mask=has_other[:, None] & inside, other=0.0)
            s = s.to(tl.float32)
            length = tl.sum(h * h, 1) * tl.sum(s * s, 1)
            cosines += tl.where(has_other, tl.sum(h * s, 1) / tl.sqrt(tl.where(has_other, length, 1.0)), 0.0)
            compared += tl.where(has_other, 1.0, 0.0)
            of_compared += tl.sum(tl.where(has_other[:, None], h, 0.0), 0)
            of_others += tl.sum(s, 0)
    PARTS: tl.constexpr = 3 if COMPARES else 1
    where = sums + tile * PARTS * WIDTH + columns
    tl.store(where, of_genes, mask=columns < WIDTH)
    tl.store(counts + tile * 3, tl.sum(genes, 0))
    if COMPARES:
        tl.store(where + WIDTH, of_compared, mask=columns < WIDTH)
        tl.store(where + 2 * WIDTH, of_others, mask=columns < WIDTH)
        tl.store(counts + tile * 3 + 1, tl.sum(compared, 0))
        tl.store(counts + tile * 3 + 2, tl.sum(cosines, 0))


@triton.jit
def _cell_sums(
    cu_seqlens, tiles_up_to, sums, counts, cell_sums, cell_counts, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles of one cell."""
    cell, part = tl.program_id(0), tl.program_id(1)
    last = tl.load(tiles_up_to + cell)
    first = last - (tl.load(cu_seqlens + cell + 1) - tl.load(cu_seqlens + cell) + 127) // 128
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(first, last):
        total += tl.load(sums + (tile * PARTS + part) * WIDTH + columns, mask=inside, other=0.0)
    tl.store(cell_sums + (cell * PARTS + part) * WIDTH + columns, total, mask=inside)
    if part == 0:
        count = tl.zeros([4], tl.float32)
        three = tl.arange(0, 4)
        mask = three < (3 if PARTS == 3 else 1)
        for tile in range(first, last):
            count += tl.load(counts + tile * 3 + three, mask=mask, other=0.0)
        tl.store(cell_counts + cell * 3 + three, count, mask=three < 3)


class Sums(NamedTuple):
    """Sums over the tokens of each cell, FP32."""

    sums: Tensor
    """[N, 1 or 3, H]: of the genes; of compared genes; of what these are compared with."""
    counts: Tensor
    """[N, 3]: genes, compared genes, and the sum of the cosines of compared genes with what they are compared with."""


def sums_by_cell(hidden: Tensor, rows: Tensor, cu_seqlens: Tensor, store: Tensor | None) -> Sums:
    """Sum hidden states over each cell.

    Parameters
    ----------
    hidden
        [T, H].
    rows, cu_seqlens
        See `packs.Parts`.
    store
        [R, H], what genes are compared with, by row; None compares nothing.
    """
    tokens, width = hidden.shape
    cells = len(cu_seqlens) - 1
    parts = 1 if store is None else 3
    tiles = tile_list(cu_seqlens, tokens)
    tiles_up_to = ((cu_seqlens.diff() + TILE - 1) // TILE).cumsum(0).int()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    tile_sums, tile_counts = empty(len(tiles), parts, width), empty(len(tiles), 3)
    found = Sums(empty(cells, parts, width), empty(cells, 3))
    block = _block(width)
    _tile_sums[(len(tiles),)](
        hidden, store, rows, tiles, tile_sums, tile_counts,
        WIDTH=width, BLOCK=block, ROWS=max(1, ELEMENTS // block), COMPARES=store is not None,
    )  # fmt: skip
    _cell_sums[(cells, parts)](
        cu_seqlens, tiles_up_to, tile_sums, tile_counts, *found, WIDTH=width, BLOCK=block, PARTS=parts
    )
    return found
