"""Perturbed copies of cells: which there are, and the tokens of each, made while a pack is filled.

A cell is its genes by rank, with `<cls>` in front and `<eos>` behind in models that have them. A perturbation is one
gene or several, k of them:

- *delete* removes them; later genes move up.
- *overexpress* puts them in front, in the given order. Where the cell grows beyond the limit of L tokens, its last
  genes are cut, and as many from the original that it is compared with.
- *shift* moves each by a share of the cell's genes, toward the front if the share is positive, at most to an end.

Genes of the perturbation are left out of the comparison on both sides.
"""

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np

from geneformer_pretrain.inference.packs import NO_GENE, NOT_COMPARED
from geneformer_pretrain.jit import compiled

ABSENT = -1
"""Position of a gene that a cell does not have."""

SPECIAL_ROW = -3
"""Special tokens have the row SPECIAL_ROW - r, where r is the row of their counterpart."""


class Mode(IntEnum):
    """Kinds of perturbation."""

    delete = 0
    overexpress = 1
    shift = 2


@dataclass(frozen=True)
class Rule:
    """What is done to cells.

    Attributes
    ----------
    mode
        Kind of perturbation.
    sets
        int32 [p, k], tokens of p perturbations of k genes; or None for each gene of a cell, with the anchor if any.
    anchor
        Token that is perturbed together with each gene of a cell, or None.
    fraction
        Share of a cell's genes by which *shift* moves.
    limit
        Most tokens of a cell.
    added
        Special tokens in front and behind: 0 or 1 each.
    vocab_size
        V.
    """

    mode: Mode
    sets: np.ndarray | None
    anchor: int | None
    fraction: float
    limit: int
    added: int
    vocab_size: int

    @property
    def size(self) -> int:
        """k, genes of a perturbation."""
        if self.sets is not None:
            return int(self.sets.shape[1])
        return 1 if self.anchor is None else 2


@dataclass(frozen=True, eq=False)
class Copies:
    """Perturbed copies of some cells, in the order of the cells.

    Attributes
    ----------
    cell
        int64 [n], place of the cell.
    genes, positions
        int32 [n, k], tokens of the perturbation, and their places among the cell's genes or ABSENT.
    lengths
        int64 [n], tokens of the copy.
    cuts
        int64 [n], genes to cut from the original.
    unchanged, empty
        bool [n], copies that equal their original, and copies without genes: neither needs a forward pass.
    """

    cell: np.ndarray
    genes: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    cuts: np.ndarray
    unchanged: np.ndarray
    empty: np.ndarray

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, some: slice) -> "Copies":
        return Copies(*(getattr(self, column.name)[some] for column in fields(self)))


def find_copies(rule: Rule, tokens: np.ndarray, offsets: np.ndarray) -> Copies:
    """List the copies of some cells.

    A cell that lacks a gene has no copy by *delete* and *shift*; *overexpress* adds it. Each gene of a cell in turn
    has a copy if the rule names none, except that *overexpress* passes over the top gene, which is in front already.

    Parameters
    ----------
    rule
        What is done.
    tokens, offsets
        Cell i is `tokens[offsets[i] : offsets[i + 1]]`.
    """
    k = rule.size
    num_genes = np.diff(offsets) - 2 * rule.added
    if rule.sets is not None:
        most = len(num_genes) * len(rule.sets)
        sets = rule.sets
    else:
        most = int(num_genes.sum())
        sets = np.empty((0, k), np.int32)
    cell = np.empty(most, np.int64)
    genes, positions = np.empty((most, k), np.int32), np.empty((most, k), np.int32)
    anchor = ABSENT if rule.anchor is None else rule.anchor
    needed = rule.mode is not Mode.overexpress
    count = _list_copies(
        tokens, offsets, rule.added, sets, rule.sets is None, anchor, needed, rule.vocab_size, cell, genes, positions
    )
    cell, genes, positions = cell[:count], genes[:count], positions[:count]
    sizes = num_genes[cell]
    present = (positions >= 0).sum(1)
    lengths, cuts = sizes.copy(), np.zeros(count, np.int64)
    if rule.mode is Mode.delete:
        lengths -= present
        unchanged = present == 0
    elif rule.mode is Mode.overexpress:
        lengths += k - present
        cuts = np.maximum(lengths + 2 * rule.added - rule.limit, 0)
        lengths -= cuts
        unchanged = (positions == np.arange(k)).all(1)
    else:
        unchanged = np.empty(count, np.bool_)
        _find_unmoved(positions, sizes, rule.fraction, unchanged)
    return Copies(cell, genes, positions, lengths + 2 * rule.added, cuts, unchanged, lengths == 0)


@compiled
def _list_copies(
    tokens: np.ndarray,
    offsets: np.ndarray,
    added: int,
    sets: np.ndarray,
    each_gene: bool,
    anchor: int,
    needed: bool,
    vocab_size: int,
    cell: np.ndarray,
    genes: np.ndarray,
    positions: np.ndarray,
) -> int:
    """Fill the last three and return the number of copies."""
    count, k = 0, genes.shape[1]
    place_of = np.full(vocab_size, -1, np.int32)
    for i in range(len(offsets) - 1):
        first, size = offsets[i] + added, offsets[i + 1] - offsets[i] - 2 * added
        if each_gene:
            at = -1
            if anchor >= 0:
                for p in range(size):
                    if tokens[first + p] == anchor:
                        at = p
                if at < 0 and needed:
                    continue
            for p in range(size):
                if p == at or (anchor < 0 and not needed and p == 0):
                    continue
                cell[count] = i
                if anchor >= 0:
                    genes[count, 0], positions[count, 0] = anchor, at
                genes[count, k - 1], positions[count, k - 1] = tokens[first + p], p
                count += 1
            continue
        for p in range(size):
            place_of[tokens[first + p]] = p
        for j in range(len(sets)):
            lacks = False
            for g in range(k):
                genes[count, g], positions[count, g] = sets[j, g], place_of[sets[j, g]]
                lacks |= positions[count, g] < 0
            if lacks and needed:
                continue
            cell[count] = i
            count += 1
        for p in range(size):
            place_of[tokens[first + p]] = -1
    return count


