"""From packs to micro-batches: cells are copied out of the corpus and masked.

A packed micro-batch is one int32 buffer, so that it travels to the device in one copy; ``split`` names its
parts, which have the same shapes in every batch. With packing off, ``PaddedBatch`` is the plain reference:
the same cells and masks, padded to the longest cell, written in NumPy without the packed path's kernels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from geneformer_pretrain.data.corpus import Corpus
from geneformer_pretrain.data.masking import (
    IGNORED_LABEL,
    MASK_STREAM,
    MaskRule,
    epoch_key,
    mask_cell,
    mask_segments,
)
from geneformer_pretrain.data.packing import PackShape
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.jit import compiled

_ALIGNMENT = 32
"""Parts of the buffer start at multiples of 128 bytes: compiled kernels would copy a misaligned input."""


class Parts(NamedTuple):
    """The parts of a packed micro-batch, all int32.

    T is the token budget, N the number of segments, K the room for masked tokens.
    """

    input_ids: torch.Tensor
    """[T], masked tokens; the unused tail holds the padding token."""
    position_ids: torch.Tensor
    """[T], from 0 in every segment."""
    cu_seqlens: torch.Tensor
    """[N + 1], segment i is tokens [cu_seqlens[i], cu_seqlens[i + 1]): the cells, then the tail; then T."""
    masked_index: torch.Tensor
    """[K], indices of the masked tokens in [0, T), padded with 0."""
    labels: torch.Tensor
    """[K], the tokens that stood there, padded with -100."""


def _part_bounds(shape: PackShape) -> tuple[list[tuple[int, int]], int]:
    """Start and end of each part, and the size of the buffer."""
    sizes = [shape.token_budget] * 2 + [shape.num_segments + 1] + [shape.masked_capacity] * 2
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return bounds, start


def split(buffer: torch.Tensor, shape: PackShape) -> Parts:
    """Views of the parts of a packed buffer, on whatever device it is.

    Parameters
    ----------
    buffer
        int32, one micro-batch.
    shape
        The shape it was made with.
    """
    return Parts(*(buffer[start:end] for start, end in _part_bounds(shape)[0]))


@dataclass(frozen=True)
class BatchInfo:
    """What the host knows about a micro-batch.

    Attributes
    ----------
    pack
        Global number in the stream.
    epoch
        Epoch the pack belongs to.
    cells
        int64 [num_cells], cell numbers in order.
    num_tokens
        Tokens without padding.
    num_masked
        Tokens that carry a label.
    """

    pack: int
    epoch: int
    cells: np.ndarray
    num_tokens: int
    num_masked: int

    @property
    def num_cells(self) -> int:
        """Cells of the batch."""
        return len(self.cells)


@dataclass(frozen=True)
class PackedBatch(BatchInfo):
    """A packed micro-batch: constant shapes, one buffer.

    Attributes
    ----------
    buffer
        int32, all parts; pinned if the loader was asked to.
    shape
        Shape of the parts.
    """

    buffer: torch.Tensor
    shape: PackShape

    @property
    def max_seqlen(self) -> int:
        """No segment is longer: a constant."""
        return self.shape.seq_length

    @property
    def parts(self) -> Parts:
        """Views of all parts."""
        return split(self.buffer, self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The batch on another device."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class PaddedBatch(BatchInfo):
    """A padded micro-batch of B cells, L tokens wide: the longest of its cells.

    Attributes
    ----------
    input_ids
        int64 [B, L], masked tokens, padded with the padding token.
    attention_mask
        int64 [B, L], 1 for tokens and 0 for padding.
    labels
        int64 [B, L], the original tokens where masked, -100 elsewhere.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PaddedBatch":
        """The batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            attention_mask=self.attention_mask.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )


Batch = PackedBatch | PaddedBatch


@intrinsic
def _as_pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Pointer to elements of the array ``like``'s type at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.uint64, like), generate


_GOOD, _BAD_TOKEN, _BAD_LENGTH, _BAD_CELL = 0, 1, 2, 3


@compiled
def _copy_cells(
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
    """Fill the first three parts; return (_GOOD, 0, tokens) or (fault, place in the pack, position)."""
    token_budget = len(input_ids)
    filled = 0
    cu_seqlens[0] = 0
    for place in range(len(cells)):
        cell = int(cells[place])
        if not 0 <= cell < len(lengths):
            return _BAD_CELL, place, 0
        batch = int(np.searchsorted(batch_first_cell, cell, side="right")) - 1
        row = cell - int(batch_first_cell[batch])
        offsets = carray(_as_pointer(batch_offsets[batch], offset_like), (row + 2,))
        start, end = int(offsets[row]), int(offsets[row + 1])
        length = min(end - start, seq_length)
        if end - start != lengths[cell] or length > token_budget - filled:
            return _BAD_LENGTH, place, 0
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
                    return _BAD_TOKEN, place, j
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
    return _GOOD, 0, filled


class BatchBuilder:
    """Builds any pack's micro-batch; safe to call from several threads.

    Parameters
    ----------
    corpus
        Source of the tokens.
    shape
        Shape of the packs.
    seed, mlm_probability, vocab_size, num_special_tokens, mask_token_id
        See ``MaskRule``.
    pad_token_id
        Token of unused places.
    packing
        False: ``PaddedBatch`` instead of ``PackedBatch``.
    pin_memory
        Put batches into page-locked memory, from which the GPU copies without waiting.
    """

    def __init__(
        self,
        corpus: Corpus,
        shape: PackShape,
        *,
        seed: int,
        mlm_probability: float,
        vocab_size: int,
        num_special_tokens: int,
        mask_token_id: int,
        pad_token_id: int,
        packing: bool = True,
        pin_memory: bool = False,
    ) -> None:
        self.corpus = corpus
        self.shape = shape
        self.rule = MaskRule(seed, mlm_probability, vocab_size, num_special_tokens, mask_token_id)
        self.pad_token_id = pad_token_id
        self.packing = packing
        self.pin_memory = pin_memory
        self._bounds, self._size = _part_bounds(shape)
        self._element_types = np.empty(0, corpus.token_dtype), np.empty(0, corpus.offset_dtype)

    def build(self, pack: int, epoch: int, cells: np.ndarray) -> Batch:
        """Build one micro-batch.

        Parameters
        ----------
        pack
            Its global number, for the record only.
        epoch
            Decides the masks, together with the seed.
        cells
            int64 cell numbers.

        Raises
        ------
        ValueError
            If a token is outside the vocabulary or padding; names the cell, position and value.
        RuntimeError
            If the plan does not fit the corpus, or more tokens are masked than there is room for.
        """
        return self._packed(pack, epoch, cells) if self.packing else self._padded(pack, epoch, cells)

    def _packed(self, pack: int, epoch: int, cells: np.ndarray) -> PackedBatch:
        corpus, shape, rule = self.corpus, self.shape, self.rule
        if len(cells) > shape.max_cells:
            raise RuntimeError(
                f"pack {pack} holds {len(cells)} cells; its shape has room for {shape.max_cells}: "
                "the plan and the loader need the same shape"
            )
        # A new buffer each time: the last one may still be on its way to the device. PyTorch's allocator of
        # pinned memory takes a buffer back only when its copies are done.
        buffer = torch.empty(self._size, dtype=torch.int32, pin_memory=self.pin_memory)
        array = buffer.numpy()
        input_ids, position_ids, cu_seqlens, masked_index, labels = (array[start:end] for start, end in self._bounds)
        status, place, position = _copy_cells(
            cells,
            corpus.lengths,
            corpus.batch_first_cell,
            corpus.batch_values,
            corpus.batch_offsets,
            *self._element_types,
            rule.vocab_size,
            self.pad_token_id,
            shape.seq_length,
            input_ids,
            position_ids,
            cu_seqlens,
        )
        if status == _BAD_CELL:
            raise RuntimeError(
                f"pack {pack} asks for cell {cells[place]}, but the corpus has {len(corpus.lengths)} cells; "
                "its plan is damaged or belongs to another corpus: delete the folder of plans"
            )
        if status == _BAD_LENGTH:
            raise RuntimeError(
                f"{corpus.describe_cell(int(cells[place]))}: its length is not the one that pack {pack} was "
                "planned with; the corpus cache or the plan is damaged: delete both and start again"
            )
        if status == _BAD_TOKEN:
            cell = int(cells[place])
            self._refuse_token(cell, position, int(corpus.cell(cell)[position]))
        num_masked = mask_segments(
            input_ids,
            cu_seqlens,
            cells,
            epoch_key(MASK_STREAM, rule.seed, epoch),
            rule.select_below,
            rule.vocab_size,
            rule.num_special_tokens,
            rule.mask_token_id,
            masked_index,
            labels,
        )
        if num_masked > shape.masked_capacity:
            raise RuntimeError(
                f"pack {pack} of epoch {epoch} has {num_masked} masked tokens; there is room for "
                f"{shape.masked_capacity}. Make the shape with the loader's training.mlm_probability "
                f"({rule.probability}); if it was, another training.seed avoids this rare accident"
            )
        return PackedBatch(pack, epoch, cells, position, num_masked, buffer, shape)

    def _padded(self, pack: int, epoch: int, cells: np.ndarray) -> PaddedBatch:
        rows = [self.corpus.cell(int(cell))[: self.shape.seq_length] for cell in cells]
        size = (len(rows), max(map(len, rows)))
        input_ids = torch.full(size, self.pad_token_id, pin_memory=self.pin_memory)
        attention_mask = torch.zeros(size, dtype=torch.int64, pin_memory=self.pin_memory)
        labels = torch.full(size, IGNORED_LABEL, pin_memory=self.pin_memory)
        for i, (cell, tokens) in enumerate(zip(cells.tolist(), rows, strict=True)):
            outside = np.flatnonzero((tokens < 0) | (tokens >= self.rule.vocab_size) | (tokens == self.pad_token_id))
            if len(outside):
                self._refuse_token(cell, int(outside[0]), int(tokens[outside[0]]))
            masked, cell_labels = mask_cell(tokens, cell, epoch, self.rule)
            input_ids[i, : len(tokens)] = torch.from_numpy(masked)
            attention_mask[i, : len(tokens)] = 1
            labels[i, : len(tokens)] = torch.from_numpy(cell_labels)
        num_masked = int((labels != IGNORED_LABEL).sum())
        return PaddedBatch(pack, epoch, cells, sum(map(len, rows)), num_masked, input_ids, attention_mask, labels)

    def _refuse_token(self, cell: int, position: int, token: int) -> None:
        if token == self.pad_token_id:
            raise ValueError(
                f"{self.corpus.describe_cell(cell)}: token {token} at position {position} is padding "
                "(model.pad_token_id); write cells without it, it would be trained on"
            )
        raise ValueError(
            f"{self.corpus.describe_cell(cell)}: token {token} at position {position} is outside the "
            f"vocabulary [0, {self.rule.vocab_size}); correct the data, or set data.vocab_path to the vocabulary "
            "that it was made with and model.vocab_size to its size"
        )


def build_batches(builder: BatchBuilder, stream: PackStream, packs: Iterable[int]) -> Iterator[Batch]:
    """Micro-batches of the given packs, built one by one in the calling thread; for validation."""
    for pack in packs:
        yield builder.build(pack, *stream.locate(pack))
