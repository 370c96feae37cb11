"""Counts of genes in cells: finds files, opens any of the formats, and reads checked blocks of rows.

Formats are known by their content: AnnData (h5ad and zarr, every encoding), 10x (HDF5 and Matrix Market folders) and
loom. Nothing is read whole: memory stays the same however many cells a file has.
"""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from geneformer_pretrain.console import amount, say
from geneformer_pretrain.errors import ConfigError, DataError, require
from geneformer_pretrain.tokenization.checks import check_values, counts_elsewhere, describe_logarithms
from geneformer_pretrain.tokenization.formats import Opened, is_counts_folder, open_format
from geneformer_pretrain.tokenization.matrices import CountsBlock, require_columns
from geneformer_pretrain.tokenization.transposed import Transposed

__all__ = ["CountsBlock", "CountsFile", "file_state", "find_counts", "open_counts"]

SUFFIXES = (".h5ad", ".h5", ".hdf5", ".loom")
"""Names of files that a folder is searched for, beside zarr and Matrix Market folders."""


_LOOKED_INTO: set[Path] = set()
"""Files with values that are not whole that were looked into for logarithms."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing, where all else is reading."""


def find_counts(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Find files of counts.

    Parameters
    ----------
    paths
        Files, folders (searched at any depth; a zarr or 10x folder is one file of counts) and patterns with `*`.
        The order given is kept; what a folder or a pattern holds comes in the order of names.

    Raises
    ------
    DataError
        If one does not exist, holds nothing, or is given twice.
    """
    found: list[Path] = []
    for path_given in paths:
        given = os.fspath(path_given)
        path = Path(given)
        if path.is_dir() and not is_counts_folder(path):
            inside = list(_search(path))
            if not inside and (path / "gene_set.json").is_file():
                raise DataError(
                    f"{path}: holds a gene set and no cells; name counts, or, to embed, perturb or evaluate, a corpus "
                    "that `tokenize` wrote."
                )
            if not inside:
                raise DataError(f"{path}: no counts in this folder ({', '.join(SUFFIXES)}, zarr or matrix.mtx).")
            found += inside
        elif path.exists():
            found.append(path)
        elif glob.has_magic(given) and (matching := sorted(glob.glob(given, recursive=True))):
            found += map(Path, matching)
        else:
            raise DataError(f"{given}: no such file or folder.")
    seen: set[Path] = set()
    for path in found:
        if (real := path.resolve()) in seen:
            raise DataError(f"{path}: given twice; its cells would be doubled.")
        seen.add(real)
    return found


def _search(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not is_counts_folder(path):
            yield from _search(path)
        elif path.is_dir() or path.suffix in SUFFIXES:
            yield path


def file_state(path: Path) -> dict[str, int]:
    """Return size, time of the last change and number of files of a file or folder, to notice a change."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]
    return {
        "bytes": sum(stat.st_size for stat in stats),
        "changed_ns": max((stat.st_mtime_ns for stat in stats), default=0),
        "files": len(files),
    }


class CountsFile:
    """One opened file of counts; made by `open_counts`.

    Attributes
    ----------
    path
        The file or folder.
    num_cells
        Number of rows.
    gene_ids
        [columns] of str, as they stand in the file; empty where missing.
    notes
        Lines about this file that its reader should see, such as features that are no genes.
    """

    def __init__(self, path: Path, opened: Opened, allow_noninteger: bool, scratch: Path | None) -> None:
        self.path, self._opened, self._allow_noninteger = path, opened, allow_noninteger
        self._scratch, self._own_scratch = scratch, False
        self.gene_ids, self.notes = opened.gene_ids, opened.notes
        self.num_cells = opened.cells.length
        self._matrix = opened.matrix(self._scratch_folder)
        num_cells, num_genes = self._matrix.num_cells, self._matrix.num_genes
        if num_cells != self.num_cells or num_genes != len(self.gene_ids):
            raise DataError(
                f"{path}: the matrix has {amount(num_cells, 'cell')} x {amount(num_genes, 'gene')}, the annotation "
                f"{self.num_cells:,} x {len(self.gene_ids):,}: the file is damaged or another layout; write it anew."
            )

    def _scratch_folder(self) -> Path:
        if self._scratch is None:
            self._scratch, self._own_scratch = Path(tempfile.mkdtemp(prefix="counts-")), True
        return self._scratch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and delete a row-wise copy made for it."""
        self._opened.close()
        if self._own_scratch and self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns that describe the cells."""
        return list(self._opened.cells.columns)

    def cell_ids(self, first: int, last: int) -> list[str]:
        """Names of the cells in the rows `first` to `last`."""
        with _naming(self.path):
            return [str(name) for name in self._opened.cells.index(first, last).to_pylist()]

    def obs(self, columns: Sequence[str], first: int, last: int) -> pa.Table:
        """Read columns that describe the cells, rows `first` to `last`; categories come as their values.

        Raises
        ------
        DataError
            If there is no such column.
        """
        arrays = {}
        for name in columns:
            if name not in self._opened.cells.columns:
                have = ", ".join(self.obs_columns) or "none"
                raise DataError(f"{self.path}: no column {name!r} describes the cells; there are: {have}.")
            with _naming(self.path):
                arrays[name] = self._column(name, first, last)
        return pa.table(arrays)

    def _column(self, name: str, first: int, last: int) -> pa.Array:
        try:
            values = self._opened.cells.columns[name](first, last)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"the column {name!r} of the cells cannot be read ({_first_line(error)}); drop it, or write it anew as "
                "text or numbers."
            ) from error
        if len(values) != last - first:
            raise DataError(f"the column {name!r} of the cells has fewer rows than there are cells; write it anew.")
        return values

    def prepare(self) -> None:
        """Make the row-wise copy of a matrix that is not stored by cells; nothing for others."""
        if isinstance(self._matrix, Transposed):
            with _naming(self.path):
                self._matrix.prepare()

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[CountsBlock]:
        """Yield blocks of the rows `first` to `last` in order, each checked to hold counts.

        Raises
        ------
        DataError
            Naming file, row and gene, for a value that is negative, not finite or, unless allowed, not whole; for a
            damaged file.
        """
        blocks = self._matrix.blocks(first, self.num_cells if last is None else last)
        while True:
            with _naming(self.path):
                block = next(blocks, None)
                if block is None:
                    return
                require_columns(block, len(self.gene_ids))
            check_values(block, self, self._allow_noninteger, self._opened.other_matrices)
            if self._allow_noninteger and self.path not in _LOOKED_INTO:
                self._warn_of_logarithms(block)
            yield block

    def _warn_of_logarithms(self, block: CountsBlock) -> None:
        """Say once a process that values which are allowed are no counts at all."""
        _LOOKED_INTO.add(self.path)
        if found := describe_logarithms(block, self):
            remedy = counts_elsewhere(self._opened.other_matrices)
            say(f"WARNING {self.path}: {found}; its ranks are not those of counts. {remedy}.", error=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors of its reader."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # for the row-wise copy
        raise DataError(f"{path}: cannot be read ({_first_line(error)}); the file is damaged or incomplete.") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def open_counts(
    path: str | os.PathLike[str],
    *,
    gene_id_column: str = "ensembl_id",
    layer: str | None = None,
    raw: bool = False,
    allow_noninteger: bool = False,
    scratch: Path | None = None,
) -> CountsFile:
    """Open a file of counts; use as a context manager.

    Parameters
    ----------
    path
        AnnData (h5ad or zarr), 10x (HDF5, or a folder with matrix.mtx) or loom.
    gene_id_column
        Column of `var` with the gene ids, or "index" for the names of the genes. 10x files have their own.
    layer
        Read this layer instead of `X`.
    raw
        Read `raw.X` instead of `X`.
    allow_noninteger
        Accept values that are not whole numbers.
    scratch
        Folder for the row-wise copy of a matrix that is not stored by cells (CSC, Matrix Market); kept, and used
        again when it is there. By default a temporary folder, deleted when the file is closed.

    Raises
    ------
    DataError
        If it is none of these formats, damaged, or without the matrix, layer or column asked for.
    ConfigError
        If a layer and `raw` are asked for at once.
    """
    path = Path(path)
    require(not (raw and layer), "--raw and --layer name two matrices; give one of them.")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it.")
    with _naming(path):
        try:
            opened = open_format(path, gene_id_column=gene_id_column, layer=layer, raw=raw)
        except ConfigError:
            raise
        return CountsFile(path, opened, allow_noninteger, scratch)
