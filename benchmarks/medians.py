"""Measure how fast `gene-set build` finds the medians of genes, beside the plain way with scipy and numpy.

    python benchmarks/medians.py                     # 20,000 cells x 25,000 genes at 5%, an uncompressed CSR h5ad
    python benchmarks/medians.py --cells 100000 --compression gzip

The file is written into a temporary folder and deleted at the end; it is in the page cache when it is read. A rate
counts non-zero values of the file per second, reading included. One thread reads, another counts. The plain way holds
the whole matrix in memory, which the others do not.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.tokenization.gene_set_build import GeneSetBuilder


def write_counts(path: Path, cells: int, genes: int, density: float, compression: str | None) -> int:
    """Write simulated counts and return the number of non-zero values. Genes are as unequal as in real cells."""
    import anndata
    import pandas as pd

    generator = np.random.default_rng(0)
    abundance = generator.lognormal(0, 2, genes)
    blocks = []
    for first in range(0, cells, 1000):
        rows = min(1000, cells - first)
        depth = generator.lognormal(np.log(density * genes * 1.2), 0.4, rows)
        rates = np.minimum(depth[:, None] * (abundance / abundance.sum()), 50)
        blocks.append(sp.csr_matrix(generator.poisson(rates).astype(np.float32)))
    matrix = sp.vstack(blocks, format="csr")
    var = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(genes)]})
    var.index = var["ensembl_id"].to_numpy()
    obs = pd.DataFrame(index=[f"cell-{row}" for row in range(cells)])
    anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(path, compression=compression)
    return int(matrix.nnz)


def plain_medians(path: Path) -> np.ndarray:
    """Return the medians as one would write them down with anndata, scipy and numpy."""
    import anndata

    matrix = anndata.read_h5ad(path).X.astype(np.float64)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    scaled = sp.csc_matrix(sp.diags(10_000 / np.maximum(totals, 1)) @ matrix)
    columns = np.split(scaled.data, scaled.indptr[1:-1])
    return np.array([np.median(column) if len(column) else np.nan for column in columns])


def main() -> None:
    """Write the counts, find the medians in three ways and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=25_000)
    parser.add_argument("--density", type=float, default=0.05, help="share of non-zero values, about")
    parser.add_argument("--compression", choices=("gzip", "lzf"), help="of the h5ad; default: none")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain way, which needs much memory")
    arguments = parser.parse_args()

    from geneformer_pretrain.tokenization.counts import open_counts

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "counts.h5ad"
        values = write_counts(path, arguments.cells, arguments.genes, arguments.density, arguments.compression)
        print(f"{arguments.cells:,} cells, {values / 1e6:.1f}M non-zero values, {path.stat().st_size / 1e9:.2f} GB")
        builder = GeneSetBuilder(open_counts, [path])
        builder.count()  # compiles

        start = time.perf_counter()
        for block in open_counts(path).blocks():
            del block
        print(f"reading and checking alone: {values / (time.perf_counter() - start) / 1e6:.1f}M values/s")

        start = time.perf_counter()
        counted = builder.count().genes
        estimated = counted.sketch.medians()
        seconds = time.perf_counter() - start
        print(f"within 0.5%, one pass: {values / seconds / 1e6:.1f}M values/s")

        start = time.perf_counter()
        exact = builder.exact_medians(counted)
        seconds += time.perf_counter() - start
        print(f"exact, two passes: {values / seconds / 1e6:.1f}M values/s")
        print(f"largest relative error of one pass: {np.nanmax(np.abs(estimated / exact - 1)):.3%}")

        if not arguments.no_plain:
            start = time.perf_counter()
            plain = plain_medians(path)
            seconds = time.perf_counter() - start
            difference = np.nanmax(np.abs(plain / exact - 1))
            print(f"plain, with scipy and numpy: {values / seconds / 1e6:.1f}M values/s (apart by {difference:.0e})")


if __name__ == "__main__":
    main()
