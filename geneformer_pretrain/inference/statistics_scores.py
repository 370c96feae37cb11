"""Scores of in-silico perturbations, read in bounded memory, and the ranks that their tests need."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geneformer_pretrain.errors import DataError

BATCH_ROWS = 1 << 20
"""Scores read at a time."""

MAX_DISTINCT = 1 << 22
"""Distinct values that a pool keeps apart; 48 MB."""

LIKE_RANK = 10
"""Genes of like rank lie at most this many places, or a tenth of the rank if that is more, above or below."""

MIN_LIKE_RANK = 5
"""Other genes of like rank that a cell must have for a comparison with them."""

MIN_REPLICATES = 2
"""Replicates that scores need for statistics over replicates."""

TESTED_REPLICATES = 3
"""Replicates of a perturbation from which it gets a p-value: two that agree by chance have next to no spread."""

RANK_SPAN = 1 << 20
"""Distance between the sort keys of two cells, beyond any rank."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def score_files(scores: Path | Sequence[Path]) -> list[Path]:
    """List the score files: those given, or `part-*.parquet` of a folder in the order of their names.

    Raises
    ------
    DataError
        If there is none.
    """
    if isinstance(scores, Path):
        files = sorted(scores.glob("part-*.parquet")) if scores.is_dir() else [scores]
    else:
        files = list(scores)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: no such file; name the folder scores/ that perturb wrote.")
    if not files:
        raise DataError(f"{scores}: holds no part-*.parquet; name the folder scores/ that perturb wrote.")
    return files


def score_columns(files: Sequence[Path], states: Sequence[str] | None, replicates: str | None) -> list[str]:
    """Find the score columns, the most telling first, and check that every file has all columns.

    Parameters
    ----------
    states
        States whose shifts are wanted, the goal first; None for all that are there.
    replicates
        Column that names the replicate of each cell, if any.

    Returns
    -------
    list of str
        `shift_STATE` of the states, `cls_shift_STATE` where there are such, then the similarities.

    Raises
    ------
    DataError
        Naming the file and the column.
    """
    names = _columns(files[0])
    shifts = [name for name in names if name.startswith("shift_")]
    if states is not None:
        shifts = [f"shift_{state}" for state in states]
    shifts += [f"cls_{name}" for name in shifts if f"cls_{name}" in names]
    scores = shifts + [name for name in names if name.endswith("_similarity")]
    needed = ["cell", "perturbation", "rank", *scores, *([replicates] if replicates else [])]
    for file in files:
        columns = _columns(file)
        for name in needed:
            if name not in columns:
                raise DataError(f"{file}: has no column {name!r}; it has {', '.join(columns)}.")
    if not scores:
        raise DataError(f"{files[0]}: has no scores, neither *_similarity nor shift_*; it has {', '.join(names)}.")
    return scores


def _columns(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: cannot be read as parquet ({error}); remove it and run perturb again.") from error


class Codes:
    """Numbers for names, in the order in which they are first seen."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __call__(self, column: pa.ChunkedArray) -> IntArray:
        """Return the number of each name, -1 for null; new names get the next numbers."""
        encoded = column.combine_chunks().dictionary_encode()
        known = [self.numbers.setdefault(str(name), len(self.numbers)) for name in encoded.dictionary.to_pylist()]
        places = pc.fill_null(encoded.indices, len(known)).to_numpy()
        return np.array([*known, -1], np.int64)[places]


@dataclass
class Chunk:
    """Scores of whole cells, [n] each.

    Attributes
    ----------
    cell
        Number of the cell.
    perturbation, replicate
        Numbers of their names; replicate is -1 for cells without one, and None if none was asked for.
    rank
        Place of the gene before the perturbation, NaN if absent.
    scores
        [scores, n] values, NaN where a cell has no such score.
    """

    cell: IntArray
    perturbation: IntArray
    replicate: IntArray | None
    rank: FloatArray
    scores: FloatArray


class ScoreReader:
    """Reads score files, as often as needed, in chunks of whole cells.

    Perturb writes the scores of a cell one after the other. Where a file does not, a cell's scores may come in
    several chunks, and each of them is compared only with the others of its chunk.
    """

    def __init__(self, files: Sequence[Path], scores: Sequence[str], replicates: str | None) -> None:
        self.files, self.score_names, self.replicate_column = files, list(scores), replicates
        self.perturbations, self.replicates = Codes(), Codes()

    @property
    def num_rows(self) -> int:
        """Scores in all files."""
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks.

        Raises
        ------
        DataError
            A score that is not a number, naming file, row, cell and perturbation.
        """
        held: pa.Table | None = None
        for table in self._tables():
            if held is not None:
                table = pa.concat_tables([held, table])
            cells = table["cell"].to_numpy()
            differs = np.flatnonzero(cells != cells[-1])
            whole = int(differs[-1]) + 1 if len(differs) else 0
            if whole:
                yield self._chunk(table.slice(0, whole))
            held = table.slice(whole)
        if held is not None:
            yield self._chunk(held)

    def _tables(self) -> Iterator[pa.Table]:
        kinds = {"cell": pa.int64(), "perturbation": pa.string(), "rank": pa.float64()}
        kinds |= dict.fromkeys(self.score_names, pa.float64())
        if self.replicate_column:
            kinds.setdefault(self.replicate_column, pa.string())
        schema = pa.schema(list(kinds.items()))
        for file in self.files:
            row = 0
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=list(kinds)):
                # Files may differ in how they encode names and numbers.
                table = pa.Table.from_batches([batch]).select(list(kinds)).cast(schema)
                for name in self.score_names:
                    self._refuse_nan(table, name, file, row)
                row += len(table)
                if len(table):
                    yield table

    @staticmethod
    def _refuse_nan(table: pa.Table, name: str, file: Path, first_row: int) -> None:
        nan = pc.index(pc.is_nan(table[name]), True).as_py()
        if nan >= 0:
            cell, perturbation = table["cell"][nan].as_py(), table["perturbation"][nan].as_py()
            raise DataError(
                f"{file}, row {first_row + nan}: {name} of cell {cell}, perturbation {perturbation}, is not a number; "
                "look for weights of the model that are not finite, and run perturb again."
            )

    def _chunk(self, table: pa.Table) -> Chunk:
        replicate = self.replicates(table[self.replicate_column]) if self.replicate_column else None
        scores = np.stack([table[name].to_numpy() for name in self.score_names])
        perturbation = self.perturbations(table["perturbation"])
        return Chunk(table["cell"].to_numpy(), perturbation, replicate, table["rank"].to_numpy(), scores)


