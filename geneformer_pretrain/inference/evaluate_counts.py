"""Counts of chosen cells, as one sparse matrix, for the baseline of an evaluation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from geneformer_pretrain.data.sources import read_description
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.cells import CountsOptions
from geneformer_pretrain.tokenization.cell_columns import given_totals
from geneformer_pretrain.tokenization.counts import CountsFile, find_counts, open_counts
from geneformer_pretrain.tokenization.gene_ids import canonical
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.tokenizer import tokenize_blocks

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Counts of some cells.

    Attributes
    ----------
    matrix
        [cells, genes].
    totals
        What the counts of each cell are divided by, float64 [cells].
    """

    matrix: sparse.csr_array
    totals: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Cells whose counts are looked for.

    Attributes
    ----------
    ids
        Names of the cells.
    numbers
        Their numbers among `all_ids`, int64 [cells].
    all_ids
        Reads the names of all cells that were tokenized, in their order.
    """

    ids: Sequence[str]
    numbers: IntArray
    all_ids: Callable[[], Sequence[str]]


def options_of_corpus(corpus: str | Path, given: CountsOptions) -> CountsOptions:
    """Return the options that a corpus was tokenized with, from its `corpus.json`; those given now go first."""
    folder = Path(corpus)
    description = read_description(folder) if folder.is_dir() else None
    content = {} if description is None else description.content
    while "rule" not in content and "split" in content:  # a part made by `split` holds the corpus it is of
        content = content["split"]["corpus"]
    rule = content.get("rule", {})
    values = {
        field.name: rule.get(field.name, field.default) if value == field.default else value
        for field in fields(given)
        for value in [getattr(given, field.name)]
    }
    return CountsOptions(**values)


def counts_of_cells(
    paths: Sequence[str | Path], wanted: Wanted, gene_set: GeneSet, options: CountsOptions
) -> CellCounts:
    """Read the counts of cells.

    Cells are found by their ids. Where an id stands in several rows, rows that `tokenize` leaves out with these options
    do not count; if there are several still, all rows that it keeps have to be the tokenized cells, in their order.
    Genes are matched between files by their ids; a gene that a file lacks counts 0 there.

    Parameters
    ----------
    paths
        Files, folders or globs of counts.
    wanted
        The cells.
    gene_set, options
        What the cells were tokenized with; a column of totals replaces the sums of the counts.

    Raises
    ------
    DataError
        A cell that is in no file, or in several places.
    """
    open_file = partial(
        open_counts,
        gene_id_column=options.gene_id_column,
        layer=options.layer,
        raw=options.raw,
        allow_noninteger=options.allow_noninteger,
    )
    files = find_counts(paths)
    columns: dict[str, int] = {}
    totals = np.empty(len(wanted.ids))
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for path, rows in zip(files, _find_rows(files, open_file, wanted, gene_set, options), strict=True):
        if (rows < 0).all():
            continue
        with open_file(path) as counts:
            parts.extend(_entries(counts, rows, columns))
            if options.n_counts_column is not None:
                given = given_totals(counts, options.n_counts_column, 0, counts.num_cells)
                totals[rows[rows >= 0]] = given[rows >= 0]
    cells, genes, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    matrix = sparse.csr_array(sparse.coo_array((values, (cells, genes)), shape=(len(totals), len(columns))))
    return CellCounts(matrix, matrix.sum(axis=1) if options.n_counts_column is None else totals)


def _find_rows(
    files: Sequence[Path],
    open_file: "partial[CountsFile]",
    wanted: Wanted,
    gene_set: GeneSet,
    options: CountsOptions,
) -> list[IntArray]:
    """Number of the wanted cell in each row of each file, or -1; int64 [rows] a file."""
    place_of = {name: place for place, name in enumerate(wanted.ids)}
    found = np.zeros(len(wanted.ids), np.int64)
    rows_of_file = []
    for path in files:
        with open_file(path) as counts:
            names = counts.cell_ids(0, counts.num_cells)
        rows_of_file.append(np.array([place_of.get(name, -1) for name in names], np.int64))
        np.add.at(found, rows_of_file[-1][rows_of_file[-1] >= 0], 1)
    if (found == 1).all():
        return rows_of_file
    if (missing := np.flatnonzero([found[place_of[name]] == 0 for name in wanted.ids])).size:
        raise DataError(
            f"--counts: cell {wanted.ids[missing[0]]!r} is in none of the files; name those that the cells come from."
        )
    return _rows_that_tokenize_keeps(files, open_file, wanted, gene_set, options)


def _rows_that_tokenize_keeps(
    files: Sequence[Path],
    open_file: "partial[CountsFile]",
    wanted: Wanted,
    gene_set: GeneSet,
    options: CountsOptions,
) -> list[IntArray]:
    """Do the work of `_find_rows` where ids occur several times."""
    rows_of_file, kept = [], []
    for number, path in enumerate(files):
        with open_file(path) as counts:
            rows_of_file.append(np.full(counts.num_cells, -1, np.int64))
            kept += [(number, row, name) for row, name in _kept(counts, gene_set, options)]
    names = [name for _, _, name in kept]
    if names == list(wanted.all_ids()):
        chosen = [kept[number] for number in wanted.numbers.tolist()]
    else:
        occurring, times = Counter(names), Counter(wanted.ids)
        if (name := next((name for name in wanted.ids if not occurring[name] == times[name] == 1), None)) is not None:
            raise DataError(
                f"--counts: cell {name!r} is there {occurring[name]} times, and among the cells {times[name]} times; "
                "name exactly the files that the cells come from, in the order in which they were tokenized."
            )
        by_name = {name: (file, row, name) for file, row, name in kept}
        chosen = [by_name[name] for name in wanted.ids]
    for place, (file, row, _) in enumerate(chosen):
        rows_of_file[file][row] = place
    return rows_of_file


def _kept(counts: CountsFile, gene_set: GeneSet, options: CountsOptions) -> Iterator[tuple[int, str]]:
    """Yield row and name of the cells of a file that `tokenize` keeps."""
    for block in tokenize_blocks(
        counts,
        gene_set,
        n_counts_column=options.n_counts_column,
        filter_column=options.filter_column,
        min_genes=options.min_genes,
        allow_low_match=options.allow_low_match,
    ):
        yield from zip(block.rows.tolist(), block.cell_ids, strict=True)


def _entries(
    counts: CountsFile, rows: IntArray, columns: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (cell, gene, count) of the wanted rows of a file, block by block."""
    names = [canonical(gene) for gene in counts.gene_ids.tolist()]
    column_of = np.array([columns.setdefault(name, len(columns)) for name in names], np.int64)
    for block in counts.blocks():
        row = np.repeat(rows[block.first_row :][: len(block.indptr) - 1], np.diff(block.indptr))
        kept = row >= 0
        yield row[kept], column_of[block.indices[kept]], block.data[kept].astype(np.float64)
