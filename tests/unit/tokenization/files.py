"""One small table of counts, written in every format that is read."""

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from geneformer_pretrain.tokenization.gene_set import GeneSet

CELLS, GENES = 70, 40
GENE_IDS = [f"ENSG{number:011d}" for number in np.random.default_rng(5).permutation(GENES)]
"""Not in the order of ids."""


def example_counts(dtype: str = "float32", cells: int = CELLS, seed: int = 0) -> sp.csr_matrix:
    """Counts of some cells, a third of them not zero; cell 3 is empty."""
    random = np.random.default_rng(seed)
    dense = random.poisson(0.4, (cells, GENES)) * random.integers(1, 9, (cells, GENES))
    dense[3 % cells] = 0
    return sp.csr_matrix(dense.astype(dtype))


def example_gene_set(
    version: str = "v1", genes: list[str] | None = None, max_tokens: int = 2048, **more: Any
) -> GeneSet:
    """Gene set of `GENE_IDS` in the order of ids, with medians between 0.1 and 10."""
    special = ["<pad>", "<mask>"] + (["<cls>", "<eos>"] if version == "v2" else [])
    genes = sorted(GENE_IDS) if genes is None else genes
    medians = np.exp(np.random.default_rng(7).normal(0, 1, len(genes)))
    tokens = [*special, *genes]
    return GeneSet(
        name="example",
        species=None,
        tokens=tokens,
        symbols=[None] * len(tokens),
        medians=more.pop("medians", np.concatenate([[np.nan] * len(special), medians])),
        max_tokens=max_tokens,
        **more,
    )


def example_anndata(counts: Any = None, **obs: Any) -> anndata.AnnData:
    """AnnData with names, gene ids and a few columns."""
    counts = example_counts() if counts is None else counts
    cells = counts.shape[0]
    columns = {
        "cell_type": pd.Categorical([("T cell", "B cell", None)[cell % 3] for cell in range(cells)]),
        "donor": [f"donor {cell % 4}" for cell in range(cells)],
        "age": np.arange(cells) % 90,
        "score": np.linspace(0, 1, cells),
        "good": np.arange(cells) % 5 != 0,
        **obs,
    }
    data = anndata.AnnData(
        counts,
        obs=pd.DataFrame(columns, index=[f"cell {cell}" for cell in range(cells)]),
        var=pd.DataFrame({"ensembl_id": GENE_IDS, "number": range(GENES)}, index=[f"gene{i}" for i in range(GENES)]),
    )
    return data


def write_h5ad(path: Path, data: anndata.AnnData | None = None, **options: Any) -> Path:
    """Write an h5ad."""
    (example_anndata() if data is None else data).write_h5ad(path, **options)
    return path


def _h5ad(convert: Callable[[sp.csr_matrix], Any], **options: Any) -> Callable[[Path], Path]:
    return lambda folder: write_h5ad(folder / "counts.h5ad", example_anndata(convert(example_counts())), **options)


