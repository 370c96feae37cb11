"""Compiled loops over counts: checking, compressing, sorting by cell, and ranking the genes of a cell."""

from typing import Any

import numpy as np

from geneformer_pretrain.jit import compiled

KEPT, FILTERED, EMPTY, NO_GENES, FEW_GENES, BAD_TOTAL = range(6)
"""What became of a cell in `rank_cells`."""

RADIX = 1024
MOST_MOVES = 16
"""Moves for each gene after which a cell is sorted by comparing."""


@compiled
def all_counts(values: Any) -> bool:
    """Return True if all values, [n], are whole numbers from 0 to 2**31 - 1: the quick answer for nearly all files."""
    odd = 0
    for i in range(len(values)):
        value = values[i]
        odd += value != np.int32(value) or value < 0
    return odd == 0


@compiled
def columns_within(indices: Any, num_genes: int) -> bool:
    """Return True if all columns, [n], are at least 0 and below `num_genes`."""
    outside = 0
    for i in range(len(indices)):
        outside += indices[i] < 0 or indices[i] >= num_genes
    return outside == 0


@compiled
def compress_rows(values: Any) -> Any:
    """Return indptr, indices and data of a dense matrix, [cells, genes]; a NaN counts as a value."""
    cells, genes = values.shape
    indptr = np.zeros(cells + 1, np.int64)
    for row in range(cells):
        count = 0
        for gene in range(genes):
            count += values[row, gene] != 0
        indptr[row + 1] = indptr[row] + count
    indices = np.empty(indptr[-1], np.int32)
    data = np.empty(indptr[-1], values.dtype)
    at = 0
    for row in range(cells):
        for gene in range(genes):
            if values[row, gene] != 0:
                indices[at] = gene
                data[at] = values[row, gene]
                at += 1
    return indptr, indices, data


@compiled
def count_into(rows: Any, per_row: Any) -> None:
    """Add the number of entries of each row to `per_row`, [cells] int64."""
    for i in range(len(rows)):
        per_row[rows[i]] += 1


@compiled
def order_by_bucket(rows: Any, bucket_of_row: Any, num_buckets: int) -> Any:
    """Return where each bucket starts, [num_buckets + 1], and the entries' stable order by bucket, [n]."""
    bounds = np.zeros(num_buckets + 1, np.int64)
    for i in range(len(rows)):
        bounds[bucket_of_row[rows[i]] + 1] += 1
    for bucket in range(num_buckets):
        bounds[bucket + 1] += bounds[bucket]
    following = bounds[:-1].copy()
    order = np.empty(len(rows), np.int64)
    for i in range(len(rows)):
        bucket = bucket_of_row[rows[i]]
        order[following[bucket]] = i
        following[bucket] += 1
    return bounds, order


@compiled
def sort_by_row(rows: Any, columns: Any, data: Any, num_rows: int) -> Any:
    """Return indptr, indices and data of entries, [n] each, with rows 0 to num_rows - 1, in a stable order."""
    indptr = np.zeros(num_rows + 1, np.int64)
    for i in range(len(rows)):
        indptr[rows[i] + 1] += 1
    for row in range(num_rows):
        indptr[row + 1] += indptr[row]
    following = indptr[:-1].copy()
    indices, values = np.empty_like(columns), np.empty_like(data)
    for i in range(len(rows)):
        at = following[rows[i]]
        indices[at], values[at] = columns[i], data[i]
        following[rows[i]] += 1
    return indptr, indices, values