class MidRanks:
    """Ranks of values in a pool of any size, in bounded memory.

    The pool is kept as its distinct values, in single precision, with their counts. It is exact up to
    `max_distinct` of them; beyond, the last bits of all values are dropped until so many remain, and values that
    then coincide count as ties.
    """

    def __init__(self, max_distinct: int = MAX_DISTINCT) -> None:
        self.max_distinct, self.dropped_bits, self.size = max_distinct, 0, 0
        self._keys, self._counts = np.empty(0, np.uint32), np.empty(0, np.int64)
        self._waiting: list[NDArray[np.uint32]] = []
        self._waiting_size = 0
        self._mid: FloatArray | None = None

    @staticmethod
    def _ordered(values: FloatArray) -> NDArray[np.uint32]:
        """Map values to integers of the same order: the bits of a float, negative ones turned round."""
        bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))

    def add(self, values: FloatArray) -> None:
        """Add values to the pool; NaN is not one."""
        if not len(values):
            return
        self._waiting.append(self._ordered(values))
        self._waiting_size += len(values)
        self.size += len(values)
        self._mid = None
        if self._waiting_size >= self.max_distinct:
            self._merge()

    def _merge(self) -> None:
        new, new_counts = np.unique(np.concatenate(self._waiting) >> np.uint32(self.dropped_bits), return_counts=True)
        self._waiting, self._waiting_size = [], 0
        self._set(np.concatenate([self._keys, new]), np.concatenate([self._counts, new_counts]))
        while len(self._keys) > self.max_distinct:
            self.dropped_bits += 1
            self._set(self._keys >> np.uint32(1), self._counts)

    def _set(self, keys: NDArray[np.uint32], counts: IntArray) -> None:
        order = np.argsort(keys, kind="stable")  # two sorted runs: one merge
        keys = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys, self._counts = keys[starts], np.add.reduceat(counts[order], starts)

    def __call__(self, values: FloatArray) -> FloatArray:
        """Return, for values of the pool, how many of the pool are smaller, plus half of those that are equal."""
        if self._waiting:
            self._merge()
        if self._mid is None:
            self._mid = np.cumsum(self._counts) - self._counts / 2
        return self._mid[np.searchsorted(self._keys, self._ordered(values) >> np.uint32(self.dropped_bits))]


def like_rank_means(chunk: Chunk) -> FloatArray:
    """Average, for each score, the scores of the other genes of like rank in the same cell.

    Returns
    -------
    array
        [scores, n]; NaN where the gene has no rank or fewer than `MIN_LIKE_RANK` others are of like rank.
    """
    result = np.full(chunk.scores.shape, np.nan)
    ranked = np.flatnonzero(~np.isnan(chunk.rank))
    rank = chunk.rank[ranked].astype(np.int64)
    key = np.unique(chunk.cell[ranked], return_inverse=True)[1] * RANK_SPAN + rank
    order = np.argsort(key, kind="stable")
    ranked, key = ranked[order], key[order]
    reach = np.maximum(LIKE_RANK, rank[order] // 10)
    first, last = np.searchsorted(key, key - reach), np.searchsorted(key, key + reach, side="right")
    for score, values in enumerate(chunk.scores[:, ranked]):
        there = ~np.isnan(values)
        centre = values[there].mean() if there.any() else 0.0  # keeps the running sum small
        centred = np.where(there, values - centre, 0.0)
        sums, counts = np.concatenate([[0], np.cumsum(centred)]), np.concatenate([[0], np.cumsum(there)])
        others = counts[last] - counts[first] - there
        enough = others >= MIN_LIKE_RANK
        means = (sums[last] - sums[first] - centred)[enough] / others[enough] + centre
        result[score, ranked[enough]] = means
    return result
