"""From the lengths of the cells to the packs of an epoch.

1. ``permutation``   every cell once, in the order that (seed, epoch) decides
2. ``pack_cells``    neighbours in that order put together into packs of a fixed token budget and equal cost
3. ``EpochPlan``     the packs of one epoch

No token is read for any of it. An epoch's last pack may be part empty: packs never mix epochs.
"""

import math
from dataclasses import dataclass

import numpy as np

from geneformer_pretrain.data.masking import GOLDEN, derive, epoch_key, mix64
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.jit import compiled

PLANNER_VERSION = 2
"""Raised with every change that gives other packs, so that plans on disk are not mistaken for new ones."""

GROUP_PACKS = 32
"""Packs that are made together, from the same cells."""

SPARE_CELLS = 16
"""Extra candidates of a group: enough cells for one more pack, or this many of maximal length, whichever is more."""

SHUFFLE_WINDOW_BLOCKS = 16
"""Blocks whose cells are mixed with each other when shuffling by blocks."""

ALIGNMENT = 128
"""FP8 kernels need row counts that are multiples of this."""

ORDER_STREAM = np.uint64(2)
HOLD_OUT_STREAM = np.uint64(3)
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


@dataclass(frozen=True)
class BatchShape:
    """The constant shape of every micro-batch.

    Attributes
    ----------
    token_budget
        T, tokens of a pack.
    seq_length
        S, longest cell and longest segment; longer cells are truncated.
    max_cells
        Most cells of a pack. Every segment that stays unused costs the attention kernel a few empty blocks.
    masked_capacity
        K, room for masked tokens.
    """

    token_budget: int
    seq_length: int
    max_cells: int
    masked_capacity: int

    @classmethod
    def create(
        cls,
        lengths: np.ndarray,
        *,
        micro_batch_size: int,
        seq_length: int,
        mlm_probability: float,
        packing: bool = True,
        max_cells: int | None = None,
    ) -> "BatchShape":
        """Derive the shape from the configuration and the corpus.

        Parameters
        ----------
        lengths
            int32 [cells], tokens of each cell; decides the default of ``max_cells``.
        micro_batch_size, seq_length
            Their product is the token budget.
        mlm_probability
            Decides the room for masked tokens: the mean plus 8 standard deviations. 0: no room, for unmasked batches.
        packing
            False: a "pack" is ``micro_batch_size`` cells, later padded.
        max_cells
            Most cells of a pack; by default ``default_max_cells``.
        """
        token_budget = micro_batch_size * seq_length
        if not packing:
            max_cells = micro_batch_size
        elif max_cells is None:
            max_cells = default_max_cells(lengths, seq_length, token_budget)
        else:
            max_cells = min(max_cells, token_budget)  # no pack holds more, and each one costs memory
        return cls(token_budget, seq_length, max_cells, masked_capacity(token_budget, mlm_probability))

    @property
    def num_segments(self) -> int:
        """Segments of a pack: its cells, and the unused tail cut into pieces of at most ``seq_length``."""
        return self.max_cells + math.ceil(self.token_budget / self.seq_length)


def masked_capacity(token_budget: int, mlm_probability: float) -> int:
    """Room for masked tokens: mean + 8 sigma of Binomial(T, p), at most T, rounded up to 128s; none where p is 0."""
    if mlm_probability == 0:
        return 0
    mean = token_budget * mlm_probability
    sigma = math.sqrt(mean * (1.0 - mlm_probability))
    return max(ALIGNMENT, _round_up(min(mean + 8.0 * sigma, token_budget), ALIGNMENT))


def default_max_cells(lengths: np.ndarray, seq_length: int, token_budget: int) -> int:
    """Half as many cells again as an average pack holds, and 16: the tokens, not the cells, fill a pack."""
    _, dropped, total = summarize(lengths, seq_length)
    mean = (total - dropped) / max(1, len(lengths))
    return min(token_budget, math.ceil(1.5 * token_budget / max(1.0, mean)) + 16)


@compiled
def summarize(lengths: np.ndarray, seq_length: int) -> tuple[int, int, int]:
    """Cells longer than S, tokens cut from them, tokens before cutting."""
    truncated, dropped, total = 0, 0, 0
    for length in lengths:
        excess = max(0, int(length) - seq_length)
        truncated += excess > 0
        dropped += excess
        total += int(length)
    return truncated, dropped, total


@compiled
def _shuffle(items: np.ndarray, key: np.uint64) -> None:
    """Fisher-Yates, in place; unbiased (Lemire's multiply and shift, with rejection)."""
    state = key
    for last in range(len(items) - 1, 0, -1):
        size = np.uint64(last + 1)
        state += GOLDEN
        product = (mix64(state) >> _HALF) * size
        if product & _LOW_HALF < size:
            rejected_below = (np.uint64(2**32) - size) % size
            while product & _LOW_HALF < rejected_below:
                state += GOLDEN
                product = (mix64(state) >> _HALF) * size
        chosen = np.int64(product >> _HALF)
        items[last], items[chosen] = items[chosen], items[last]


