"""From packs to micro-batches: cells are copied out of the corpus, then masked.

A packed micro-batch is one int32 buffer, so that it travels to the device in one copy; ``unpack`` gives the
tensors in it, which have the same shapes in every batch. With packing off, ``PaddedBatch`` is the plain
reference: the same cells and masks, padded to the longest cell, in NumPy without the packed path's kernels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from geneformer_pretrain.data.copying import BAD_CELL, BAD_LENGTH, BAD_TOKEN, copy_cells
from geneformer_pretrain.data.corpus import Corpus
from geneformer_pretrain.data.masking import (
    IGNORED_LABEL,
    MASK_STREAM,
    MaskRule,
    epoch_key,
    mask_cell,
    mask_segments,
)
from geneformer_pretrain.data.packing import BatchShape
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.errors import DataError

_ALIGNMENT = 32
"""Parts of the buffer start at multiples of 128 bytes: compiled kernels would copy a misaligned input."""


class PackedTensors(NamedTuple):
    """Tensors of a packed micro-batch, all int32.

    T is the token budget, N the number of segments, K the room for masked tokens (0 in unmasked batches).
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


def _part_bounds(shape: BatchShape) -> tuple[list[tuple[int, int]], int]:
    """Start and end of each part, and the size of the buffer."""
    sizes = [shape.token_budget] * 2 + [shape.num_segments + 1] + [shape.masked_capacity] * 2
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return bounds, start


def unpack(buffer: torch.Tensor, shape: BatchShape) -> PackedTensors:
    """Views of the tensors in a packed buffer, on whatever device it is.

    Parameters
    ----------
    buffer
        int32, one micro-batch.
    shape
        The shape it was made with.
    """
    return PackedTensors(*(buffer[start:end] for start, end in _part_bounds(shape)[0]))


