"""Passes over counts from which a new gene set gets its genes and medians."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_pretrain.console import Progress
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.cell_columns import filter_column_of, given_totals, passing_cells
from geneformer_pretrain.tokenization.counted_genes import CountedGenes, Source
from geneformer_pretrain.tokenization.gene_ids import GeneIndex, GeneMatch, canonical
from geneformer_pretrain.tokenization.gene_set import TARGET_SUM, is_special
from geneformer_pretrain.tokenization.gene_table import GeneTable
from geneformer_pretrain.tokenization.medians import CellBlock, Columns, ExactMedians, MedianSketch, groups, sum_cells

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.counts import CountsBlock, CountsFile

MOST_EXACT_VALUES = 1 << 27
"""Values that a further pass for exact medians may hold, 1 GiB; more genes than that are left to another pass."""
FEWEST_SHARED = 0.1
"""A file of which a smaller share of the genes is in the files before it has ids of another kind or species."""

Add = Callable[[CellBlock, Columns, float], None]


@dataclass(frozen=True, eq=False)
class Counted:
    """Result of the first pass.

    Attributes
    ----------
    genes
        Genes and their values in bins.
    gene_counts
        Sum of the counts of each gene, float64 [genes].
    match, column_counts
        Match of the file in which these genes hold the least share of the counts, and the sum of the counts of each
        of its columns.
    summed
        File with the most columns of genes that have several, and `GeneMatch.summed` of it; None if there is none.
    strange
        First file with hardly a gene of the files before it, the number of those genes, and that of all its genes.
        None if there is none, or genes were chosen.
    """

    genes: CountedGenes
    gene_counts: np.ndarray
    match: GeneMatch
    column_counts: np.ndarray
    summed: tuple[Path, dict[str, Any]] | None
    strange: tuple[Path, int, int] | None


@dataclass(frozen=True)
class GeneSetBuilder:
    """Counts the values of genes over files.

    Attributes
    ----------
    open_counts
        Opens one file; called with its path.
    paths
        Files of counts.
    genes
        Genes to count; None: all genes of the files.
    n_counts_column
        Column with the total of each cell; None: the sum of its counts over all genes of the file.
    filter_column
        Only cells with True or 1 in this column; None: `filter_pass` where a file has it.
    allow_low_match
        Accept files in which genes of the set hold less than half of the counts.
    """

    open_counts: "Callable[[Path], CountsFile]"
    paths: Sequence[Path]
    genes: GeneTable | None = None
    n_counts_column: str | None = None
    filter_column: str | None = None
    allow_low_match: bool = False

    def count(self) -> "Counted":
        """Count in one pass.

        Raises
        ------
        DataError
            Naming file and row or gene, for a file without a gene of the set, or a total that is none.
        """
        genes, num_cells, strange = self._survey()
        sketch = MedianSketch.empty(len(genes.gene_ids))
        gene_counts = np.zeros(len(genes.gene_ids))
        sources: list[Source] = []
        worst: tuple[GeneMatch, np.ndarray] | None = None
        summed: tuple[Path, dict[str, Any]] | None = None
        for source, match, columns in self._read(genes, sketch.add, "count genes", num_cells):
            match.require(source.file, columns.counts, allow_low_match=self.allow_low_match)
            sources.append(source)
            known = match.token_of_column >= 0
            np.add.at(gene_counts, match.token_of_column[known], columns.counts[known])
            if columns.counts.any() and (
                worst is None or match.share_of_counts(columns.counts) < worst[0].share_of_counts(worst[1])
            ):
                worst = match, columns.counts
            if match.summed is not None and (summed is None or match.summed["columns"] > summed[1]["columns"]):
                summed = Path(source.file), match.summed
        if worst is None:
            raise DataError(f"{self.paths[0]}: no cell that passes has counts.")
        counted = CountedGenes(genes.gene_ids, genes.symbols, sketch, self._rule(genes), sources)
        return Counted(counted, gene_counts, *worst, summed, strange)

    def exact_medians(self, counted: CountedGenes) -> np.ndarray:
        """Return the exact medians in a second pass, float64 [genes].

        Values are held in memory, 1 GiB at most: a small part of all, for only those near the median are needed. If
        they are more, genes are divided over further passes.
        """
        genes = GeneTable(counted.gene_ids, counted.symbols)
        cells = sum(source.cells for source in counted.sources)
        medians = []
        ranges = groups(counted.sketch, MOST_EXACT_VALUES)
        for number, (first, last) in enumerate(ranges, start=1):
            exact = ExactMedians(counted.sketch, first, last)
            for _ in self._read(genes, exact.add, f"exact medians, pass {number} of {len(ranges)}", cells):
                pass
            medians.append(exact.medians())
        return np.concatenate(medians)

    def _rule(self, genes: GeneTable) -> dict[str, Any]:
        chosen = "all genes of the files"
        if self.genes is not None:
            digest = hashlib.sha256("\n".join(sorted(genes.gene_ids)).encode()).hexdigest()
            chosen = f"{len(genes.gene_ids):,} given genes, {digest[:12]}"
        return {"genes": chosen, "target_sum": float(TARGET_SUM)}

    def _survey(self) -> tuple[GeneTable, int, tuple[Path, int, int] | None]:
        """Look into every file before the first is read: collect the genes, and refuse what cannot work.

        Returns
        -------
            The genes, the number of cells, and `Counted.strange`.
        """
        all_ids: dict[str, None] = {}
        num_cells = 0
        strange = None
        index = None if self.genes is None else GeneIndex(self.genes.gene_ids, self.genes.symbols, {})
        for path in self.paths:
            with self.open_counts(path) as counts:
                num_cells += counts.num_cells
                if index is not None:
                    index.match(counts.gene_ids).require(path)
                else:
                    ids = dict.fromkeys(_usable_ids(path, counts.gene_ids.tolist()))
                    shared = len(ids.keys() & all_ids.keys())
                    if all_ids and strange is None and shared < FEWEST_SHARED * len(ids):
                        strange = path, shared, len(ids)
                    all_ids.update(ids)
        if self.genes is not None:
            return self.genes, num_cells, None
        return GeneTable(list(all_ids), [None] * len(all_ids)), num_cells, strange

    def _read(
        self, genes: GeneTable, add: Add, description: str, num_cells: int
    ) -> Iterator[tuple[Source, GeneMatch, Columns]]:
        """Read all files and give their blocks to `add`, which works on one while the next is read."""
        index = GeneIndex(genes.gene_ids, genes.symbols, {})
        with Progress(num_cells, description, "cell") as progress, ThreadPoolExecutor(1) as worker:
            for path in self.paths:
                with self.open_counts(path) as counts:
                    match = index.match(counts.gene_ids)
                    columns = Columns.create(match.token_of_column)
                    counted, running = 0, None
                    for block in counts.blocks():
                        scaled = self._scale(counts, block)
                        _wait(running)
                        running = worker.submit(add, scaled, columns, float(TARGET_SUM))
                        counted += int(np.count_nonzero(scaled.totals))
                        progress.advance(len(scaled.totals))
                    _wait(running)
                    total = float(columns.counts.sum())
                    matched = float(columns.counts[match.token_of_column >= 0].sum())
                    source = Source(
                        file=str(path.resolve()),
                        cells=counts.num_cells,
                        counted_cells=counted,
                        counts=total,
                        matched_counts=matched,
                        n_counts_column=self.n_counts_column,
                        filter_column=filter_column_of(counts, self.filter_column),
                    )
                    yield source, match, columns

    def _scale(self, counts: "CountsFile", block: "CountsBlock") -> CellBlock:
        first, last = block.first_row, block.first_row + len(block.indptr) - 1
        kept = passing_cells(counts, filter_column_of(counts, self.filter_column), first, last)
        sums = np.empty(last - first)
        sum_cells(block.indptr, block.data, kept, sums)
        totals = sums
        if self.n_counts_column is not None:
            given = given_totals(counts, self.n_counts_column, first, last)
            totals = np.where(sums > 0, given, 0.0)
            if len(bad := np.flatnonzero((sums > 0) & ~((given > 0) & np.isfinite(given)))):
                row = first + int(bad[0])
                raise DataError(
                    f"{counts.path}: row {row} (cell {counts.cell_ids(row, row + 1)[0]}): {self.n_counts_column} is "
                    f"{given[bad[0]]:g}, not a positive total of its {sums[bad[0]]:,.0f} counts; correct it, or leave "
                    "--n-counts-column out to use the sum of the counts."
                )
        return CellBlock(block.indptr, block.indices, block.data, totals)


def _wait(running: "Future[None] | None") -> None:
    if running is not None:
        running.result()


def _usable_ids(path: Path, gene_ids: list[str]) -> list[str]:
    """Return the ids of a file's genes as a gene set lists them.

    Raises
    ------
    DataError
        If they are only row numbers, or one has spaces or angle brackets.
    """
    if not gene_ids:
        raise DataError(f"{path}: no genes.")
    if gene_ids == [str(number) for number in range(len(gene_ids))]:
        raise DataError(f"{path}: gene ids are only row numbers; name the column that holds ids with --gene-id-column.")
    ids = [canonical(gene_id) for gene_id in gene_ids if gene_id]
    for gene_id in ids:
        if gene_id.split() != [gene_id] or is_special(gene_id):
            raise DataError(f"{path}: {gene_id!r} cannot be the id of a gene; choose genes with --genes.")
    if not ids:
        raise DataError(f"{path}: no gene has an id; name the column that holds them with --gene-id-column.")
    return ids
