"""From the parts of an embedding job to its output files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_pretrain.files import replacing
from geneformer_pretrain.inference.model import Model
from geneformer_pretrain.inference.parts import Job, fixed_size_list, open_writer, write_table


@dataclass(frozen=True, eq=False)
class Groups:
    """Values of the column to group by, and each cell's place among them, int32."""

    names: list[str | None]
    of_cell: np.ndarray


def genes_path(path: Path) -> Path:
    """File of the sums of genes beside the file of a part."""
    return path.with_suffix(".genes.npz")


def merge(job: Job, output: Path) -> None:
    """Join the parts in one file."""
    paths = [job.path(part) for part in job.parts]
    if output.suffix == ".h5ad":
        _write_h5ad(paths, output)
        return
    schema = pa.unify_schemas([pq.read_schema(path) for path in paths], promote_options="permissive")
    with replacing(output) as temporary:
        if len(paths) == 1:
            paths[0].rename(temporary)
            return
        with open_writer(temporary, schema) as writer:
            for path in paths:
                with pq.ParquetFile(path) as file:
                    for group in range(file.num_row_groups):
                        writer.write_table(file.read_row_group(group).cast(schema))


def _write_h5ad(paths: list[Path], output: Path) -> None:
    """Write `obs` and `obsm["X_geneformer"]`; the embeddings of all cells have to fit into memory."""
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

    table = pa.concat_tables([pq.read_table(path) for path in paths], promote_options="permissive")
    width = table.schema.field("embedding").type.list_size
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    obs: pd.DataFrame = table.drop_columns(["embedding", "cell_id"]).to_pandas()
    obs.index = pd.Index(table["cell_id"].to_pylist(), dtype=object)
    data = anndata.AnnData(csr_matrix((len(obs), 0), dtype=np.float32), obs=obs, obsm={"X_geneformer": vectors})
    with replacing(output) as temporary:
        data.write_h5ad(temporary)


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
