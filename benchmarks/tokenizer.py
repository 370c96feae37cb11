"""Time `tokenize` beside the plain scipy and numpy way, which holds all cells in memory and ranks them one by one.

    python benchmarks/tokenizer.py                      # 100,000 cells x 25,000 genes, 5% of the counts not zero
    python benchmarks/tokenizer.py --compression gzip   # as most published files are
    python benchmarks/tokenizer.py --layout csc --cells 20000

The file is simulated in a temporary folder: 4,096 different cells, repeated, with genes of lognormal abundance and
cells of lognormal depth. The page cache is warm. "In all" is the whole command, from starting Python to the finished
corpus; CPU seconds are those of all its processes. On a machine that others use too, compare the CPU seconds.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata
import datasets
import h5py
import numpy as np
import psutil
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.transposed import BUCKET_VALUES

DIFFERENT_CELLS = 4096


def simulate(genes: int, density: float, random: np.random.Generator) -> sp.csr_matrix:
    """Draw counts of `DIFFERENT_CELLS` cells."""
    abundance = np.exp(random.normal(0, 2, genes))
    rows = []
    for depth in np.exp(random.normal(-0.125, 0.5, DIFFERENT_CELLS)):
        expected = max(1.0, depth * density * genes)
        low, high = 0.0, 1e6  # the number of molecules that shows the expected number of genes
        share = abundance / abundance.sum()
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if np.sum(-np.expm1(-middle * share)) < expected else (low, middle)
        rows.append(sp.csr_matrix(random.poisson(high * share).astype(np.float32)))
    return sp.vstack(rows, format="csr")


def write_h5ad(path: Path, cells: int, some: sp.csr_matrix, layout: str, compression: str | None) -> int:
    """Write cells as AnnData does, repeating `some`; return the number of values."""
    skeleton = anndata.AnnData(sp.csr_matrix((cells, some.shape[1]), dtype=np.float32))
    skeleton.var["ensembl_id"] = [f"ENSG{gene:011d}" for gene in range(some.shape[1])]
    skeleton.obs_names = [f"cell{cell}" for cell in range(cells)]
    skeleton.write_h5ad(path)
    repeats = [some] * (cells // some.shape[0]) + [some[: cells % some.shape[0]]]
    with h5py.File(path, "r+") as file:
        if layout == "csr":
            group, indptr = (
                file["X"],
                np.concatenate([[0], np.cumsum(np.concatenate([np.diff(m.indptr) for m in repeats]))]),
            )
            for name in ("data", "indices", "indptr"):
                del group[name]
            values = int(indptr[-1])
            chunks = {"chunks": (1 << 16,), "compression": compression} if compression else {}
            group.create_dataset("indptr", data=indptr)
            for name, kind in (("data", np.float32), ("indices", np.int32)):
                dataset, at = group.create_dataset(name, (values,), kind, **chunks), 0
                for matrix in repeats:
                    part = getattr(matrix, name)
                    dataset[at : at + len(part)] = part
                    at += len(part)
            return values
        del file["X"]
        if layout == "dense":
            dataset, at = file.create_dataset("X", (cells, some.shape[1]), np.float32, compression=compression), 0
            dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for matrix in repeats:
                for first in range(0, matrix.shape[0], 512):
                    block = matrix[first : first + 512].toarray()
                    dataset[at : at + len(block)] = block
                    at += len(block)
            return sum(matrix.nnz for matrix in repeats)
        anndata.io.write_elem(file, "X", sp.vstack(repeats).tocsc(), dataset_kwargs={"compression": compression})
        return int(file["X/data"].shape[0])


def run_command(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, the CPU seconds of all its processes, and their peak memory together in MB."""
    cpu: dict[int, float] = {}
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    main = psutil.Process(process.pid)
    while process.poll() is None:
        memory = 0.0
        with suppress(psutil.Error):
            for each in (main, *main.children(recursive=True)):
                with suppress(psutil.Error):
                    times = each.cpu_times()
                    cpu[each.pid] = times.user + times.system
                    memory += each.memory_info().rss / 1e6
        peak = max(peak, memory)
        time.sleep(0.02)
    if process.returncode:
        sys.exit("the command failed")
    return time.perf_counter() - start, sum(cpu.values()), peak


