"""Simulated scores of perturbations, with and without effects, as perturb writes them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_scores(folder: Path, table: pa.Table, parts: int = 1) -> Path:
    """Write a table of scores as parts, cut anywhere, also inside a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, len(table), parts + 1).astype(int)
    for part, (first, last) in enumerate(pairwise(bounds.tolist())):
        pq.write_table(table.slice(first, last - first), folder / f"part-{part:05d}.parquet")
    return folder


def donor_scores(
    *, donors: int, cells_per_donor: int, genes: int, true_genes: int, donor_sd: float, effect: float, seed: int
) -> pa.Table:
    """Simulate shifts of which a few genes have a true effect, and every gene one of its own in each donor.

    shift = rank trend + effect of the gene (true genes only) + effect of the gene in this donor + noise of the cell.
    All genes are in every cell, in random order; unit of all effects is the standard deviation of a cell's noise.
    """
    generator = np.random.default_rng(seed)
    in_donor = donor_sd * generator.standard_normal((donors, genes))
    truth = np.where(np.arange(genes) < true_genes, effect, 0.0)
    cells = donors * cells_per_donor
    donor = np.repeat(np.arange(donors), cells_per_donor)
    gene = np.argsort(generator.random((cells, genes)), axis=1)  # [cells, rank]
    trend = -2.0 * np.log1p(np.arange(genes)) / np.log1p(genes)
    shift = trend + truth[gene] + in_donor[donor[:, None], gene] + generator.standard_normal((cells, genes))
    return pa.table(
        {
            "cell": np.repeat(np.arange(cells), genes),
            "cell_id": pa.array(np.repeat([f"cell{cell}" for cell in range(cells)], genes)),
            "perturbation": pa.array(np.array([f"gene{number:03d}" for number in range(genes)])[gene.ravel()]),
            "rank": pa.array(np.tile(np.arange(genes, dtype=np.int32), cells)),
            "gene_similarity": pa.array((1 - 1e-3 * generator.random(cells * genes)).astype(np.float32)),
            "shift_healthy": pa.array((1e-3 * shift.ravel()).astype(np.float32)),
            "donor_id": pa.array(np.array([f"D{number + 1}" for number in range(donors)])[np.repeat(donor, genes)]),
        }
    )