@dataclass(frozen=True)
class BatchMetadata:
    """Facts about a micro-batch that the host knows without looking at the device.

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
class PackedBatch(BatchMetadata):
    """A packed micro-batch: constant shapes, one buffer.

    Attributes
    ----------
    buffer
        int32, all tensors; pinned if the builder was asked to.
    shape
        Shape of the tensors.
    """

    buffer: torch.Tensor
    shape: BatchShape

    @property
    def max_seqlen(self) -> int:
        """Longest possible segment: a constant."""
        return self.shape.seq_length

    @property
    def parts(self) -> PackedTensors:
        """Views of all tensors in the buffer."""
        return unpack(self.buffer, self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The batch on another device."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class PaddedBatch(BatchMetadata):
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


class BatchBuilder:
    """Builds any pack's micro-batch; safe to call from several threads.

    Parameters
    ----------
    corpus
        Source of the tokens.
    shape
        Shape of the packs.
    vocab_size, pad_token_id
        A cell's tokens must lie in ``[0, vocab_size)`` and differ from the padding, which fills unused places.
    mask_rule
        None gives unmasked batches: the tokens as they are in the corpus, and no label.
    packing
        False: ``PaddedBatch`` instead of ``PackedBatch``.
    pin_memory
        Put batches into page-locked memory, from which the GPU copies without waiting.
    """

    def __init__(
        self,
        corpus: Corpus,
        shape: BatchShape,
        *,
        vocab_size: int,
        pad_token_id: int,
        mask_rule: MaskRule | None = None,
        packing: bool = True,
        pin_memory: bool = False,
    ) -> None:
        self.corpus = corpus
        self.shape = shape
        self.vocab_size, self.pad_token_id = vocab_size, pad_token_id
        self.mask_rule = mask_rule
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
            Decides the masks, together with the rule's seed.
        cells
            int64 cell numbers.

        Raises
        ------
        DataError
            If a token is outside the vocabulary or padding; names the cell, position and value.
        RuntimeError
            If the plan does not fit the corpus, or more tokens are masked than there is room for.
        """
        return self._packed(pack, epoch, cells) if self.packing else self._padded(pack, epoch, cells)

    def _packed(self, pack: int, epoch: int, cells: np.ndarray) -> PackedBatch:
        # A new buffer each time: the last one may still be on its way to the device. PyTorch's allocator of
        # pinned memory takes a buffer back only when its copies are done.
        buffer = torch.empty(self._size, dtype=torch.int32, pin_memory=self.pin_memory)
        array = buffer.numpy()
        input_ids, position_ids, cu_seqlens, masked_index, labels = (array[start:end] for start, end in self._bounds)
        num_tokens = self._copy(pack, cells, input_ids, position_ids, cu_seqlens)
        num_masked = self._mask(pack, epoch, cells, input_ids, cu_seqlens, masked_index, labels)
        return PackedBatch(pack, epoch, cells, num_tokens, num_masked, buffer, self.shape)

    def _copy(
        self, pack: int, cells: np.ndarray, input_ids: np.ndarray, position_ids: np.ndarray, cu_seqlens: np.ndarray
    ) -> int:
        """Copy the cells of a pack; return the number of their tokens."""
        corpus, shape = self.corpus, self.shape
        if len(cells) > shape.max_cells:
            raise RuntimeError(
                f"pack {pack} holds {len(cells)} cells; its shape has room for {shape.max_cells}: "
                "the plan and the loader need the same shape"
            )
        status, place, position = copy_cells(
            cells,
            corpus.lengths,
            corpus.batch_first_cell,
            corpus.batch_values,
            corpus.batch_offsets,
            *self._element_types,
            self.vocab_size,
            self.pad_token_id,
            shape.seq_length,
            input_ids,
            position_ids,
            cu_seqlens,
        )
        if status == BAD_CELL:
            raise RuntimeError(
                f"pack {pack} asks for cell {cells[place]}, but the corpus has {len(corpus.lengths)} cells; "
                "its plan is damaged or belongs to another corpus: delete the folder of plans"
            )
        if status == BAD_LENGTH:
            raise RuntimeError(
                f"{corpus.describe_cell(int(cells[place]))}: its length is not the one that pack {pack} was "
                "planned with; the corpus cache or the plan is damaged: delete both and start again"
            )
        if status == BAD_TOKEN:
            cell = int(cells[place])
            self._refuse_token(cell, position, int(corpus.cell(cell)[position]))
        return int(position)

    def _mask(
        self,
        pack: int,
        epoch: int,
        cells: np.ndarray,
        input_ids: np.ndarray,
        cu_seqlens: np.ndarray,
        masked_index: np.ndarray,
        labels: np.ndarray,
    ) -> int:
        """Mask the cells of a pack in place; return the number of masked tokens."""
        rule = self.mask_rule
        if rule is None:
            masked_index[:], labels[:] = 0, IGNORED_LABEL
            return 0
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
        if num_masked > len(labels):
            raise RuntimeError(
                f"pack {pack} of epoch {epoch} has {num_masked} masked tokens; there is room for {len(labels)}. Make "
                f"the shape with the loader's training.mlm_probability ({rule.probability}); if it was, another "
                "training.seed avoids this rare accident, or another data.validation_cells among held-out cells"
            )
        return int(num_masked)

    def _padded(self, pack: int, epoch: int, cells: np.ndarray) -> PaddedBatch:
        rows = [self.corpus.cell(int(cell))[: self.shape.seq_length] for cell in cells]
        size = (len(rows), max(map(len, rows)))
        input_ids = torch.full(size, self.pad_token_id, pin_memory=self.pin_memory)
        attention_mask = torch.zeros(size, dtype=torch.int64, pin_memory=self.pin_memory)
        labels = torch.full(size, IGNORED_LABEL, pin_memory=self.pin_memory)
        for i, (cell, tokens) in enumerate(zip(cells.tolist(), rows, strict=True)):
            outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size) | (tokens == self.pad_token_id))
            if len(outside):
                self._refuse_token(cell, int(outside[0]), int(tokens[outside[0]]))
            if self.mask_rule is not None:
                tokens, cell_labels = mask_cell(tokens, cell, epoch, self.mask_rule)
                labels[i, : len(tokens)] = torch.from_numpy(cell_labels)
            input_ids[i, : len(tokens)] = torch.from_numpy(tokens)
            attention_mask[i, : len(tokens)] = 1
        num_masked = int((labels != IGNORED_LABEL).sum())
        return PaddedBatch(pack, epoch, cells, sum(map(len, rows)), num_masked, input_ids, attention_mask, labels)

    def _refuse_token(self, cell: int, position: int, token: int) -> None:
        where = f"{self.corpus.describe_cell(cell)}: token {token} at position {position}"
        if token == self.pad_token_id:
            raise DataError(f"{where} is padding (model.pad_token_id); write cells without it, it would be trained on")
        raise DataError(
            f"{where} is outside the vocabulary [0, {self.vocab_size}); correct the data, or set data.vocab_path to "
            "the vocabulary that it was made with and model.vocab_size to its size"
        )


def build_batches(builder: BatchBuilder, stream: PackStream, packs: Iterable[int]) -> Iterator[Batch]:
    """Yield micro-batches of the first epoch's packs, built one by one in the calling thread; for validation.

    No further epoch is planned, as a stream that is read on would.
    """
    plan = stream.plan(0)
    for pack in packs:
        yield builder.build(pack, 0, plan.pack(pack))
