"""Counts of chosen cells, as one sparse matrix, for the baseline of an evaluation."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from geneformer_pretrain.data.sources import read_description
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.evaluate import token_presence
from geneformer_pretrain.tokenization.cell_columns import given_totals
from geneformer_pretrain.tokenization.counts import CountsBlock, CountsFile, find_counts, open_counts
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
    tokens, offsets
        Tokens of cell i are `tokens[offsets[i]:offsets[i + 1]]`.
    """

    ids: Sequence[str]
    numbers: IntArray
    all_ids: Callable[[], Sequence[str]]
    tokens: np.ndarray
    offsets: IntArray

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """Places of the cells that have a name."""
        found: dict[str, list[int]] = {}
        for place, name in enumerate(self.ids):
            found.setdefault(name, []).append(place)
        return found

    def genes(self, gene_set: GeneSet) -> sparse.csr_array:
        """Matrix [cells, V] that has 1 where a cell's tokens hold a gene."""
        presence = token_presence(self.tokens, self.offsets, gene_set.vocab_size).tocoo()
        is_gene = presence.col >= gene_set.num_special_tokens
        return _ones(presence.row[is_gene], presence.col[is_gene], presence.shape)


@dataclass(eq=False)
class _Rows:
    """Rows of the files that may be wanted cells: their names are, and they have counts of all genes of the tokens.

    Attributes
    ----------
    numbers
        Number of each row, by file and row.
    of_cell
        Numbers of the rows that each wanted cell may be.
    totals
        What `--n-counts-column` says of each row.
    with_name
        Rows of each name, whatever genes they have.
    columns
        Columns of the matrix by the genes' ids.
    entries
        Arrays of numbers, columns and counts.
    """

    of_cell: list[list[int]]
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    totals: list[float] = field(default_factory=list)
    with_name: Counter[str] = field(default_factory=Counter)
    columns: dict[str, int] = field(default_factory=dict)
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def matrix(self) -> sparse.csr_array:
        """Counts, float64 [rows, genes]."""
        rows, columns, counts = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        return sparse.csr_array(
            sparse.coo_array((counts, (rows, columns)), shape=(len(self.numbers), len(self.columns)))
        )


def options_of_corpus(corpus: str | Path, given: CountsOptions) -> CountsOptions:
    """Return the options that a corpus was tokenized with, from its `corpus.json`; those given now go first.

    Files of a corpus, or a pattern for them, are of the one whose folder they lie in.
    """
    folder = Path(corpus) if Path(corpus).is_dir() else Path(corpus).parent
    description = read_description(folder)
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

    A cell's row has its id, and counts of all genes among its tokens. Where several rows do, those that `tokenize`
    leaves out with these options are no candidates; if there are several still, all rows that it keeps have to be the
    tokenized cells, in their order. Genes are matched between files by their ids; a gene that a file lacks counts 0.

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
    found = _Rows([[] for _ in wanted.ids])
    genes = wanted.genes(gene_set)
    for number, path in enumerate(files):
        with open_file(path) as counts:
            _read_rows(found, number, counts, wanted, genes, gene_set, options)
    _require_rows(found, wanted)
    several = [place for place, rows in enumerate(found.of_cell) if len(rows) > 1]
    if several:
        kept = []
        for number, path in enumerate(files):
            with open_file(path) as counts:
                kept += [(name, found.numbers.get((number, row))) for row, name in _kept(counts, gene_set, options)]
        _choose(found, several, kept, wanted)
    chosen = [rows[0] for rows in found.of_cell]
    matrix = found.matrix()[chosen]
    return CellCounts(matrix, matrix.sum(axis=1) if options.n_counts_column is None else np.array(found.totals)[chosen])