@compiled
def _shifted_places(positions: np.ndarray, size: int, fraction: float, order: np.ndarray, places: np.ndarray) -> None:
    """Find where `shift` moves genes: `order` sorts them by their new places, which are `places` in that order."""
    k = len(positions)
    step = int(np.floor(abs(fraction) * size + 0.5))
    if fraction < 0:
        step = -step
    for g in range(k):  # insertion sort by (target, position)
        target = min(max(positions[g] - step, 0), size - 1)
        slot = g
        while slot > 0 and (
            places[slot - 1] > target or (places[slot - 1] == target and positions[order[slot - 1]] > positions[g])
        ):
            places[slot], order[slot] = places[slot - 1], order[slot - 1]
            slot -= 1
        places[slot], order[slot] = target, g
    for g in range(1, k):
        places[g] = max(places[g], places[g - 1] + 1)
    for g in range(k - 1, -1, -1):
        places[g] = min(places[g], size - (k - g))


@compiled
def _find_unmoved(positions: np.ndarray, sizes: np.ndarray, fraction: float, unchanged: np.ndarray) -> None:
    k = positions.shape[1]
    order, places = np.empty(k, np.int64), np.empty(k, np.int64)
    for i in range(len(positions)):
        _shifted_places(positions[i], sizes[i], fraction, order, places)
        unchanged[i] = True
        for g in range(k):
            unchanged[i] &= places[g] == positions[i, order[g]]


@compiled
def write_copies(
    mode: int,
    fraction: float,
    added: int,
    tokens: np.ndarray,
    offsets: np.ndarray,
    cell: np.ndarray,
    genes: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
    first_row: np.ndarray,
    chosen: np.ndarray,
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    rows: np.ndarray,
    cu_seqlens: np.ndarray,
) -> int:
    """Write copies end to end and return the number of their tokens.

    Parameters
    ----------
    mode, fraction, added
        See `Rule`.
    tokens, offsets, cell, genes, positions, lengths
        See `Copies`.
    first_row
        int64 [n], row of the first token of each copy's original, whose tokens have rows one after the other.
    chosen
        int64, copies in the order of the pack.
    input_ids, position_ids, rows, cu_seqlens
        Filled.
    """
    k = genes.shape[1]
    order, places = np.empty(k, np.int64), np.empty(k, np.int64)
    out = 0
    cu_seqlens[0] = 0
    for place in range(len(chosen)):
        copy = chosen[place]
        start = offsets[cell[copy]]
        size = offsets[cell[copy] + 1] - start - 2 * added
        row, first = first_row[copy], start + added
        begin, end = out, out + lengths[copy] - added
        if added:
            input_ids[out], rows[out] = tokens[start], SPECIAL_ROW - row
            out += 1
        next_moved, front = k, 0
        if mode == 1:
            for g in range(k):
                input_ids[out], rows[out] = genes[copy, g], NOT_COMPARED
                out += 1
        elif mode == 2:
            _shifted_places(positions[copy], size, fraction, order, places)
            next_moved, front = 0, out
        for p in range(size):
            moved = False
            for g in range(k):
                moved |= positions[copy, g] == p
            if moved:
                continue
            while next_moved < k and places[next_moved] == out - front:
                input_ids[out], rows[out] = genes[copy, order[next_moved]], NOT_COMPARED
                out += 1
                next_moved += 1
            if out == end:
                break
            input_ids[out] = tokens[first + p]
            # A gene that stays in the copy is never among those cut from the original.
            rows[out] = row + added + p
            out += 1
        while next_moved < k:
            input_ids[out], rows[out] = genes[copy, order[next_moved]], NOT_COMPARED
            out += 1
            next_moved += 1
        if added:
            input_ids[out], rows[out] = tokens[first + size], NO_GENE
            out += 1
        for j in range(out - begin):
            position_ids[begin + j] = j
        cu_seqlens[place + 1] = out
    return out


@compiled
def write_originals(
    added: int,
    tokens: np.ndarray,
    offsets: np.ndarray,
    cell: np.ndarray,
    cuts: np.ndarray,
    first_row: np.ndarray,
    chosen: np.ndarray,
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    rows: np.ndarray,
    cu_seqlens: np.ndarray,
) -> int:
    """Write original cells, each without its last `cuts` genes; `rows` says where their vectors are to be stored."""
    out = 0
    cu_seqlens[0] = 0
    for place in range(len(chosen)):
        original = chosen[place]
        start, stop = offsets[cell[original]], offsets[cell[original] + 1]
        length = stop - start - cuts[original]
        for j in range(length):
            token = tokens[start + j]
            row = first_row[original] + j
            if j < added or j >= length - added:
                row = SPECIAL_ROW - row
            if j >= length - added:
                token = tokens[stop - 1]
            input_ids[out + j], position_ids[out + j], rows[out + j] = token, j, row
        out += length
        cu_seqlens[place + 1] = out
    return out
