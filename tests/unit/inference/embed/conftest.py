"""Models and cells to embed."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_pretrain.inference.embed import EmbedOptions, embed
from tests.unit.inference.worlds import make_world


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    types = [f"type {number % 3}" for number in range(24)]
    return make_world(tmp_path_factory.mktemp("v1"), "v1", cell_type=types, score=list(range(24)))


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("v2"), "v2")


def run(world, tmp_path, **options):
    output = options.pop("output", tmp_path / "out.parquet")
    summary = embed(EmbedOptions(world.model, [str(world.path)], output, **options))
    return output, summary


def vectors(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist())
