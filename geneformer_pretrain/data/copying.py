"""Kernel that copies the cells of a pack out of the corpus."""

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from geneformer_pretrain.jit import compiled

GOOD, BAD_TOKEN, BAD_LENGTH, BAD_CELL = 0, 1, 2, 3
"""Results of ``copy_cells``."""


@intrinsic
def _as_pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Pointer to elements of the array ``like``'s type at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.uint64, like), generate


@compiled
def copy_cells(
    cells: np.ndarray,
    lengths: np.ndarray,
    batch_first_cell: np.ndarray,
    batch_values: np.ndarray,
    batch_offsets: np.ndarray,
    token_like: np.ndarray,
    offset_like: np.ndarray,
    vocab_size: int,
    pad_token_id: int,
    seq_length: int,
    input_ids: np.ndarray,
    position_ids: np.ndarray,
    cu_seqlens: np.ndarray,
) -> tuple[int, int, int]:
    """Copy cells end to end, with their positions and boundaries, and fill the rest with padding.

    Parameters
    ----------
    cells
        int64 cell numbers.
    lengths, batch_first_cell, batch_values, batch_offsets
        See ``Corpus``.
    token_like, offset_like
        Empty arrays of the corpus's types.
    vocab_size, pad_token_id
        Tokens outside of ``[0, vocab_size)`` and padding are refused.
    seq_length
        S, longer cells are truncated.
    input_ids, position_ids, cu_seqlens
        Filled; see ``PackedTensors``.

    Returns
    -------
    tuple[int, int, int]
        (GOOD, 0, number of tokens) or (fault, place in the pack, position in the cell).
    """
    token_budget = len(input_ids)
    filled = 0
    cu_seqlens[0] = 0
    for place in range(len(cells)):
        cell = int(cells[place])
        if not 0 <= cell < len(lengths):
            return BAD_CELL, place, 0
        batch = int(np.searchsorted(batch_first_cell, cell, side="right")) - 1
        row = cell - int(batch_first_cell[batch])
        offsets = carray(_as_pointer(batch_offsets[batch], offset_like), (row + 2,))
        start, end = int(offsets[row]), int(offsets[row + 1])
        length = min(end - start, seq_length)
        if end - start != lengths[cell] or length > token_budget - filled:
            return BAD_LENGTH, place, 0
        tokens = carray(_as_pointer(batch_values[batch], token_like), (end,))[start : start + length]
        ids = input_ids[filled : filled + length]
        positions = position_ids[filled : filled + length]
        outside = 0
        for j in range(length):
            token = int(tokens[j])
            outside += (token < 0) | (token >= vocab_size) | (token == pad_token_id)
            ids[j] = token
            positions[j] = j
        if outside:
            for j in range(length):
                if not 0 <= int(tokens[j]) < vocab_size or int(tokens[j]) == pad_token_id:
                    return BAD_TOKEN, place, j
        filled += length
        cu_seqlens[place + 1] = filled

    input_ids[filled:] = pad_token_id
    segment = len(cells)
    for start in range(filled, token_budget, seq_length):
        stop = min(start + seq_length, token_budget)
        for j in range(stop - start):
            position_ids[start + j] = j
        segment += 1
        cu_seqlens[segment] = stop
    cu_seqlens[segment + 1 :] = token_budget
    return GOOD, 0, filled
