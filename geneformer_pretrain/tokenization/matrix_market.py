"""Matrix Market files as 10x writes them: one line of text an entry, gzipped or not."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.transposed import Entries

BLOCK_BYTES = 32 << 20
"""Text parsed at a time."""


def _find(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find_matrix_market(folder: Path) -> Path | None:
    """Return matrix.mtx or matrix.mtx.gz of a folder, if there is one."""
    return _find(folder, "matrix.mtx", "matrix.mtx.gz")


def open_tsv(folder: Path, *stems: str) -> list[list[str]]:
    """Read the columns of STEM.tsv or STEM.tsv.gz, the first that is there.

    Raises
    ------
    DataError
        If none is there, or its lines differ in their number of columns.
    """
    path = _find(folder, *(f"{stem}.tsv{end}" for stem in stems for end in ("", ".gz")))
    if path is None:
        raise DataError(f"{folder}: {' or '.join(f'{stem}.tsv' for stem in stems)} is missing beside matrix.mtx.")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    widths = {len(line) for line in lines}
    if len(widths) != 1:
        number = next((i for i, line in enumerate(lines, 1) if len(line) != len(lines[0])), 0)
        raise DataError(f"{path}: line {number} has another number of columns than the first; get a new copy.")
    return [list(column) for column in zip(*lines, strict=True)]


class MatrixMarket:
    """Entries of a Matrix Market file, genes x cells as 10x has it, or cells x genes.

    Raises
    ------
    DataError
        If the header is not that of a list of numbers, or its sizes fit neither way.
    """

    def __init__(self, folder: Path, *, num_cells: int, num_genes: int) -> None:
        path = find_matrix_market(folder)
        assert path is not None
        self._path, self.num_cells, self.num_genes = path, num_cells, num_genes
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            self._header_lines, words = 1, file.readline().lower().split()
            if words[:3] != ["%%matrixmarket", "matrix", "coordinate"] or words[3:] not in (
                ["integer", "general"],
                ["real", "general"],
            ):
                raise DataError(f"{path}: line 1 is not '%%MatrixMarket matrix coordinate integer general'.")
            self._whole = words[3] == "integer"
            for line in file:
                self._header_lines += 1
                if not line.startswith("%"):
                    break
        sizes = [int(word) for word in line.split()]
        if sizes[:2] not in ([num_genes, num_cells], [num_cells, num_genes]) or len(sizes) != 3:
            raise DataError(
                f"{path}: its size is {' x '.join(map(str, sizes[:2]))}, but there are {amount(num_genes, 'feature')} "
                f"and {amount(num_cells, 'barcode')}; the files belong to different runs."
            )
        self._genes_first, self._num_entries = sizes[:2] == [num_genes, num_cells], sizes[2]
        self.dtype = np.dtype(np.int32 if self._whole else np.float32)

    def rows(self) -> Iterator[np.ndarray]:
        """Yield the row of each entry."""
        for rows, _, _ in self.entries():
            yield rows

    def entries(self) -> Iterator[Entries]:
        """Yield all entries."""
        value_type = pa.int32() if self._whole else pa.float32()
        names = ["gene", "cell", "count"] if self._genes_first else ["cell", "gene", "count"]
        seen = 0
        with pa.input_stream(str(self._path)) as stream:
            reader = pacsv.open_csv(
                stream,
                read_options=pacsv.ReadOptions(
                    column_names=names, skip_rows=self._header_lines, block_size=BLOCK_BYTES, use_threads=False
                ),
                parse_options=pacsv.ParseOptions(delimiter=" "),
                convert_options=pacsv.ConvertOptions(
                    column_types={"gene": pa.int32(), "cell": pa.int32(), "count": value_type}
                ),
            )
            for batch in reader:
                seen += batch.num_rows
                cells, genes, counts = (batch.column(name).to_numpy() for name in ("cell", "gene", "count"))
                yield cells - 1, genes - 1, counts
        if seen != self._num_entries:
            raise DataError(
                f"{self._path}: {amount(seen, 'entry', 'entries')} instead of {self._num_entries:,}; get a new copy."
            )
