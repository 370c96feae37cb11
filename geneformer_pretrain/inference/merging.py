"""From the parts of an embedding job to its output files."""

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_pretrain.files import replacing, sync_file
from geneformer_pretrain.inference.model import Model
from geneformer_pretrain.inference.parts import Job, fixed_size_list, open_writer, write_table

MERGED = "merged.parquet"

POLL_SECONDS = 0.1

GENE_COLUMNS = ("gene_id", "symbol", "cells", "embedding")
"""Columns of the genes that no column of the cells may replace."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Values of the column to group by, and each cell's place among them, int32."""

    names: list[str | None]
    of_cell: np.ndarray


def genes_path(path: Path) -> Path:
    """File of the sums of genes beside the file of a part."""
    return path.with_suffix(".genes.npz")


def _vectors_path(path: Path) -> Path:
    """File of the embeddings beside the file of a part, which holds the other columns."""
    return path.with_suffix(".npy")


def write_part(path: Path, columns: pa.Table, embeddings: np.ndarray) -> None:
    """Write the embeddings of a part, float32 [n, H], then the other columns, whose file says that it is complete.

    Embeddings are an array of their own, which is mapped when parts are joined: lists are slow to decode from parquet.
    """
    with replacing(_vectors_path(path)) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(embeddings))
        file.write(embeddings.data)  # np.save would hide that a disk is full
    write_table(columns, path)


def _read_part(path: Path) -> tuple[pa.Table, np.ndarray]:
    """Columns of a part, and its embeddings, which are read when they are used."""
    with pq.ParquetFile(path) as file:
        return file.read(), np.load(_vectors_path(path), mmap_mode="r")


class Merging:
    """Joins the parts of a job in one file; in parquet in a thread, each part as soon as it and those before are there.

    Leaving it waits for the last part.

    Parameters
    ----------
    job
        Its parts are made meanwhile, by any rank.
    output
        File to write.
    """

    def __init__(self, job: Job, output: Path) -> None:
        self._job, self._output = job, output
        self._paths = [job.path(part) for part in job.parts]
        self._stopped = Event()
        self._thread = ThreadPoolExecutor(1, "merge")
        self._merged: Future[Path] | None = None
        if output.suffix != ".h5ad":
            self._merged = self._thread.submit(self._append_all)

    def require_progress(self) -> None:
        """Raise the error of the thread, if it failed."""
        if self._merged is not None and self._merged.done():
            self._merged.result()

    def _append_all(self) -> Path:
        target = self._job.folder / MERGED
        writer: pq.ParquetWriter | None = None
        try:
            for path in self._paths:
                while not path.exists():
                    if self._stopped.wait(POLL_SECONDS):
                        return target
                if self._stopped.is_set():
                    return target
                columns, vectors = _read_part(path)
                table = columns.append_column("embedding", fixed_size_list(vectors))
                writer = writer or open_writer(target, table.schema)
                writer.write_table(table)
                with target.open("rb") as written:  # little is left to be synced at the end
                    sync_file(written)
        finally:
            if writer is not None:
                writer.close()
        return target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stopped.set()
        elif self._merged is None:
            _write_h5ad(self._paths, self._output)
        else:
            merged = self._merged.result()
            with replacing(self._output) as temporary:
                merged.rename(temporary)
        self._thread.shutdown()


def _write_h5ad(paths: list[Path], output: Path) -> None:
    """Write `obs` and `obsm["X_geneformer"]`; the embeddings of all cells have to fit into memory."""
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

    columns, vectors = zip(*map(_read_part, paths), strict=True)
    table = pa.concat_tables(columns, promote_options="permissive")
    obs: pd.DataFrame = table.drop_columns(["cell_id"]).to_pandas()
    for name in obs.columns:
        if not _fits_h5ad(table[name]):
            obs[name] = pd.Categorical([None if value is None else str(value) for value in table[name].to_pylist()])
    obs.columns = pd.Index(_names_in_h5ad(obs.columns))
    obs.index = pd.Index(table["cell_id"].to_pylist(), dtype=object)
    with replacing(output) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")  # the cells' own names
        data = anndata.AnnData(
            csr_matrix((len(obs), 0), dtype=np.float32), obs=obs, obsm={"X_geneformer": np.concatenate(vectors)}
        )
        data.write_h5ad(temporary)


def _names_in_h5ad(names: Sequence[str]) -> list[str]:
    """Rename columns where h5ad needs it: no slash, some name, and not that of its own index."""
    given: list[str] = []
    for name in names:
        fitting = {"": "unnamed", "_index": "index"}.get(name, name.replace("/", "_"))
        while fitting != name and (fitting in names or fitting in given):
            fitting += "_"
        given.append(fitting)
    return given


def _fits_h5ad(column: pa.ChunkedArray) -> bool:
    """True for numbers, categories and text; dates, lists and truth values with gaps have no place in h5ad."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_dictionary(kind):
        return True
    if pa.types.is_boolean(kind):
        return not column.null_count
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text and column.null_count < len(column)


def merge_genes(job: Job, model: Model, column: str | None, groups: Groups | None, output: Path) -> None:
    """Average the vectors of each gene over all cells, or over those of each group."""
    names: list[str | None] = [None] if groups is None else groups.names
    vocab_size = model.vocab_size
    sums = np.zeros((len(names) * vocab_size, model.hidden_size))
    counts = np.zeros(len(sums), np.int64)
    for part in job.parts:
        with np.load(genes_path(job.path(part))) as saved:
            rows, number, total = (saved[name] for name in saved.files)
        counts[rows] += number
        sums[rows] += total
    rows = np.flatnonzero(counts)
    tokens = rows % vocab_size
    columns: dict[str, Any] = {}
    if column is not None:
        columns[column] = pa.array([names[group] for group in (rows // vocab_size).tolist()], pa.string())
    columns["gene_id"] = [model.gene_set.tokens[token] for token in tokens]
    columns["symbol"] = pa.array([model.gene_set.symbols[token] for token in tokens], pa.string())
    columns["cells"] = counts[rows]
    columns["embedding"] = fixed_size_list((sums[rows] / counts[rows, None]).astype(np.float32))
    write_table(pa.table(columns), output)
