"""States of cells, such as diseased and healthy, and their mean embeddings."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference.cells import Cells
from geneformer_pretrain.inference.packs import Pack, Parts
from geneformer_pretrain.inference.parts import fixed_size_list, share_progress, write_table
from geneformer_pretrain.inference.pooling import first_token, mean_of_genes
from geneformer_pretrain.inference.runner import Runner, windows


def find_states(cells: Cells, column: str, names: Sequence[str]) -> list[np.ndarray]:
    """Numbers of the cells of each state.

    Raises
    ------
    DataError
        A column with one value, or a state without cells; names those that there are.
    """
    cells.require_columns([column], "--states")
    values = cells.names(column, np.arange(cells.num_cells)).cast(pa.string())
    known = [value for value in pc.unique(values).to_pylist() if value is not None]
    if len(known) < 2:
        raise DataError(f"--states {column}: all cells have the value {known[0] if known else None!r}; two are needed.")
    found = []
    for name in names:
        members = np.flatnonzero(pc.fill_null(pc.equal(values, name), False).to_numpy(zero_copy_only=False))
        if not len(members):
            listed = ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")
            raise DataError(f"--states {column}: no cell has the value {name!r}; there are {listed}.")
        found.append(members)
    return found


def state_vectors(
    runner: Runner, cells: Cells, names: Sequence[str], members: Sequence[np.ndarray], path: Path, ranks: Ranks
) -> np.ndarray:
    """Mean embedding of each state's cells; kept in a file, and read from it if it is there.

    Each rank embeds its share of the cells.

    Returns
    -------
    array
        float32 [S, C, H]: the mean over genes, then the vector of <cls> in models that have it.
    """
    kinds = ["embedding"] if runner.model.cls_token is None else ["embedding", "cls_embedding"]
    if ranks.gather(path.exists())[0]:
        table = pq.read_table(path)
        return np.stack([np.array(table[kind].to_pylist(), np.float32) for kind in kinds], axis=1)
    sums = np.zeros((len(names), len(kinds), runner.model.hidden_size))
    mine = [np.array_split(some, ranks.size)[ranks.rank] for some in members]
    with share_progress(ranks, sum(map(len, mine)), "embed states", "cell") as progress:
        for pack, rows in runner.run(_packs(runner, cells, mine)):
            sums[pack.owner] += rows.sum(0, dtype=np.float64)
            progress.advance(len(rows))
    counts = np.array([len(some) for some in members])
    vectors = (np.sum(ranks.gather(sums), axis=0) / counts[:, None, None]).astype(np.float32)
    if ranks.rank == 0:
        columns = {"state": list(names), "cells": counts}
        columns |= {kind: fixed_size_list(vectors[:, place]) for place, kind in enumerate(kinds)}
        write_table(pa.table(columns), path)
    ranks.gather(None)
    return vectors


def _packs(runner: Runner, cells: Cells, members: Sequence[np.ndarray]) -> Iterator[Pack]:
    head = _mean if runner.model.cls_token is None else _mean_and_cls
    for state, some in enumerate(members):
        for part in windows(cells.lengths[some], runner.window):
            tokens, offsets = cells.tokens(some[part])
            for chosen, shape in runner.plan(np.diff(offsets)):
                yield runner.pack_of(chosen, shape, tokens, offsets, head, state)


def _mean(pack: Pack, hidden: Tensor, parts: Parts) -> Tensor:
    return mean_of_genes(hidden, parts)[:, None]


def _mean_and_cls(pack: Pack, hidden: Tensor, parts: Parts) -> Tensor:
    return torch.stack([mean_of_genes(hidden, parts), first_token(hidden, parts)], dim=1)