def _read_rows(
    found: _Rows,
    number: int,
    counts: CountsFile,
    wanted: Wanted,
    genes: sparse.csr_array,
    gene_set: GeneSet,
    options: CountsOptions,
) -> None:
    """Add the rows of a file that may be wanted cells."""
    names = [canonical(gene) for gene in counts.gene_ids.tolist()]
    column_of = np.array([found.columns.setdefault(name, len(found.columns)) for name in names], np.int64)
    token_of = gene_set.match(counts.gene_ids.tolist()).token_of_column
    for block in counts.blocks():
        first, last = block.first_row, block.first_row + block.num_cells
        ids = counts.cell_ids(first, last)
        found.with_name.update(name for name in ids if name in wanted.places)
        pairs = np.array([(row, place) for row, name in enumerate(ids) for place in wanted.places.get(name, ())])
        pairs = pairs.reshape(-1, 2)
        pairs = pairs[_have_genes(block, token_of, pairs[:, 0], genes[pairs[:, 1]])]
        rows = np.unique(pairs[:, 0])
        number_of = np.full(block.num_cells, -1, np.int64)
        number_of[rows] = len(found.numbers) + np.arange(len(rows))
        found.numbers.update(((number, first + row), int(number_of[row])) for row in rows.tolist())
        for row, place in pairs.tolist():
            found.of_cell[place].append(int(number_of[row]))
        if options.n_counts_column is not None and len(rows):
            found.totals += given_totals(counts, options.n_counts_column, first, last)[rows].tolist()
        row_number = np.repeat(number_of, np.diff(block.indptr))
        used = row_number >= 0
        found.entries.append((row_number[used], column_of[block.indices[used]], block.data[used].astype(np.float64)))


def _have_genes(block: CountsBlock, token_of: np.ndarray, rows: IntArray, genes: sparse.csr_array) -> NDArray[np.bool_]:
    """True where row `rows[i]` of a block has counts of all genes that are 1 in row i of `genes`, [n, V]."""
    row, token = np.repeat(np.arange(block.num_cells), np.diff(block.indptr)), token_of[block.indices]
    counted = (token >= 0) & (block.data != 0)
    there = _ones(row[counted], token[counted], (block.num_cells, genes.shape[1]))
    return np.asarray(genes.multiply(there[rows]).sum(axis=1) == genes.sum(axis=1))


def _ones(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_array:
    """Make a matrix that has 1 at these places, which may repeat."""
    matrix = sparse.csr_array(sparse.coo_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape))
    matrix.data[:] = 1
    return matrix


def _require_rows(found: _Rows, wanted: Wanted) -> None:
    """Raise DataError for a cell without a row, and if cells of the same name come from files that are not named."""
    tokenized = Counter(name for name in wanted.all_ids() if name in wanted.places)
    for name, rows in zip(wanted.ids, found.of_cell, strict=True):
        there = found.with_name[name]
        if not there:
            raise DataError(f"--counts: cell {name!r} is in none of the files; name those that the cells come from.")
        if there < tokenized[name]:
            raise DataError(
                f"--counts: {tokenized[name]} cells of the corpus are called {name!r}, and {there} in the files; name "
                "all files that were tokenized."
            )
        if not rows:
            raise DataError(
                f"--counts: cell {name!r} of the files has no counts of some genes that are among its tokens; name the "
                "files that the cells come from, and the options of `tokenize` (--counts-layer, --raw)."
            )


def _choose(found: _Rows, several: list[int], kept: list[tuple[str, int | None]], wanted: Wanted) -> None:
    """Choose one of the rows that a cell may be, for each cell in `several`.

    Parameters
    ----------
    kept
        Name and number of each row that `tokenize` keeps.
    """
    in_order = [name for name, _ in kept] == list(wanted.all_ids()) and all(
        kept[number][1] in rows for number, rows in zip(wanted.numbers.tolist(), found.of_cell, strict=True)
    )
    numbers = {number for _, number in kept}
    for place in several:
        rows = [row for row in found.of_cell[place] if row in numbers]
        if in_order:
            rows = [row for row in rows if row == kept[wanted.numbers[place]][1]]
        if len(rows) != 1:
            raise DataError(
                f"--counts: {len(rows) or 'none'} of the {len(found.of_cell[place])} rows that may be cell "
                f"{wanted.ids[place]!r} are of the corpus; name exactly the files that were tokenized, in their order, "
                "or give each cell an id of its own and tokenize again."
            )
        found.of_cell[place] = rows


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