@compiled
def _sort_descending(keys: Any, slots: Any, n: int, counts: Any, sorted_keys: Any, sorted_slots: Any) -> None:
    """Sort the first n keys in descending order, equal ones by slot.

    The bits of positive float64 numbers are in the order of the numbers, and near enough to their logarithms for
    2**20 steps of equal width between the least and the greatest to tell most of them apart. Two passes of a radix
    sort bring the steps into order, and an insertion sort on the full keys has little left to move. Where it has
    much (ties, an outlier far from all others), keys are sorted by comparing.

    Parameters
    ----------
    keys
        [>= n] int64, bits of positive float64 numbers.
    slots
        [>= n] int32.
    counts
        Working memory, [2, RADIX] int32.
    sorted_slots
        Result, [n], and working memory, [>= 2 * n].
    sorted_keys
        Working memory, [>= 2 * n].
    """
    least = greatest = keys[0]
    for i in range(1, n):
        least, greatest = min(least, keys[i]), max(greatest, keys[i])
    shift = 0
    while (greatest - least) >> shift >= RADIX * RADIX:
        shift += 1
    counts[:] = 0
    for i in range(n):
        step = (greatest - keys[i]) >> shift
        counts[0, step % RADIX] += 1
        counts[1, step // RADIX] += 1
    low_start = high_start = 0
    for digit in range(RADIX):
        low, high = counts[0, digit], counts[1, digit]
        counts[0, digit], counts[1, digit] = low_start, high_start
        low_start, high_start = low_start + low, high_start + high
    half_keys, half_slots = sorted_keys[n:], sorted_slots[n:]
    for i in range(n):
        digit = ((greatest - keys[i]) >> shift) % RADIX
        at = counts[0, digit]
        half_keys[at], half_slots[at] = keys[i], slots[i]
        counts[0, digit] = at + 1
    for i in range(n):
        digit = ((greatest - half_keys[i]) >> shift) // RADIX
        at = counts[1, digit]
        sorted_keys[at], sorted_slots[at] = half_keys[i], half_slots[i]
        counts[1, digit] = at + 1
    moves = 0
    for i in range(1, n):
        key, slot = sorted_keys[i], sorted_slots[i]
        j = i - 1
        while j >= 0 and (sorted_keys[j] < key or (sorted_keys[j] == key and sorted_slots[j] > slot)):
            sorted_keys[j + 1], sorted_slots[j + 1] = sorted_keys[j], sorted_slots[j]
            j -= 1
        sorted_keys[j + 1], sorted_slots[j + 1] = key, slot
        moves += i - 1 - j
        if moves > MOST_MOVES * n:
            by_slot = np.argsort(slots[:n])
            order = by_slot[np.argsort(-keys[:n][by_slot], kind="mergesort")]
            sorted_slots[:n] = slots[:n][order]
            return


@compiled
def rank_cells(
    indptr: Any,
    indices: Any,
    data: Any,
    wanted: Any,
    given_totals: Any,
    slot_of_column: Any,
    medians: Any,
    token_of_slot: Any,
    target_sum: float,
    most_genes: int,
    min_genes: int,
    first_token: int,
    last_token: int,
    tokens: Any,
    lengths: Any,
    outcome: Any,
    sums: Any,
) -> int:
    """Turn the counts of cells into tokens; return the number of tokens written.

    For each cell: sum the columns of a gene, drop zeros, sort by count / total * target_sum / median in descending
    order, in float64 and in this order of operations; equal values by slot.

    Parameters
    ----------
    indptr, indices, data
        Cells in compressed sparse rows, [cells + 1], [values], [values].
    wanted
        [cells] bool; other cells are filtered out.
    given_totals
        [cells] float64, or [0]: the total of a cell is the sum of its values.
    slot_of_column
        [columns] int32: number of the gene within this file, in the order of gene ids; -1 without a token.
    medians, token_of_slot
        [slots]; NaN for a gene without a median.
    first_token, last_token
        Token before and after the genes; negative for none.
    tokens
        Result, [at least values + 2 * cells].
    lengths, outcome
        Results, [cells] int32 and int8: tokens, and KEPT, FILTERED, EMPTY, NO_GENES, FEW_GENES or BAD_TOTAL.
    sums
        Result, [cells, 3] float64: sum of all counts, of those of genes with a token, of those without a median.
    """
    slots = len(medians)
    ordinal_of_slot, start = np.full(slots, -1, np.int64), 0  # of the values found in all cells so far
    values, found = np.empty(slots), np.empty(slots, np.int32)
    scaled, scaled_slots = np.empty(slots), np.empty(slots, np.int32)
    bits = scaled.view(np.int64)
    sorted_bits, sorted_slots = np.empty(2 * slots, np.int64), np.empty(2 * slots, np.int32)
    counts = np.empty((2, RADIX), np.int32)
    written = 0
    for row in range(len(indptr) - 1):
        lengths[row] = 0
        sums[row, :] = 0
        if not wanted[row]:
            outcome[row] = FILTERED
            continue
        total, matched, n = 0.0, 0.0, 0
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data[i])
            total += value
            slot = slot_of_column[indices[i]]
            if slot >= 0:
                matched += value
                place = ordinal_of_slot[slot] - start
                if place >= 0:
                    values[place] += value
                else:
                    ordinal_of_slot[slot] = start + n
                    values[n], found[n] = value, slot
                    n += 1
        start += n
        sums[row, 0], sums[row, 1] = total, matched
        if total == 0:
            outcome[row] = EMPTY
            continue
        if len(given_totals):
            total = given_totals[row]
            if not 0 < total < np.inf:
                outcome[row] = BAD_TOTAL
                continue
        genes, unranked = 0, 0.0
        for i in range(n):
            if values[i] != 0:
                median = medians[found[i]]
                if median == median:
                    scaled[genes], scaled_slots[genes] = values[i] / total * target_sum / median, found[i]
                    genes += 1
                else:
                    unranked += values[i]
        sums[row, 2] = unranked
        if genes == 0 or genes < min_genes:
            outcome[row] = NO_GENES if genes == 0 else FEW_GENES
            continue
        _sort_descending(bits, scaled_slots, genes, counts, sorted_bits, sorted_slots)
        lengths[row] = min(genes, most_genes) + (first_token >= 0) + (last_token >= 0)
        if first_token >= 0:
            tokens[written] = first_token
            written += 1
        for i in range(min(genes, most_genes)):
            tokens[written + i] = token_of_slot[sorted_slots[i]]
        written += min(genes, most_genes)
        if last_token >= 0:
            tokens[written] = last_token
            written += 1
        outcome[row] = KEPT
    return written
