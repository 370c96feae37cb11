"""The file formats of counts, known by their content: AnnData, 10x HDF5, loom, and 10x Matrix Market folders."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.frames import Frame, array_reader, gene_ids, read_frame, to_arrow
from geneformer_pretrain.tokenization.matrices import ByCell, Dense, Matrix, Selected
from geneformer_pretrain.tokenization.matrix_market import MatrixMarket, find_matrix_market, open_tsv
from geneformer_pretrain.tokenization.transposed import ByGene, Transposed

MakeMatrix = Callable[[Callable[[], Path]], Matrix]
"""Makes a matrix, given a function that returns the folder for a row-wise copy."""

ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
GENE_EXPRESSION = "Gene Expression"
"""Feature type of genes in 10x files; others are antibodies, guides, peaks."""


@dataclass
class Opened:
    """An opened file, whatever its format.

    Attributes
    ----------
    matrix
        Makes the matrix.
    gene_ids
        [genes] of str.
    cells
        Names and columns of the cells.
    other_matrices
        Options that read another matrix of the file, for errors.
    notes
        Lines that the reader should see.
    close
        Closes the file.
    """

    matrix: MakeMatrix
    gene_ids: np.ndarray
    cells: Frame
    other_matrices: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None


def is_counts_folder(path: Path) -> bool:
    """Return True for a zarr store and for a folder with a matrix.mtx."""
    return any((path / name).exists() for name in ZARR_FILES) or find_matrix_market(path) is not None


def open_format(path: Path, *, gene_id_column: str, layer: str | None, raw: bool) -> Opened:
    """Open a file by its content; see `open_counts`."""
    if path.is_dir():
        if find_matrix_market(path) is not None:
            _refuse_other_matrix("a Matrix Market folder", layer, raw)
            return _open_matrix_market(path, gene_id_column)
        return _open_zarr(path, gene_id_column, layer, raw)
    import h5py

    if not h5py.is_hdf5(path):
        raise DataError(
            f"{path}: neither HDF5 (h5ad, 10x, loom) nor a zarr or Matrix Market folder; "
            "convert it to h5ad, or get a new copy if it should be one."
        )
    with ExitStack() as stack:
        file = stack.enter_context(h5py.File(path, "r"))
        if "obs" in file and "var" in file:
            opened = _open_anndata(file, path, gene_id_column, layer, raw)
        elif "row_attrs" in file and "matrix" in file:
            opened = _open_loom(file, path, gene_id_column, layer, raw)
        else:
            _refuse_other_matrix("a 10x file", layer, raw)
            opened = _open_tenx(file, path, gene_id_column)
        opened.close = stack.pop_all().close
    return opened


def _refuse_other_matrix(kind: str, layer: str | None, raw: bool) -> None:
    if layer is not None or raw:
        raise DataError(f"{kind} has one matrix: no layer, no raw.X; leave {'--raw' if raw else '--layer'} out.")


def _open_zarr(path: Path, gene_id_column: str, layer: str | None, raw: bool) -> Opened:
    if not any((path / name).exists() for name in ZARR_FILES):
        raise DataError(f"{path}: neither a zarr store nor a folder with a matrix.mtx.")
    import zarr

    root = zarr.open_group(str(path), mode="r")
    if "obs" not in root or "var" not in root:
        raise DataError(f"{path}: this zarr store is no AnnData: it has no obs or var.")
    return _open_anndata(root, path, gene_id_column, layer, raw)


def _open_anndata(root: Any, path: Path, gene_id_column: str, layer: str | None, raw: bool) -> Opened:
    layers = list(root["layers"]) if "layers" in root else []
    raw_node, raw_var = ("raw/X", "raw/var") if "raw" in root else ("raw.X", "raw.var")
    others = (["--raw"] if raw_node in root else []) + [f"--layer {name}" for name in layers if name != layer]
    if raw:
        name, var_name = raw_node, raw_var
        others.remove("--raw") if "--raw" in others else None
    else:
        name, var_name = ("X" if layer is None else f"layers/{layer}"), "var"
    if layer is not None and layer not in layers:
        raise DataError(f"{path}: no layer {layer!r}; it has: {', '.join(layers) or 'none'}.")
    if name not in root or dict(root[name].attrs).get("encoding-type") == "null":
        has = f"; it has {', '.join(others)}: add one of these" if others else ""
        raise DataError(f"{path}: no matrix {name.replace('/', '.')}{has}.")
    node, uns = root[name], root.get("uns")
    cells = read_frame(root["obs"], uns, f"{path}: obs")
    genes = read_frame(root[var_name], uns, f"{path}: var")
    ids = gene_ids(genes, gene_id_column, f"{path}: {var_name.replace('/', '.')}")
    return Opened(_matrix_maker(node, f"{path}: {name}"), ids, cells, others)


def _matrix_maker(node: Any, where: str) -> MakeMatrix:
    """Find the layout of an AnnData matrix, old or new."""
    if not hasattr(node, "keys"):
        if node.ndim != 2:
            raise DataError(f"{where}: {amount(node.ndim, 'dimension')} instead of 2; write it anew as cells x genes.")
        _require_numbers(node, where)
        return lambda scratch: Dense(node)
    attributes = dict(node.attrs)
    kind = attributes.get("encoding-type", attributes.get("h5sparse_format", "unknown"))
    kind = (kind.decode() if isinstance(kind, bytes) else str(kind)).removesuffix("_matrix")
    shape = attributes.get("shape", attributes.get("h5sparse_shape"))
    missing = [name for name in ("data", "indices", "indptr") if name not in node]
    if kind not in ("csr", "csc") or shape is None or missing:
        raise DataError(f"{where}: a matrix of encoding {kind!r} cannot be read; write it anew as CSR with anndata.")
    num_cells, num_genes = (int(size) for size in shape)
    _require_numbers(node["data"], where)
    if int(node["indptr"].shape[0]) - 1 != (num_cells if kind == "csr" else num_genes):
        raise DataError(f"{where}: the pointers (indptr) do not fit the shape {num_cells} x {num_genes}: damaged.")
    if kind == "csr":
        return lambda scratch: ByCell(node["indptr"], node["indices"], node["data"], num_genes)
    by_gene = ByGene(np.asarray(node["indptr"][:]), node["indices"], node["data"], num_cells)
    return lambda scratch: Transposed(by_gene, scratch() / "by_cell")


def _require_numbers(array: Any, where: str) -> None:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: values of type {array.dtype} are no counts.")


def _open_tenx(file: Any, path: Path, gene_id_column: str) -> Opened:
    """10x HDF5: group `matrix` of Cell Ranger 3 and later, or one group for each genome before."""
    groups = [name for name in file if hasattr(file[name], "keys") and "barcodes" in file[name]]
    if not groups:
        raise DataError(f"{path}: HDF5, but neither AnnData (obs, var), loom (row_attrs) nor 10x (barcodes).")
    if len(groups) > 1:
        raise DataError(f"{path}: several genomes ({', '.join(groups)}); split it into one file for each.")
    group = file[groups[0]]
    num_genes, num_cells = (int(size) for size in group["shape"][:])
    columns = group["features"] if "features" in group else {"id": group["genes"], "name": group["gene_names"]}
    ids = _tenx_ids({name: columns[name] for name in columns}, gene_id_column, path)
    cells = Frame(num_cells, array_reader(group["barcodes"]))
    _require_numbers(group["data"], str(path))
    matrix = ByCell(group["indptr"], group["indices"], group["data"], num_genes)
    types = to_arrow(columns["feature_type"][:]) if "feature_type" in columns else None
    return _only_genes(Opened(lambda scratch: matrix, ids, cells), types)


def _tenx_ids(columns: dict[str, Any], gene_id_column: str, path: Path) -> np.ndarray:
    readers = {name: array_reader(array) for name, array in columns.items()}
    column = "id" if gene_id_column == "ensembl_id" else gene_id_column
    frame = Frame(len(columns["id"]), readers["id"], readers)
    return gene_ids(frame, column, f"{path}: features")


def _only_genes(opened: Opened, types: pa.Array | None) -> Opened:
    """Leave out features that are no genes: they are no part of a cell's total either."""
    if types is None:
        return opened
    keep = np.array([kind == GENE_EXPRESSION for kind in types.to_pylist()])
    if keep.all():
        return opened
    others = sorted({str(kind) for kind in types.to_pylist()} - {GENE_EXPRESSION})
    make = opened.matrix
    opened.matrix = lambda scratch: Selected(make(scratch), keep)
    opened.gene_ids = opened.gene_ids[keep]
    opened.notes.append(f"features that are no genes, left out: {int((~keep).sum()):,} ({', '.join(others)})")
    return opened


