"""Models and cells to perturb."""

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_matrix

from geneformer_pretrain.inference.perturb import perturb
from geneformer_pretrain.inference.perturbations import PerturbOptions
from tests.unit.inference.worlds import make_world


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("geneformer_pretrain.inference.perturb.MEASURED_SECONDS", 0.001)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["v1", "v2"])
def world(request, tmp_path_factory):
    states = [["ill", "well", "other"][number % 3] for number in range(10)]
    donors = [f"donor {number % 4}" for number in range(10)]
    return make_world(tmp_path_factory.mktemp(request.param), request.param, 10, state=states, donor=donors)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    states = [["ill", "well", "other"][number % 3] for number in range(10)]
    return make_world(tmp_path_factory.mktemp("one"), "v1", 10, state=states, donor=["A"] * 10)


def run(world, tmp_path, **options):
    output = options.pop("output", tmp_path / "out")
    options = {"mode": "delete", "statistics": False, "tokens": 512} | options
    summary = perturb(PerturbOptions(world.model, [str(world.path)], output, **options))
    return rows_of(output), summary


def rows_of(output):
    files = sorted((output / "scores").glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def ids(world, *places):
    """Genes of the first cell, by their places."""
    cell = [token for token in world.cells[0] if token >= len(world.genes.special_tokens)]
    return [world.genes.tokens[cell[place]] for place in places]


def write_counts(world, path):
    adata = anndata.AnnData(csr_matrix(np.arange(1.0, 321).reshape(4, 80).astype(np.float32)))
    adata.var["ensembl_id"] = world.genes.tokens[2:]
    adata.obs["state"] = ["ill", "well", "ill", "well"]
    adata.write_h5ad(path)
