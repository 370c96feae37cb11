"""Counts in memory with the interface of `tokenization.counts.CountsFile`, for tests of what reads them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import scipy.sparse as sp


@dataclass(frozen=True)
class MemoryBlock:
    first_row: int
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray


@dataclass
class MemoryCounts:
    path: Path
    matrix: sp.csr_matrix
    gene_ids: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)
    block_cells: int = 7

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def num_cells(self) -> int:
        return self.matrix.shape[0]

    @property
    def obs_columns(self) -> list[str]:
        return list(self.columns)

    def cell_ids(self, first: int, last: int) -> list[str]:
        return [f"cell-{row}" for row in range(first, last)]

    def obs(self, columns: Sequence[str], first: int, last: int) -> pa.Table:
        return pa.table({name: self.columns[name][first:last] for name in columns})

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[MemoryBlock]:
        last = self.num_cells if last is None else last
        for start in range(first, last, self.block_cells):
            end = min(start + self.block_cells, last)
            indptr = self.matrix.indptr[start : end + 1].astype(np.int64)
            rows = slice(indptr[0], indptr[-1])
            yield MemoryBlock(start, indptr - indptr[0], self.matrix.indices[rows], self.matrix.data[rows])


def ensembl(numbers: Sequence[int] | range, prefix: str = "ENSG") -> np.ndarray:
    """Ids that look like Ensembl's."""
    return np.array([f"{prefix}{number:011d}" for number in numbers])


def random_matrix(cells: int, genes: int, seed: int, density: float = 0.3) -> sp.csr_matrix:
    """Counts of different depths; some cells and genes may be empty."""
    generator = np.random.default_rng(seed)
    dense = generator.poisson(generator.lognormal(0, 1, genes), (cells, genes))
    dense[generator.random((cells, genes)) > density] = 0
    return sp.csr_matrix(dense.astype(np.float32))


def reference_medians(matrix: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Median of the non-zero count / total * 10,000 of each gene, the plain way in float64."""
    with np.errstate(invalid="ignore", divide="ignore"):
        values = matrix.astype(np.float64) / totals[:, None] * 10_000
    columns = (column[np.isfinite(column) & (column > 0)] for column in values.T)
    return np.array([np.median(column) if len(column) else np.nan for column in columns])