def _open_matrix_market(path: Path, gene_id_column: str) -> Opened:
    """10x Matrix Market folder: matrix.mtx, features.tsv or genes.tsv, barcodes.tsv; gzipped or not."""
    features = open_tsv(path, "features", "genes")
    barcodes = open_tsv(path, "barcodes")[0]
    names = dict(zip(("id", "name", "feature_type"), features, strict=False))
    ids = _tenx_ids({name: np.array(values, object) for name, values in names.items()}, gene_id_column, path)
    source = MatrixMarket(path, num_cells=len(barcodes), num_genes=len(ids))
    cells = Frame(len(barcodes), lambda first, last: pa.array(barcodes[first:last]))
    types = pa.array(names["feature_type"]) if "feature_type" in names else None
    return _only_genes(Opened(lambda scratch: Transposed(source, scratch() / "by_cell"), ids, cells), types)


def _open_loom(file: Any, path: Path, gene_id_column: str, layer: str | None, raw: bool) -> Opened:
    """Loom: matrix of genes x cells, `row_attrs` of genes, `col_attrs` of cells."""
    layers = list(file["layers"]) if "layers" in file else []
    if raw:
        raise DataError(f"{path}: loom has no raw.X; its layers: {', '.join(layers) or 'none'} (--layer).")
    if layer is not None and layer not in layers:
        raise DataError(f"{path}: no layer {layer!r}; it has: {', '.join(layers) or 'none'}.")
    array = file["matrix"] if layer is None else file[f"layers/{layer}"]
    _require_numbers(array, str(path))
    genes, cells = (
        _attributes(file[name], size) for name, size in zip(("row_attrs", "col_attrs"), array.shape, strict=True)
    )
    names = next((name for name in ("CellID", "obs_names", "cell_id") if name in cells.columns), None)
    notes = [] if names else ["it has no CellID: cells are named by their row"]
    if names:
        cells.index = cells.columns[names]
    if gene_id_column == "index":
        raise DataError(
            f"{path}: loom has no names of genes; name one of {', '.join(genes.columns)} as --gene-id-column."
        )
    ids = gene_ids(genes, gene_id_column, f"{path}: row_attrs")
    others = [f"--layer {name}" for name in layers if name != layer]
    return Opened(lambda scratch: Dense(array, by_gene=True), ids, cells, others, notes)


def _attributes(group: Any, size: int) -> Frame:
    """Frame of loom attributes; those of more than one dimension are no columns."""
    readers = {
        name: array_reader(group[name]) for name in group if group[name].ndim == 1 and group[name].shape[0] == size
    }
    return Frame(int(size), lambda first, last: pa.array([str(row) for row in range(first, last)]), readers)
