"""BERT masking, decided by (seed, epoch, cell, position) alone.

Every random number of the data path is a hash of a counter, not the next number of a generator: in whichever
rank, thread, pack or order a cell is read, it gets the same mask. ``mask_segments`` is the compiled kernel of
the packed path; ``mask_cell`` does the same in NumPy for one cell and serves the padded reference path.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from geneformer_pretrain.jit import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)

MASK_STREAM = np.uint64(1)
"""First value hashed into the keys of masks; other random streams start with other numbers."""

REPLACE_BELOW = np.uint64(round(0.8 * 2**32))
"""A selected token whose hash lies below becomes the mask token: 80%."""
RANDOM_BELOW = np.uint64(round(0.9 * 2**32))
"""From there to here it becomes a random gene: 10%. The rest stay as they are."""

IGNORED_LABEL = -100
"""Label of positions that carry no loss."""


@compiled
def mix64(z: np.uint64) -> np.uint64:
    """Scramble 64 bits (the finalizer of splitmix64; a bijection).

    ``mix64.py_func`` does the same to a NumPy array of uint64. Every mask and order follows from it.
    """
    z = (z ^ (z >> _SHIFT_30)) * _MULTIPLIER_1
    z = (z ^ (z >> _SHIFT_27)) * _MULTIPLIER_2
    return z ^ (z >> _SHIFT_31)


@compiled
def derive(key: np.uint64, value: np.uint64) -> np.uint64:
    """Key of the sub-stream ``value`` of ``key``."""
    return mix64(key + value + GOLDEN)


@lru_cache(maxsize=64)
def epoch_key(stream: np.uint64, seed: int, epoch: int) -> np.uint64:
    """Key of one epoch of one of the random streams (masks, order of the cells)."""
    return np.uint64(derive(np.uint64(derive(stream, np.uint64(seed % 2**64))), np.uint64(epoch)))


@dataclass(frozen=True)
class MaskRule:
    """The masking rule of a run: probability, tokens and seed.

    Attributes
    ----------
    seed
        The run's seed.
    probability
        Probability that a token is selected.
    vocab_size
        Tokens are ``0 .. vocab_size - 1``.
    num_special_tokens
        Tokens below this are never selected and never drawn as random replacement.
    mask_token_id
        The token that takes the place of 80% of the selected ones.
    """

    seed: int
    probability: float
    vocab_size: int
    num_special_tokens: int
    mask_token_id: int

    @property
    def select_below(self) -> np.uint64:
        """A token is selected when the upper half of its hash is below this."""
        return np.uint64(round(self.probability * 2**32))


def mask_cell(tokens: np.ndarray, cell: int, epoch: int, rule: MaskRule) -> tuple[np.ndarray, np.ndarray]:
    """Mask one cell.

    Parameters
    ----------
    tokens
        int64 [n], the cell's tokens (truncated or not: a position's mask does not depend on later ones).
    cell
        Number of the cell in the corpus.
    epoch
        Epoch the cell is read in.
    rule
        Probabilities and tokens.

    Returns
    -------
    masked, labels
        int64 [n] each; labels are the original token where selected and -100 elsewhere.
    """
    mix = mix64.py_func
    # An array of one, because NumPy warns when a scalar wraps around.
    key = mix(np.array([epoch_key(MASK_STREAM, rule.seed, epoch)]) + np.uint64(cell) + GOLDEN)
    select_hash = mix(key + np.arange(1, len(tokens) + 1, dtype=np.uint64) * GOLDEN)
    selected = (select_hash >> _HALF < rule.select_below) & (tokens >= rule.num_special_tokens)

    action_hash = mix(select_hash + GOLDEN)
    action = action_hash >> _HALF
    num_genes = np.uint64(rule.vocab_size - rule.num_special_tokens)
    random_gene = ((action_hash & _LOW_HALF) * num_genes >> _HALF).astype(np.int64)
    random_or_kept = np.where(action < RANDOM_BELOW, rule.num_special_tokens + random_gene, tokens)
    replacement = np.where(action < REPLACE_BELOW, rule.mask_token_id, random_or_kept)
    return np.where(selected, replacement, tokens), np.where(selected, tokens, IGNORED_LABEL)


@compiled
def mask_segments(
    input_ids: np.ndarray,
    cu_seqlens: np.ndarray,
    cells: np.ndarray,
    key: np.uint64,
    select_below: np.uint64,
    vocab_size: int,
    num_special_tokens: int,
    mask_token_id: int,
    masked_index: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Mask the cells of a pack in place.

    Parameters
    ----------
    input_ids
        int32 [T], changed in place.
    cu_seqlens
        int32, cell i of the pack is ``input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]``.
    cells
        int64 [number of cells], their numbers in the corpus.
    key
        ``epoch_key(MASK_STREAM, seed, epoch)``.
    select_below, vocab_size, num_special_tokens, mask_token_id
        See ``MaskRule``.
    masked_index, labels
        int32 [K], receive the selected positions in ``input_ids`` in ascending order, padded with 0, and the
        tokens that stood there, padded with -100.

    Returns
    -------
    int
        Number of selected tokens. If it exceeds K, the outputs are incomplete and must not be used.
    """
    num_genes = np.uint64(vocab_size - num_special_tokens)
    longest = 0
    for i in range(len(cells)):
        longest = max(longest, cu_seqlens[i + 1] - cu_seqlens[i])
    selected = np.empty(longest + 1, np.int32)
    hashes = np.empty(longest + 1, np.uint64)
    total = 0
    for i in range(len(cells)):
        start = cu_seqlens[i]
        tokens = input_ids[start : cu_seqlens[i + 1]]
        cell_key = derive(key, np.uint64(cells[i]))
        for j in range(len(tokens)):
            hashes[j] = mix64(cell_key + np.uint64(j + 1) * GOLDEN)
        # Written always, kept by advancing the count: a branch would be mispredicted at every seventh token.
        count = 0
        for j in range(len(tokens)):
            selected[count] = j
            count += (hashes[j] >> _HALF < select_below) & (tokens[j] >= num_special_tokens)
        if total + count <= len(labels):
            for n in range(count):
                j = selected[n]
                masked_index[total + n] = start + j
                labels[total + n] = tokens[j]
                action_hash = mix64(hashes[j] + GOLDEN)
                action = action_hash >> _HALF
                if action < REPLACE_BELOW:
                    tokens[j] = mask_token_id
                elif action < RANDOM_BELOW:
                    tokens[j] = num_special_tokens + np.int64((action_hash & _LOW_HALF) * num_genes >> _HALF)
        total += count
    for n in range(total, len(labels)):
        masked_index[n] = 0
        labels[n] = IGNORED_LABEL
    return total
