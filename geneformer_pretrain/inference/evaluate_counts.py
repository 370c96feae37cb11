"""Counts of chosen cells, as one sparse matrix, for the baseline of an evaluation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.cells import CountsOptions
from geneformer_pretrain.tokenization.counts import CountsFile, find_counts, open_counts


def counts_of_cells(paths: Sequence[str | Path], cell_ids: Sequence[str], options: CountsOptions) -> sparse.csr_array:
    """Read the counts of the named cells, [cells, genes], in their order.

    Genes are matched between files by their ids; a gene that a file lacks counts 0 there.

    Parameters
    ----------
    paths
        Files, folders or globs of counts.
    cell_ids
        Names of the cells.
    options
        Where counts are in their files.

    Raises
    ------
    DataError
        A cell that is in no file, or in several places.
    """
    wanted = {name: row for row, name in enumerate(cell_ids)}
    if len(wanted) < len(cell_ids):
        raise DataError("--counts: some ids of the cells occur twice, so their counts cannot be found; leave it out.")
    columns: dict[str, int] = {}
    found = np.zeros(len(cell_ids), np.int64)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for path in find_counts(paths):
        with open_counts(path, gene_id_column=options.gene_id_column, layer=options.layer, raw=options.raw) as counts:
            rows = np.array([wanted.get(name, -1) for name in counts.cell_ids(0, counts.num_cells)], np.int64)
            np.add.at(found, rows[rows >= 0], 1)
            parts.extend(_entries(counts, rows, columns))
    if (found != 1).any():
        row = int(np.flatnonzero(found != 1)[0])
        where = "in none of the files" if found[row] == 0 else f"there {found[row]} times"
        raise DataError(f"--counts: cell {cell_ids[row]!r} is {where}; name the files that the cells come from, once.")
    cells, genes, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    shape = len(cell_ids), len(columns)
    return sparse.csr_array(sparse.coo_array((values, (cells, genes)), shape=shape))


def _entries(
    counts: CountsFile, rows: np.ndarray, columns: dict[str, int]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read (cell, gene, count) of the wanted rows of a file, block by block."""
    column_of = np.array([columns.setdefault(gene, len(columns)) for gene in counts.gene_ids.tolist()], np.int64)
    entries = []
    for block in counts.blocks():
        row = np.repeat(rows[block.first_row :][: len(block.indptr) - 1], np.diff(block.indptr))
        kept = row >= 0
        entries.append((row[kept], column_of[block.indices[kept]], block.data[kept].astype(np.float64)))
    return entries
