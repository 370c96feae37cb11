"""Packs of whole cells for forward passes: planned from lengths, copied by compiled loops, cut in two if need be.

A pack is one int32 buffer, so that it travels to the device in one copy. T is its tokens, N its segments: the cells,
then the unused tail in pieces no longer than a cell may be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geneformer_pretrain.jit import compiled

NOT_COMPARED = -1
"""Row of a gene that has no counterpart."""

NO_GENE = -2
"""Row of a special token and of the tail: left out of every mean."""

ALIGNMENT = 128
"""Tokens of a pack come in multiples of this; parts of the buffer start at multiples of 128 bytes."""

TOKENS_PER_CELL = (64, 256, 512)
"""A pack has room for one cell per so many tokens, the last of these that is enough: attention's kernel starts programs
for all of them, and does nothing in those of cells that are not there. With cells shorter than the first on average a
pack is closed before it is full."""


class Parts(NamedTuple):
    """The parts of a pack, all int32."""

    input_ids: Tensor
    """[T], padding in the tail."""
    position_ids: Tensor
    """[T], from 0 in every segment."""
    rows: Tensor
    """[T], for each gene the row of what it is compared with, or NOT_COMPARED; elsewhere NO_GENE."""
    cu_seqlens: Tensor
    """[N + 1], segment i is tokens [cu_seqlens[i], cu_seqlens[i + 1])."""


@dataclass(frozen=True)
class Shape:
    """Shape of a pack.

    Attributes
    ----------
    tokens
        T.
    max_cells
        Most cells.
    longest
        Longest segment.
    """

    tokens: int
    max_cells: int
    longest: int

    @classmethod
    def of(cls, tokens: int, longest: int, tokens_per_cell: int = TOKENS_PER_CELL[0]) -> "Shape":
        """Shape of a token budget, for cells of up to `longest` tokens."""
        return cls(tokens, max(1, tokens // tokens_per_cell), longest)

    @property
    def num_segments(self) -> int:
        """N."""
        return self.max_cells + math.ceil(self.tokens / self.longest)

    @property
    def sizes(self) -> list[int]:
        """Elements of each part."""
        return [self.tokens] * 3 + [self.num_segments + 1]

    @property
    def buffer_size(self) -> int:
        """Elements of the buffer."""
        return sum(-(-size // 32) * 32 for size in self.sizes)

    def split(self, buffer: Tensor) -> Parts:
        """Views of the parts of a buffer, on whatever device it is."""
        parts, start = [], 0
        for size in self.sizes:
            parts.append(buffer[start : start + size])
            start += -(-size // 32) * 32
        return Parts(*parts)


Head = Callable[["Pack", Tensor, Parts], Tensor]
"""Reduces the hidden states of a pack, [T, H] on the device, to [N, ...], of which the rows of the cells are used."""


@dataclass(frozen=True)
class Pack:
    """Cells for one forward pass.

    Attributes
    ----------
    buffer
        int32, all parts, in host memory.
    shape
        Shape of the parts.
    num_cells, num_tokens
        Filled segments and tokens.
    head
        Reduces the hidden states on the device.
    owner
        Any object that the results belong to.
    items
        int64 [num_cells], places of the results in `owner`.
    """

    buffer: Tensor
    shape: Shape
    num_cells: int
    num_tokens: int
    head: Head
    owner: Any
    items: np.ndarray

    def cut(self, shape: Shape) -> list["Pack"]:
        """Distribute the cells over packs of a smaller shape, in order."""
        parts = [part.numpy() for part in self.shape.split(self.buffer)]
        ends = parts[3][1 : self.num_cells + 1]
        packs, start, begin = [], 0, 0
        while start < self.num_cells:
            stop = int(np.searchsorted(ends, begin + shape.tokens, side="right"))
            stop = min(stop, start + shape.max_cells)
            end = int(ends[stop - 1])
            buffer = new_buffer(shape, pinned=self.buffer.is_pinned())
            smaller = [part.numpy() for part in shape.split(buffer)]
            for target, source in zip(smaller[:3], parts[:3], strict=True):
                target[: end - begin] = source[begin:end]
            smaller[3][0] = 0
            smaller[3][1 : stop - start + 1] = ends[start:stop] - begin
            fill_tail(*smaller, stop - start, end - begin, shape.longest)
            packs.append(
                Pack(
                    buffer,
                    shape,
                    stop - start,
                    end - begin,
                    self.head,
                    self.owner,
                    self.items[start:stop],
                )
            )
            start, begin = stop, end
        return packs

    def trimmed(self, parts: Parts) -> Parts:
        """Views without the tail, for devices on which shapes need not be constant."""
        n = self.num_tokens
        ends = parts.cu_seqlens[: self.num_cells + 1]
        return Parts(parts.input_ids[:n], parts.position_ids[:n], parts.rows[:n], ends)


def new_buffer(shape: Shape, *, pinned: bool) -> Tensor:
    """A buffer for a pack, page-locked if a GPU is to copy it."""
    return torch.empty(shape.buffer_size, dtype=torch.int32, pin_memory=pinned)


@compiled
def fill_tail(
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    rows: np.ndarray,
    cu_seqlens: np.ndarray,
    num_cells: int,
    num_tokens: int,
    longest: int,
) -> None:
    """Fill what the cells leave free: padding, in segments of at most `longest` tokens, then empty segments."""
    tokens = len(input_ids)
    input_ids[num_tokens:] = 0
    rows[num_tokens:] = NO_GENE
    segment = num_cells
    for start in range(num_tokens, tokens, longest):
        stop = min(start + longest, tokens)
        for j in range(stop - start):
            position_ids[start + j] = j
        segment += 1
        cu_seqlens[segment] = stop
    cu_seqlens[segment + 1 :] = tokens


@compiled
def copy_cells(
    tokens: np.ndarray,
    offsets: np.ndarray,
    chosen: np.ndarray,
    is_special: np.ndarray,
    row_of_cell: np.ndarray,
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    rows: np.ndarray,
    cu_seqlens: np.ndarray,
) -> int:
    """Copy whole cells end to end and return the number of their tokens.

    Parameters
    ----------
    tokens, offsets
        Cell i is `tokens[offsets[i] : offsets[i + 1]]`.
    chosen
        int64, cells in the order of the pack.
    is_special
        bool [V], tokens that are no genes.
    row_of_cell
        int32, the row that the genes of a cell get.
    input_ids, position_ids, rows, cu_seqlens
        Filled.
    """
    filled = 0
    cu_seqlens[0] = 0
    for place in range(len(chosen)):
        start, end = offsets[chosen[place]], offsets[chosen[place] + 1]
        for j in range(end - start):
            token = int(tokens[start + j])
            input_ids[filled + j] = token
            position_ids[filled + j] = j
            rows[filled + j] = NO_GENE if is_special[token] else row_of_cell[chosen[place]]
        filled += end - start
        cu_seqlens[place + 1] = filled
    return filled


def fill_with_cells(
    parts: list[np.ndarray], shape: Shape, tokens: np.ndarray, offsets: np.ndarray, chosen: np.ndarray,
    is_special: np.ndarray, row_of_cell: np.ndarray,
) -> int:  # fmt: skip
    """Fill all parts of a pack with whole cells, see `copy_cells`; return the number of their tokens."""
    num_tokens = int(copy_cells(tokens, offsets, chosen, is_special, row_of_cell, *parts))
    fill_tail(*parts, len(chosen), num_tokens, shape.longest)
    return num_tokens


@compiled
def plan_packs(lengths: np.ndarray, budget: int, max_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute cells over packs: each takes the longest cell that fits, again and again (best fit).

    Parameters
    ----------
    lengths
        int64 [n], each from 1 to `budget`.
    budget, max_cells
        Most tokens and cells of a pack.

    Returns
    -------
    tuple
        The order of the cells, int64 [n], in which cells of one length stay together; and the end of each pack in it.
    """
    longest = lengths.max()
    counts = np.zeros(longest + 2, np.int64)
    for length in lengths:
        counts[length + 1] += 1
    starts = np.cumsum(counts)  # cells of length l are by_length[starts[l] : starts[l + 1]]
    by_length = np.empty(len(lengths), np.int64)
    place = starts.copy()
    for i in range(len(lengths)):
        by_length[place[lengths[i]]] = i
        place[lengths[i]] += 1
    taken = starts[:-1].copy()
    order = np.empty(len(lengths), np.int64)
    ends = np.empty(len(lengths), np.int64)
    done = packs = 0
    while done < len(lengths):
        room, held, length = budget, 0, longest
        while held < max_cells:
            length = min(room, length)
            while length > 0 and taken[length] == starts[length + 1]:
                length -= 1
            if length < 1:
                break
            order[done] = by_length[taken[length]]
            taken[length] += 1
            done += 1
            held += 1
            room -= length
        ends[packs] = done
        packs += 1
    return order, ends[:packs]