def used() -> float:
    """Return the CPU seconds of this process and of those that it waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def report(what: str, cells: int, values: int, seconds: float, cpu: float) -> None:
    """Print the rates."""
    print(
        f"{what}: {cells / seconds:,.0f} cells/s, {values / seconds / 1e6:,.1f}M values/s "
        f"({seconds:.1f} s; {cpu:.1f} CPU s, {cells / cpu:,.0f} cells per CPU second)",
        flush=True,
    )


def plain(path: Path, gene_set: GeneSet, output: Path) -> None:
    """Tokenize the plain way: all in memory, 512 cells at a time, a list of arrays, then a dataset, cell by cell."""
    data = anndata.read_h5ad(path)
    medians, tokens = gene_set.medians[gene_set.num_special_tokens :], np.arange(gene_set.num_special_tokens, 1 << 16)
    cells = []
    for first in range(0, data.n_obs, 512):
        counts = sp.csr_matrix(data.X[first : first + 512]).astype(np.float64)
        totals = np.asarray(counts.sum(axis=1))
        scaled = sp.csr_matrix(counts.multiply(1 / totals).multiply(10_000).multiply(1 / medians[None, :]))
        for row in range(scaled.shape[0]):
            span = slice(scaled.indptr[row], scaled.indptr[row + 1])
            order = np.argsort(-scaled.data[span])
            cells.append(tokens[scaled.indices[span][order]])

    def crop(cell: dict[str, Any]) -> dict[str, Any]:
        ids = cell["input_ids"][: gene_set.max_tokens]
        return {"input_ids": ids, "length": len(ids)}

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"input_ids": cells}).map(crop, num_proc=2)
    dataset.save_to_disk(output)


def main() -> None:
    """Write the file, tokenize it both ways, build a gene set of it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=25_000)
    parser.add_argument("--density", type=float, default=0.05, help="share of counts that are not zero")
    parser.add_argument("--layout", choices=("csr", "csc", "dense"), default="csr")
    parser.add_argument("--compression", choices=("gzip", "lzf"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain-cells", type=int, default=10_000, help="cells for the plain way; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        some = simulate(arguments.genes, arguments.density, random)
        tokens = ["<pad>", "<mask>", *(f"ENSG{gene:011d}" for gene in range(arguments.genes))]
        medians = np.concatenate([[np.nan] * 2, np.exp(random.normal(0, 1, arguments.genes))])
        gene_set = GeneSet("simulated", None, tokens, [None] * len(tokens), medians, 2048)
        gene_set.save(folder / "genes")
        path, small = folder / "counts.h5ad", folder / "small.h5ad"
        values = write_h5ad(path, arguments.cells, some, arguments.layout, arguments.compression)
        few = min(arguments.plain_cells, arguments.cells)
        few_values = write_h5ad(small, max(few, 1), some, arguments.layout, arguments.compression)
        size = path.stat().st_size / 1e9
        print(
            f"{arguments.cells:,} x {arguments.genes:,} {arguments.layout}, {values / 1e6:.0f}M values, {size:.2f} GB"
        )
        if arguments.layout == "csc":
            print(f"(each bucket of the row-wise copy holds {BUCKET_VALUES / 1e6:.1f}M values)")
        command = [sys.executable, "-m", "geneformer_pretrain", "tokenize", "--gene-set", str(folder / "genes")]
        command += ["--workers", str(arguments.workers), "--overwrite", "--output", str(folder / "corpus")]
        subprocess.run([*command, str(small)], check=True, stdout=subprocess.DEVNULL)  # compiles, once for all
        seconds, cpu, peak = run_command([*command, str(path)])
        report("tokenize, in all", arguments.cells, values, seconds, cpu)
        print(f"peak memory of all its processes together: {peak:,.0f} MB")
        if few:
            start, cpu = time.perf_counter(), used()
            plain(small, gene_set, folder / "plain")
            seconds, cpu = time.perf_counter() - start, used() - cpu
            report(f"plain scipy, numpy and datasets, {few:,} cells", few, few_values, seconds, cpu)
        build = [sys.executable, "-m", "geneformer_pretrain", "gene-set", "build"]
        subprocess.run([*build, str(small), "--output", str(folder / "few")], check=True, stdout=subprocess.DEVNULL)
        seconds, cpu, peak = run_command([*build, str(path), "--output", str(folder / "built")])
        report("gene-set build, in all", arguments.cells, values, seconds, cpu)


if __name__ == "__main__":
    main()
