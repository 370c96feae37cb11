"""Geneformer's rule: the genes of a cell in descending order of expression, relative to their medians.

The value of a gene is count / total * target_sum / median, in float64 and in this order of operations; columns of one
gene are summed before, zeros are dropped, equal values come in the order of gene ids (as strings). The first genes up
to the longest cell of the gene set are kept, between `<cls>` and `<eos>` where it has them. The total of a cell is
the sum over all columns, with a token or not, unless a column of totals is named.
Source: Theodoris et al., Nature 618, 616-624 (2023), Methods, "Rank value encoding".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import kernels
from geneformer_pretrain.tokenization.cell_columns import filter_column_of, given_totals, passing_cells
from geneformer_pretrain.tokenization.counts import CountsBlock, CountsFile
from geneformer_pretrain.tokenization.gene_ids import MINIMUM_SHARE, GeneMatch
from geneformer_pretrain.tokenization.gene_set import GeneSet

SAME_TOTAL = 1e-6
"""Relative difference up to which a given total equals the sum."""

REASONS = {
    "filter": kernels.FILTERED,
    "empty": kernels.EMPTY,
    "no_genes": kernels.NO_GENES,
    "few_genes": kernels.FEW_GENES,
}
"""Why cells are left out: not chosen by the filter column; without counts; without a gene that has a token and a
median; with fewer such genes than asked for."""

LEFT_OUT = {
    "filter": "not chosen by the filter column",
    "empty": "without counts",
    "no_genes": "without a gene of the gene set",
    "few_genes": "with fewer genes than --min-genes",
}
"""The same for people, after a number."""


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Describe the numbers of `Tally.left_out` for people; an empty string if no cell is left out."""
    return ", ".join(f"{cells:,} {LEFT_OUT[reason]}" for reason, cells in left_out.items() if cells)


@dataclass
class Tally:
    """Sums over cells that were read.

    Attributes
    ----------
    cells, kept, tokens
        Cells read, cells that became tokens, and these tokens.
    left_out
        Cells left out, by reason; see `REASONS`.
    counts, matched_counts, unranked_counts
        Sum of all counts of the cells that the filter lets pass; of genes with a token; of genes without a median.
    other_totals, greatest_ratio
        Cells whose given total is not the sum of their counts, and the greatest ratio of the two, either way round.
    """

    cells: int = 0
    kept: int = 0
    tokens: int = 0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    counts: float = 0.0
    matched_counts: float = 0.0
    unranked_counts: float = 0.0
    other_totals: int = 0
    greatest_ratio: float = 1.0

    def __iadd__(self, other: "Tally") -> "Tally":
        for item in fields(self):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if item.name == "left_out":
                self.left_out = {reason: mine[reason] + more[reason] for reason in REASONS}
            else:
                setattr(self, item.name, max(mine, more) if item.name == "greatest_ratio" else mine + more)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TokenBlock:
    """Tokens of some cells in the order of the file.

    Attributes
    ----------
    rows
        [cells] int64, the cells' rows in the file.
    tokens
        [tokens] uint16, or int32 for a vocabulary of more than 65,536.
    offsets
        [cells + 1] int64: the tokens of cell i lie at offsets[i] to offsets[i + 1].
    cell_ids
        [cells] names.
    columns
        Chosen columns that describe the cells.
    tally
        Sums over the cells of this block, those left out included.
    """

    rows: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    cell_ids: list[str]
    columns: pa.Table
    tally: Tally


@dataclass(frozen=True)
class FileGenes:
    """Genes of one file as the kernel takes them: slots are its genes with a token, in the order of gene ids.

    Attributes
    ----------
    match
        Tokens of the columns, and how they were found.
    slot_of_column
        [columns] int32; -1 without a token.
    token_of_slot, medians
        [slots]; NaN for a gene without a median.
    """

    match: GeneMatch
    slot_of_column: np.ndarray
    token_of_slot: np.ndarray
    medians: np.ndarray

    @property
    def unranked(self) -> np.ndarray:
        """Columns of genes that have a token but no median, [columns] bool."""
        return (self.slot_of_column >= 0) & np.isnan(self.medians[self.slot_of_column])


def match_genes(counts: CountsFile, gene_set: GeneSet) -> FileGenes:
    """Match the columns of a file to tokens.

    Raises
    ------
    DataError
        If no column has a token, or no token a median.
    """
    genes = _match(gene_set, tuple(counts.gene_ids.tolist()))
    genes.match.require(counts.path)
    if np.isnan(genes.medians).all():
        raise DataError(f"{counts.path}: none of its genes has a median in the gene set.")
    return genes


@lru_cache(maxsize=4)
def _match(gene_set: GeneSet, gene_ids: tuple[str, ...]) -> FileGenes:
    """Match gene ids once for all parts of a file, and for all files that have the same."""
    match = gene_set.match(list(gene_ids))
    known = np.unique(match.token_of_column[match.token_of_column >= 0])
    token_of_slot = known[np.argsort(np.array(gene_set.tokens, np.str_)[known], kind="stable")]
    slot_of_token = np.full(gene_set.vocab_size, -1, np.int32)
    slot_of_token[token_of_slot] = np.arange(len(token_of_slot), dtype=np.int32)
    slot_of_column = np.where(match.token_of_column >= 0, slot_of_token[match.token_of_column], -1)
    return FileGenes(match, slot_of_column.astype(np.int32), token_of_slot, gene_set.medians[token_of_slot])


