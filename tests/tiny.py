"""A run small enough for a test: a corpus of short cells and a configuration of a few thousand weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.schema import Config

RunWorkers = Callable[..., list[Any]]
"""The fixture `run_workers`: results of a function on each of several ranks."""

VOCAB_SIZE = 101

MODEL = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=48",
    f"model.vocab_size={VOCAB_SIZE}",
    "model.max_position_embeddings=64",
    "model.seq_length=32",
    "model.micro_batch_size=4",
    "model.use_te_layers=false",
)


@pytest.fixture(scope="module", autouse=True)
def one_cpu_thread() -> Iterator[None]:
    """In modules that import it, runs in the test's own process stay off the GPU and use one thread.

    With matrices this small, more threads would only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


def make_cells(num_cells: int, seed: int = 0) -> list[list[int]]:
    """Cells of 4 to 40 different genes each; the longest exceed seq_length."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 41, num_cells)
    return [(2 + generator.permutation(VOCAB_SIZE - 2)[:length]).tolist() for length in lengths]


def write_parquet(path: Path, cells: list[list[int]]) -> Path:
    """Write cells as a corpus of one parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(cells, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column, "length": pa.array(map(len, cells), pa.int32())}), path)
    return path


def overrides(folder: Path, *more: str, num_cells: int = 60) -> list[str]:
    """Overrides that shrink any configuration; data and results lie in `folder`."""
    corpus = folder / "cells.parquet"
    if not corpus.exists():
        write_parquet(corpus, make_cells(num_cells))
    return [
        *MODEL,
        "training.use_fp8=false",
        "training.num_train_steps=2",
        "training.warmup_steps=0",
        "training.num_workers=1",
        f"training.checkpoint_dir={folder / 'run'}",
        "training.wandb_init_args=null",
        f"data.path={corpus}",
        f"data.cache_dir={folder / 'cache'}",
        "data.vocab_path=null",
        *more,
    ]


def tiny_config(folder: Path, *more: str, name: str = "l0_sanity", num_cells: int = 60) -> Config:
    """A shrunk configuration; later overrides win."""
    return load_config(name, overrides(folder, *more, num_cells=num_cells))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_exit(folder: Path) -> dict[str, Any]:
    """The content of exit.json."""
    return json.loads((folder / "exit.json").read_text())


def read_cells(folder: Path) -> dict[int, tuple[int, int, list[int]]]:
    """The log of cells over all ranks: pack -> (step, epoch, cells).

    Raises
    ------
    AssertionError
        If a pack is there twice.
    """
    found: dict[int, tuple[int, int, list[int]]] = {}
    for path in sorted((folder / "cells").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record["pack"] not in found, f"pack {record['pack']} was trained on twice"
            found[record["pack"]] = record["step"], record["epoch"], record["cells"]
    return dict(sorted(found.items()))
