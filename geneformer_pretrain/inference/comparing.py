"""Perturbed copies beside their originals: packs of both, and scores computed on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.inference.edits import (
    SPECIAL_ROW,
    Copies,
    Mode,
    Rule,
    find_copies,
    write_copies,
    write_originals,
)
from geneformer_pretrain.inference.packs import NO_GENE, Pack, Parts, fill_tail, new_buffer
from geneformer_pretrain.inference.pooling import compare, first_token, mean_of_genes
from geneformer_pretrain.inference.runner import Runner


@dataclass(eq=False)
class Group:
    """Cells whose originals are on the device together, and their copies.

    Attributes
    ----------
    cells
        int64 [c], numbers of the cells.
    tokens, offsets
        Their tokens.
    copies
        Their n copies.
    original
        int64 [n], the original of each copy: the cell, without as many genes as the copy lost beyond the limit.
    original_cell, original_cut, original_lengths, original_row
        int64 [o], cell, genes cut, tokens and row of the first token of each original.
    scores
        float32 [n, scores]; NaN where there is none.
    original_scores
        float32 [o, C S], cosine of each original with each state.
    """

    cells: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    copies: Copies
    original: np.ndarray
    original_cell: np.ndarray
    original_cut: np.ndarray
    original_lengths: np.ndarray
    original_row: np.ndarray
    scores: np.ndarray
    original_scores: np.ndarray

    @property
    def computed(self) -> np.ndarray:
        """Bool [n], copies that go through the model."""
        return ~(self.copies.unchanged | self.copies.empty)

    @property
    def num_computed(self) -> int:
        """Copies that go through the model."""
        return int(self.computed.sum())

    @property
    def num_skipped(self) -> int:
        """Copies whose scores are known."""
        return len(self.copies) - self.num_computed


class Comparing:
    """Makes the packs of a group, and the scores of its copies.

    Parameters
    ----------
    runner
        Runs the packs.
    rule
        How cells are perturbed.
    states
        float32 [S, C, H], vectors of states, or None. C is 2 for models with <cls>, whose vector follows the mean.
    """

    def __init__(self, runner: Runner, rule: Rule, states: np.ndarray | None) -> None:
        self.runner, self.rule = runner, rule
        model = runner.model
        self.has_cls = model.cls_token is not None
        self.num_shifts = 0 if states is None else states.shape[0] * states.shape[1]
        self.states = None if states is None else torch.from_numpy(states).to(model.device).transpose(0, 1)
        self.num_scores = 2 + self.has_cls + self.num_shifts
        overflows = rule.mode is Mode.overexpress and (rule.sets is None or len(rule.sets) > 1)
        self.most_originals = rule.size + 1 if overflows else 1
        """Most originals of a cell: they differ by the genes cut."""
        self.capacity = max(runner.tokens, self.most_originals * runner.longest)
        """Rows for the originals of a group; one more takes what is not needed."""
        self.store = torch.zeros(self.capacity + 1, model.hidden_size, dtype=model.dtype, device=model.device)

    def group(self, cells: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, kept: slice) -> Group:
        """List some of the copies of cells, and originals; copies that change nothing score 1 and shift by 0."""
        copies = find_copies(self.rule, tokens, offsets)[kept]
        keys = copies.cell * (self.rule.size + 1) + copies.cuts
        originals, original = np.unique(keys, return_inverse=True)
        cell, cut = np.divmod(originals, self.rule.size + 1)
        lengths = np.diff(offsets)[cell] - cut
        scores = np.full((len(copies), self.num_scores), np.nan, np.float32)
        scores[copies.unchanged] = 1.0
        scores[copies.unchanged, self.num_scores - self.num_shifts :] = 0.0
        return Group(
            cells=cells,
            tokens=tokens,
            offsets=offsets,
            copies=copies,
            original=original,
            original_cell=cell,
            original_cut=cut,
            original_lengths=lengths,
            original_row=np.cumsum(lengths) - lengths,
            scores=scores,
            original_scores=np.empty((len(originals), self.num_shifts), np.float32),
        )

    def packs(self, group: Group, results: Any) -> Iterator[Pack]:
        """Packs of the originals, then of the copies."""
        copies, rule, runner = group.copies, self.rule, self.runner
        computed = np.flatnonzero(group.computed)
        if not len(computed):
            return
        owner = group, results
        for chosen, shape in runner.plan(group.original_lengths):
            buffer = new_buffer(shape, pinned=runner.on_gpu)
            parts = [part.numpy() for part in shape.split(buffer)]
            count = write_originals(
                rule.added,
                group.tokens,
                group.offsets,
                group.original_cell,
                group.original_cut,
                group.original_row,
                chosen,
                *parts,
            )
            fill_tail(*parts, len(chosen), count, shape.longest)
            yield Pack(buffer, shape, len(chosen), count, self.keep, owner, chosen)
        rows = group.original_row[group.original]
        for places, shape in runner.plan(copies.lengths[computed]):
            chosen = computed[places]
            buffer = new_buffer(shape, pinned=runner.on_gpu)
            parts = [part.numpy() for part in shape.split(buffer)]
            count = write_copies(
                int(rule.mode),
                rule.fraction,
                rule.added,
                group.tokens,
                group.offsets,
                copies.cell,
                copies.genes,
                copies.positions,
                copies.lengths,
                rows,
                chosen,
                *parts,
            )
            fill_tail(*parts, len(chosen), count, shape.longest)
            yield Pack(buffer, shape, len(chosen), count, self.compare, owner, chosen)

    def receive(self, group: Group, pack: Pack, rows: np.ndarray) -> bool:
        """Enter the results of a pack; true for one of copies."""
        if pack.head == self.keep:
            group.original_scores[pack.items] = rows
            return False
        first = self.num_scores - self.num_shifts
        rows = rows.copy()
        rows[:, first:] -= group.original_scores[group.original[pack.items]]
        group.scores[pack.items] = rows
        return True

    def keep(self, pack: Pack, hidden: Tensor, parts: Parts) -> Tensor:
        """Keep the hidden states of originals, and compare these with the states: [N, C S]."""
        rows = torch.where(parts.rows < 0, SPECIAL_ROW - parts.rows, parts.rows)
        rows = torch.where(parts.rows == NO_GENE, self.capacity, rows)
        self.store.index_copy_(0, rows.long(), hidden)
        return self._with_states(mean_of_genes(hidden, parts), hidden, parts)

    def compare(self, pack: Pack, hidden: Tensor, parts: Parts) -> Tensor:
        """Compare copies with their originals and with the states: [N, scores]."""
        found = compare(hidden, parts, self.store)
        columns = [found.gene_similarity[:, None], found.cell_similarity[:, None]]
        if self.has_cls:
            first = parts.cu_seqlens[:-1].clamp(max=len(hidden) - 1)
            rows = (SPECIAL_ROW - parts.rows[first]).clamp(min=0)
            columns.append(F.cosine_similarity(hidden[first].float(), self.store[rows].float())[:, None])
        return torch.cat([*columns, self._with_states(found.mean, hidden, parts)], dim=1)

    def _with_states(self, mean: Tensor, hidden: Tensor, parts: Parts) -> Tensor:
        """Cosine with each state, of the mean and then of <cls>: [N, C S]."""
        if self.states is None:
            return mean[:, :0]
        vectors = torch.stack([mean, first_token(hidden, parts)] if self.has_cls else [mean], dim=1)
        return F.cosine_similarity(vectors[:, :, None], self.states[None], dim=3).flatten(1)
