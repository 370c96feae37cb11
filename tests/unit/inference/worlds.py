"""A tiny model with its gene set, and cells for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from geneformer_pretrain.inference.packs import Parts
from geneformer_pretrain.inference.runner import Runner
from geneformer_pretrain.tokenization.gene_set import GeneSet

GENES = 80
MAX_TOKENS = 48
SPECIAL = {"v1": ["<pad>", "<mask>"], "v2": ["<pad>", "<mask>", "<cls>", "<eos>"]}


def gene_set(kind: str = "v1", name: str = "toy") -> GeneSet:
    tokens = SPECIAL[kind] + [f"ENSG{number:011d}" for number in range(GENES)]
    medians = np.concatenate([np.full(len(SPECIAL[kind]), np.nan), np.linspace(1, 2, GENES)])
    symbols = [None] * len(SPECIAL[kind]) + [f"S{number}" for number in range(GENES)]
    return GeneSet(name, "human", tokens, symbols, medians, MAX_TOKENS)


def write_model(folder: Path, kind: str = "v1", *, with_genes: bool = True, seed: int = 0) -> Path:
    genes = gene_set(kind)
    config = transformers.BertConfig(
        vocab_size=genes.vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_act="relu",
        max_position_embeddings=MAX_TOKENS,
        layer_norm_eps=1e-12,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    if with_genes:
        genes.write(folder)
    return folder


def make_cells(count: int, kind: str = "v1", seed: int = 0, longest: int = MAX_TOKENS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    special = len(SPECIAL[kind])
    room = longest - (2 if kind == "v2" else 0)
    cells = [(special + rng.permutation(GENES)[: rng.integers(2, room + 1)]).tolist() for _ in range(count)]
    cells[0] = (special + rng.permutation(GENES)[:room]).tolist()
    return [[2, *cell, 3] for cell in cells] if kind == "v2" else cells


def write_cells(path: Path, cells: list[list[int]], **columns: list) -> Path:
    ids = [f"cell-{number}" for number in range(len(cells))]
    tokens = pa.array(cells, pa.list_(pa.uint16()))
    table = {"input_ids": tokens, "length": [len(cell) for cell in cells], "cell_id": ids, **columns}
    pq.write_table(pa.table(table), path, row_group_size=7)
    return path


def lack_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have forward passes of packs with more tokens run out of memory."""
    plain = Runner.hidden

    def hidden(runner: Runner, parts: Parts) -> torch.Tensor:
        if len(parts.input_ids) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(runner, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)


def make_world(folder: Path, kind: str = "v1", count: int = 24, **columns: list) -> SimpleNamespace:
    """A model, cells and their stock hidden states."""
    cells = make_cells(count, kind)
    path = write_cells(folder / "cells.parquet", cells, **columns)
    return SimpleNamespace(model=write_model(folder / "model", kind), path=path, cells=cells, genes=gene_set(kind))


class Stock:
    """Hidden states by stock transformers, one cell at a time, in FP32."""

    def __init__(self, folder: Path, layer: int = -2) -> None:
        self.model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.layer = layer

    def __call__(self, cell: list[int]) -> np.ndarray:
        with torch.no_grad():
            states = self.model(torch.tensor([cell]), output_hidden_states=True).hidden_states
        return states[self.layer][0].double().numpy()