def _zarr(convert: Callable[[sp.csr_matrix], Any], version: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        before = anndata.settings.zarr_write_format
        anndata.settings.zarr_write_format = version
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zarr has none for its own draft types
                example_anndata(convert(example_counts())).write_zarr(folder / "counts.zarr")
        finally:
            anndata.settings.zarr_write_format = before
        return folder / "counts.zarr"

    return write


def _within(place: str) -> Callable[[Path], Path]:
    """Counts as a layer or in raw, beside a log-normalised X."""

    def write(folder: Path) -> Path:
        data = example_anndata(example_counts())
        if place == "raw":
            data.raw = data.copy()
        else:
            data.layers["counts"] = data.X.copy()
        data.X = sp.csr_matrix(np.log1p(data.X.toarray() / 3))
        return write_h5ad(folder / "counts.h5ad", data)

    return write


def _tenx_h5(folder: Path) -> Path:
    counts = example_counts("int32")
    with h5py.File(folder / "counts.h5", "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = np.array([GENES, CELLS])
        group["barcodes"] = np.array([f"cell {cell}" for cell in range(CELLS)], "S")
        group["features/id"] = np.array(GENE_IDS, "S")
        group["features/name"] = np.array([f"gene{i}" for i in range(GENES)], "S")
        group["features/feature_type"] = np.array(["Gene Expression"] * GENES, "S")
    return folder / "counts.h5"


def _tenx_h5_old(folder: Path) -> Path:
    counts = example_counts("int32")
    with h5py.File(folder / "counts.h5", "w") as file:
        group = file.create_group("GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = np.array([GENES, CELLS])
        group["barcodes"] = np.array([f"cell {cell}" for cell in range(CELLS)], "S")
        group["genes"] = np.array(GENE_IDS, "S")
        group["gene_names"] = np.array([f"gene{i}" for i in range(GENES)], "S")
    return folder / "counts.h5"


def write_mtx(folder: Path, *, gz: bool, old: bool = False, cells_first: bool = False) -> Path:
    """Write a 10x Matrix Market folder."""
    path = folder / "run"
    path.mkdir()
    counts = example_counts("int32")
    scipy.io.mmwrite(path / "matrix.mtx", counts if cells_first else counts.T.tocoo(), field="integer")
    lines = [f"{gene}\tgene{i}" + ("" if old else "\tGene Expression") for i, gene in enumerate(GENE_IDS)]
    (path / ("genes.tsv" if old else "features.tsv")).write_text("\n".join(lines) + "\n")
    (path / "barcodes.tsv").write_text("".join(f"cell {cell}\n" for cell in range(CELLS)))
    if gz:
        for file in list(path.iterdir()):
            (path / (file.name + ".gz")).write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


def _loom(folder: Path) -> Path:
    with h5py.File(folder / "counts.loom", "w") as file:
        file.create_dataset("matrix", data=example_counts("float32").toarray().T, chunks=(16, 8), compression="gzip")
        file["row_attrs/ensembl_id"] = np.array(GENE_IDS, object)
        file["col_attrs/CellID"] = np.array([f"cell {cell}" for cell in range(CELLS)], object)
        file.create_group("layers")
    return folder / "counts.loom"


FORMATS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "csr": (_h5ad(lambda counts: counts), {}),
    "csr gzip": (_h5ad(lambda counts: counts, compression="gzip"), {}),
    "csr lzf": (_h5ad(lambda counts: counts, compression="lzf"), {}),
    "csc": (_h5ad(lambda counts: counts.tocsc()), {}),
    "csc gzip": (_h5ad(lambda counts: counts.tocsc(), compression="gzip"), {}),
    "dense": (_h5ad(lambda counts: counts.toarray()), {}),
    "dense gzip": (_h5ad(lambda counts: counts.toarray(), compression="gzip"), {}),
    **{
        kind: (_h5ad(lambda counts, kind=kind: counts.astype(kind)), {})
        for kind in ("float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    "dense int64": (_h5ad(lambda counts: counts.toarray().astype("int64")), {}),
    "csc uint16": (_h5ad(lambda counts: counts.tocsc().astype("uint16")), {}),
    "raw": (_within("raw"), {"raw": True}),
    "layer": (_within("layer"), {"layer": "counts"}),
    **{
        f"zarr v{version} {kind}": (_zarr(convert, version), {})
        for version in (2, 3)
        for kind, convert in {
            "csr": lambda counts: counts,
            "csc": lambda counts: counts.tocsc(),
            "dense": lambda counts: counts.toarray(),
        }.items()
    },
    "10x h5": (_tenx_h5, {}),
    "10x h5 old": (_tenx_h5_old, {}),
    "mtx": (lambda folder: write_mtx(folder, gz=False), {}),
    "mtx gz": (lambda folder: write_mtx(folder, gz=True), {}),
    "mtx old": (lambda folder: write_mtx(folder, gz=False, old=True), {}),
    "mtx cells first": (lambda folder: write_mtx(folder, gz=False, cells_first=True), {}),
    "loom": (_loom, {}),
}
"""Writer and options of reading for each format."""
