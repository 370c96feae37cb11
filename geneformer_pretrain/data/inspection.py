"""Statistics of a corpus: lengths, genes, groups, and what packing makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geneformer_pretrain.console import Progress
from geneformer_pretrain.data.arrow_cache import CellReader, SourceFile
from geneformer_pretrain.data.packing import BatchShape, pack_cells, permutation
from geneformer_pretrain.data.reading import as_text, read_rows

MOST_PLANNED_CELLS = 2_000_000
"""Packing is measured on this many cells, and scaled up."""


@dataclass(frozen=True)
class TokenStatistics:
    """Result of one pass over all tokens.

    Attributes
    ----------
    lengths
        int32 [cells], tokens of each cell.
    counts
        int64 [largest token + 1], cells that hold each token.
    """

    lengths: np.ndarray
    counts: np.ndarray

    def cap(self, max_tokens: int | None) -> int | None:
        """Length at which cells were cut; None if there is no sign that any was.

        Parameters
        ----------
        max_tokens
            Longest cell of the corpus's gene set. None if it is not known: then ten cells and one in a hundred must
            have the greatest length.
        """
        longest = int(self.lengths.max())
        if max_tokens is not None:
            return longest if longest >= max_tokens else None
        return longest if np.count_nonzero(self.lengths == longest) >= max(10, len(self.lengths) / 100) else None

    def unigram_entropy(self, num_special_tokens: int) -> float:
        """Entropy of the genes' frequencies in nats: the loss of a model that knows these alone."""
        genes = self.counts[num_special_tokens:]
        shares = genes[genes > 0] / genes.sum()
        return float(-(shares * np.log(shares)).sum())


def count_tokens(cells: CellReader) -> TokenStatistics:
    """Read all cells once."""
    lengths: list[np.ndarray] = []
    counts = np.zeros(0, np.int64)
    with Progress(sum(source.rows for source in cells.sources), "read the corpus", "cell") as progress:
        for batch in cells.read():
            lengths.append(np.diff(batch.offsets).astype(np.int32))
            more = np.bincount(batch.tokens)
            counts, more = (counts, more) if len(counts) >= len(more) else (more, counts)
            counts[: len(more)] += more
            progress.advance(len(lengths[-1]))
    return TokenStatistics(np.concatenate(lengths), counts)


@dataclass(frozen=True)
class Group:
    """Cells that share a value of a column."""

    value: str
    cells: int
    tokens: int


def count_groups(sources: Sequence[SourceFile], column: str, lengths: np.ndarray) -> list[Group]:
    """Count cells and tokens by a column's values, largest group first.

    Parameters
    ----------
    lengths
        int [cells], tokens of each cell.
    """
    totals: dict[str, list[int]] = {}
    first = 0
    for table in read_rows(sources, [column]):
        values, places = np.unique(as_text(table[column]), return_inverse=True)
        cells = np.bincount(places)
        tokens = np.bincount(places, lengths[first : first + len(places)]).astype(np.int64)
        for value, some_cells, some_tokens in zip(values, cells.tolist(), tokens.tolist(), strict=True):
            total = totals.setdefault(value, [0, 0])
            total[0] += some_cells
            total[1] += some_tokens
        first += len(places)
    groups = [Group(value, cells, tokens) for value, (cells, tokens) in totals.items()]
    return sorted(groups, key=lambda group: (-group.cells, group.value))


@dataclass(frozen=True)
class Packing:
    """Packs of one epoch in the shape of a configuration.

    Attributes
    ----------
    packs
        Micro-batches of one epoch.
    fill
        Share of the tokens in packed micro-batches that are no padding.
    fill_when_padded
        The same if each cell were padded to ``seq_length``.
    truncated_cells
        Cells longer than ``seq_length``.
    """

    packs: int
    fill: float
    fill_when_padded: float
    truncated_cells: int


def measure_packing(lengths: np.ndarray, micro_batch_size: int, seq_length: int) -> Packing:
    """Pack one epoch, or as many cells as stand for it."""
    sample = lengths
    if len(lengths) > MOST_PLANNED_CELLS:
        sample = np.random.default_rng(0).choice(lengths, MOST_PLANNED_CELLS, replace=False)
    shape = BatchShape.create(sample, micro_batch_size=micro_batch_size, seq_length=seq_length, mlm_probability=0)
    plan = pack_cells(permutation(len(sample), 0, 0), sample, shape)
    tokens = int(np.minimum(sample, seq_length).sum(dtype=np.int64))
    return Packing(
        packs=max(1, round(plan.num_packs * len(lengths) / len(sample))),
        fill=tokens / (plan.num_packs * shape.token_budget),
        fill_when_padded=tokens / (len(sample) * seq_length),
        truncated_cells=int((lengths > seq_length).sum()),
    )


def summarize_lengths(lengths: np.ndarray) -> Mapping[str, float]:
    """Return mean and percentiles of the cells' lengths."""
    low, median, high = np.percentile(lengths, [5, 50, 95])
    return {
        "mean": float(lengths.mean()),
        "percentile_5": float(low),
        "median": float(median),
        "percentile_95": float(high),
        "longest": int(lengths.max()),
        "shortest": int(lengths.min()),
    }