def tokenize_blocks(
    counts: CountsFile,
    gene_set: GeneSet,
    *,
    n_counts_column: str | None = None,
    filter_column: str | None = None,
    columns: Sequence[str] = (),
    min_genes: int = 0,
    allow_low_match: bool = False,
    first: int = 0,
    last: int | None = None,
) -> Iterator[TokenBlock]:
    """Turn the rows `first` to `last` of a file into tokens, block by block.

    Parameters
    ----------
    n_counts_column
        Column with the total of each cell; by default the sum of its counts.
    filter_column
        Only cells with True or 1 in this column; by default `filter_pass` if there is one.
    columns
        Columns to carry along.
    min_genes
        Leave out cells with fewer genes that have a token and a median.
    allow_low_match
        Accept that genes with a token hold less than half of the counts read so far.

    Raises
    ------
    DataError
        Naming file and row, for values that are no counts, a total that is no positive number, a filter that is
        neither boolean nor numeric, or a column that does not exist; if too few counts are of genes in the gene set.
    """
    genes = match_genes(counts, gene_set)
    filter_column = filter_column_of(counts, filter_column)
    first_token, last_token = (gene_set.special_tokens.get(name, -1) for name in ("cls", "eos"))
    most_genes = gene_set.max_tokens - (first_token >= 0) - (last_token >= 0)
    read = np.zeros(3)
    token_type = np.uint16 if gene_set.vocab_size <= 1 << 16 else np.int32
    for block in counts.blocks(first, last):
        start, end = block.first_row, block.first_row + block.num_cells
        wanted = passing_cells(counts, filter_column, start, end)
        totals = np.empty(0) if n_counts_column is None else given_totals(counts, n_counts_column, start, end)
        tokens = np.empty(len(block.data) + 2 * block.num_cells, token_type)
        lengths, outcome = np.empty(block.num_cells, np.int32), np.empty(block.num_cells, np.int8)
        sums = np.empty((block.num_cells, 3))
        written = kernels.rank_cells(
            block.indptr,
            block.indices.astype(np.int32, copy=False),
            _as_float(block),
            wanted,
            totals,
            genes.slot_of_column,
            genes.medians,
            genes.token_of_slot,
            float(gene_set.target_sum),
            most_genes,
            min_genes,
            first_token,
            last_token,
            tokens,
            lengths,
            outcome,
            sums,
        )
        read += sums.sum(axis=0)
        if read[1] < MINIMUM_SHARE * read[0] and not allow_low_match:
            chosen = np.where(np.repeat(wanted, np.diff(block.indptr)), block.data, 0)
            genes.match.require(counts.path, np.bincount(block.indices, chosen, len(counts.gene_ids)))
        if np.any(outcome == kernels.BAD_TOTAL):
            row = int(np.argmax(outcome == kernels.BAD_TOTAL))
            raise DataError(
                f"{counts.path}: row {start + row} (cell {counts.cell_ids(start + row, start + row + 1)[0]}): "
                f"{n_counts_column} is {totals[row]:g}, not a positive total of its {sums[row, 0]:,.0f} counts; "
                "correct it, or leave --n-counts-column out to use the sum of the counts."
            )
        kept = outcome == kernels.KEPT
        ids = counts.cell_ids(start, end)
        yield TokenBlock(
            start + np.flatnonzero(kept),
            tokens[:written],
            np.concatenate([[0], np.cumsum(lengths[kept], dtype=np.int64)]),
            ids if kept.all() else [ids[i] for i in np.flatnonzero(kept)],
            counts.obs(columns, start, end).filter(pa.array(kept)) if columns else pa.table({}),
            _tally(outcome, sums, totals, written),
        )


def _as_float(block: CountsBlock) -> np.ndarray:
    """Return the values as float32 or float64, whichever holds them exactly."""
    data = block.data
    if data.dtype.kind == "f":
        return data
    return data.astype(np.float32 if data.dtype.itemsize <= 2 else np.float64)


def _tally(outcome: np.ndarray, sums: np.ndarray, totals: np.ndarray, tokens: int) -> Tally:
    tally = Tally(cells=len(outcome), kept=int(np.sum(outcome == kernels.KEPT)), tokens=tokens)
    tally.left_out = {reason: int(np.sum(outcome == code)) for reason, code in REASONS.items()}
    tally.counts, tally.matched_counts, tally.unranked_counts = (float(total) for total in sums.sum(axis=0))
    if len(totals):
        counted = sums[:, 0] > 0
        ratio = totals[counted] / sums[counted, 0]
        tally.other_totals = int(np.sum(np.abs(ratio - 1) > SAME_TOTAL))
        tally.greatest_ratio = float(np.max(np.maximum(ratio, 1 / ratio), initial=1.0))
    return tally