@compiled
def _shuffle_by_blocks(order: np.ndarray, block_cells: int, window_blocks: int, key: np.uint64) -> None:
    """Fill ``order`` with the cells: blocks permuted, then cells shuffled within windows of blocks."""
    num_cells = len(order)
    blocks = np.arange((num_cells + block_cells - 1) // block_cells).astype(np.uint32)
    _shuffle(blocks, derive(key, np.uint64(0)))
    filled = 0
    for window_start in range(0, len(blocks), window_blocks):
        start = filled
        for block in blocks[window_start : window_start + window_blocks]:
            first = int(block) * block_cells
            for cell in range(first, min(first + block_cells, num_cells)):
                order[filled] = cell
                filled += 1
        _shuffle(order[start:filled], derive(key, np.uint64(window_start + 1)))


def permutation(num_cells: int, seed: int, epoch: int, shuffle_block_cells: int | None = None) -> np.ndarray:
    """Order of the cells in one epoch.

    Parameters
    ----------
    num_cells
        Cells of the corpus.
    seed, epoch
        Decide the order, together with ``shuffle_block_cells``.
    shuffle_block_cells
        None: any order of the cells is equally likely. A number, for a corpus larger than the host's memory:
        consecutive cells form blocks of this size, the blocks are permuted, and cells are shuffled within
        windows of 16 permuted blocks, so that reads stay within 16 stretches of the corpus at a time.

        The cost: a batch mixes cells from at most 16 places (32 where it straddles windows). If neighbours in
        the corpus resemble each other (cells of one donor), the share of the gradient's variance that they
        have in common falls no further than to 1/16 in a batch, however many cells it has, and stays the same
        for a whole window of batches. With unrelated neighbours there is no cost: shuffle such a corpus once,
        when it is made. Otherwise prefer small blocks: the variance stays, but windows pass sooner, so that
        averages over some tens of steps (which Adam keeps) see many of them.

    Returns
    -------
    numpy.ndarray
        uint32 [num_cells], each cell once.
    """
    if num_cells >= 2**32:
        raise DataError(f"the corpus has {num_cells} cells; at most 2**32 - 1 can be shuffled")
    key = epoch_key(ORDER_STREAM, seed, epoch)
    if shuffle_block_cells is None:
        order = np.arange(num_cells, dtype=np.uint32)
        _shuffle(order, key)
        return order
    order = np.empty(num_cells, np.uint32)
    _shuffle_by_blocks(order, shuffle_block_cells, SHUFFLE_WINDOW_BLOCKS, key)
    return order


@compiled
def _mark_below(marks: np.ndarray, key: np.uint64, below: np.uint64) -> None:
    for cell in range(len(marks)):
        marks[cell] = derive(key, np.uint64(cell)) >> _HALF < below


def held_out_cells(num_cells: int, fraction: float) -> np.ndarray:
    """Choose cells by a hash of their number: the same ones in every run, whatever its seed.

    Returns
    -------
    numpy.ndarray
        bool [num_cells], true for about ``fraction`` of the cells.
    """
    marks = np.empty(num_cells, np.bool_)
    _mark_below(marks, epoch_key(HOLD_OUT_STREAM, 0, 0), np.uint64(round(fraction * 2**32)))
    return marks


@compiled
def _hash_each(cells: np.ndarray, key: np.uint64, hashes: np.ndarray) -> None:
    for i in range(len(cells)):
        hashes[i] = derive(key, np.uint64(cells[i]))


def first_held_out(chosen: np.ndarray, number: int) -> np.ndarray:
    """Choose among the chosen cells the ones with the lowest hashes.

    It is the hash of ``held_out_cells``: they are the same ones whatever fraction was held out, as long as it has so
    many, and a larger number adds further cells.

    Returns
    -------
    numpy.ndarray
        bool [num_cells], true for ``number`` cells, or for all chosen ones if there are fewer.
    """
    cells = np.flatnonzero(chosen)
    if len(cells) <= number:
        return chosen
    hashes = np.empty(len(cells), np.uint64)
    _hash_each(cells, epoch_key(HOLD_OUT_STREAM, 0, 0), hashes)
    marks = np.zeros(len(chosen), np.bool_)
    marks[cells[np.argpartition(hashes, number)[:number]]] = True  # a bijection of the cell's number: no ties
    return marks


@compiled
def _sort_by_length(cells: np.ndarray, lengths: np.ndarray, seq_length: int) -> None:
    """Longest first, in place; equal lengths keep their order."""
    place = np.zeros(seq_length + 2, np.int64)
    for length in lengths:
        place[seq_length - length + 1] += 1
    for length in range(1, len(place)):
        place[length] += place[length - 1]
    unsorted_cells, unsorted_lengths = cells.copy(), lengths.copy()
    for cell, length in zip(unsorted_cells, unsorted_lengths):  # noqa: B905 - numba knows no strict
        target = place[seq_length - length]
        cells[target], lengths[target] = cell, length
        place[seq_length - length] += 1


@compiled
def _pack_in_place(
    order: np.ndarray,
    lengths: np.ndarray,
    token_budget: int,
    seq_length: int,
    max_cells: int,
    group_packs: int,
    spare_cells: int,
    pack_start: np.ndarray,
) -> int:
    """Reorder ``order`` pack by pack, fill ``pack_start``, return the number of packs.

    Cells are written behind the place where they are read, so the part not yet read stays intact.
    """
    num_cells = len(order)
    capacity = min(num_cells, 2 * group_packs * max_cells)
    enough = group_packs * token_budget + max(token_budget, spare_cells * seq_length)
    pool = np.empty(capacity, np.uint32)
    pool_lengths = np.empty(capacity, np.int64)
    pack_of = np.empty(capacity, np.int64)
    room = np.empty(group_packs, np.int64)
    cost = np.empty(group_packs, np.int64)
    held = np.empty(group_packs, np.int64)
    pooled = pooled_tokens = read = written = num_packs = 0
    while written < num_cells:
        carried = pooled
        while read < num_cells and pooled < capacity and pooled_tokens < enough:
            length = min(int(lengths[order[read]]), seq_length)
            pool[pooled], pool_lengths[pooled] = order[read], length
            pooled_tokens += length
            pooled += 1
            read += 1
        _sort_by_length(pool[carried:pooled], pool_lengths[carried:pooled], seq_length)

        packs = group_packs
        if read == num_cells:
            packs = min(packs, max(-(-pooled_tokens // token_budget), -(-pooled // max_cells)))
        room[:packs], cost[:packs], held[:packs] = token_budget, 0, 0
        for i in range(pooled):
            length, chosen = pool_lengths[i], -1
            for pack in range(packs):
                fits = room[pack] >= length and held[pack] < max_cells
                if fits and (chosen < 0 or cost[pack] < cost[chosen]):
                    chosen = pack
            pack_of[i] = chosen
            if chosen >= 0:
                room[chosen] -= length
                cost[chosen] += length * length
                held[chosen] += 1

        for pack in range(packs):
            pack_start[num_packs + pack] = written
            written += held[pack]
        left = 0
        pooled_tokens = 0
        held[:packs] = 0
        for i in range(pooled):
            if pack_of[i] >= 0:
                order[pack_start[num_packs + pack_of[i]] + held[pack_of[i]]] = pool[i]
                held[pack_of[i]] += 1
            else:
                pool[left], pool_lengths[left] = pool[i], pool_lengths[i]
                pooled_tokens += pool_lengths[i]
                left += 1
        pooled = left
        num_packs += packs
    pack_start[num_packs] = num_cells
    return num_packs


def pack_cells(order: np.ndarray, lengths: np.ndarray, shape: BatchShape, packing: bool = True) -> "EpochPlan":
    """Put neighbours in ``order`` together into packs that are full and cost the same.

    Ranks work on their packs side by side and wait for the slowest, and attention costs the square of a cell's
    length. So packs are made in groups of 32, from somewhat more cells of ``order`` than fill them: first the
    cells that the group before left over, then the new ones, longest first, and each goes to the pack with the
    smallest sum of squares among those that have room (Graham's longest-processing-time rule, 1969). What fits
    nowhere is left for the next group; those are short cells, of which every group has enough to fill its gaps.

    Without packing, a pack is the next ``max_cells`` cells.

    Parameters
    ----------
    order
        uint32 [cells of the epoch]; overwritten, it becomes the plan's ``cells``.
    lengths
        int32 [cells of the corpus], by cell number, before truncation.
    shape
        Budget and limits.
    packing
        False for the padded reference path.
    """
    if not packing:
        starts = np.arange(0, len(order) + shape.max_cells, shape.max_cells)
        return EpochPlan(order, np.minimum(starts, len(order)))
    # One entry per cell is the most it can take; what is not written to is never backed by memory.
    pack_start = np.empty(len(order) + 1, np.int64)
    num_packs = _pack_in_place(
        order, lengths, shape.token_budget, shape.seq_length, shape.max_cells, GROUP_PACKS, SPARE_CELLS, pack_start
    )
    return EpochPlan(order, pack_start[: num_packs + 1].copy())


@dataclass(frozen=True)
class EpochPlan:
    """The packs of one epoch.

    Attributes
    ----------
    cells
        uint32 [cells], cell numbers pack by pack.
    pack_start
        int64 [packs + 1]; pack i holds ``cells[pack_start[i]:pack_start[i + 1]]``.
    """

    cells: np.ndarray
    pack_start: np.ndarray

    @property
    def num_packs(self) -> int:
        """Packs of the epoch."""
        return len(self.pack_start) - 1

    def pack(self, index: int) -> np.ndarray:
        """int64 cell numbers of the epoch's pack ``index``."""
        return self.cells[self.pack_start[index] : self.pack_start[index + 1]].astype(np.int64)
