"""The cells of an evaluation: chosen by their labels, written as a small corpus, embedded by any model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from geneformer_pretrain.console import say
from geneformer_pretrain.inference.cells import Cells
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.evaluate import Classes, IntArray, select_classes
from geneformer_pretrain.inference.masked_loss import quiet
from geneformer_pretrain.tokenization.gene_set import GeneSet
from modeling_bert_te import BertConfig, BertForMaskedLM


@dataclass(frozen=True, eq=False)
class ChosenCells:
    """Cells that an evaluation uses.

    Attributes
    ----------
    classes
        Their classes; `kept` are their numbers among all cells.
    ids
        Their names.
    tokens, offsets
        Tokens of cell i are `tokens[offsets[i]:offsets[i + 1]]`.
    """

    classes: Classes
    ids: list[str]
    tokens: np.ndarray
    offsets: IntArray


def choose_cells(cells: Cells, label: str, group: str | None, *, max_cells: int, seed: int) -> ChosenCells:
    """Choose the cells with a usable label, at most `max_cells`, drawn at random if there are more.

    Raises
    ------
    DataError
        A column that is not there or has too few classes or groups.
    """
    cells.require_columns([label], "--label")
    if group is not None:
        cells.require_columns([group], "--groups")
    drawn = np.arange(cells.num_cells)
    if len(drawn) > max_cells:
        say(f"{max_cells:,} of {len(drawn):,} cells drawn at random (--max-cells).", error=True)
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, max_cells, replace=False))
    names = [label] if group is None else list(dict.fromkeys([label, group]))
    table = cells.table(names, drawn)
    groups = None if group is None else table[group].to_pylist()
    classes = select_classes(table[label].to_pylist(), groups, label=label, group=group or "")
    kept = drawn[classes.kept]
    tokens, offsets = cells.tokens(kept)
    return ChosenCells(replace(classes, kept=kept), cells.ids(kept).to_pylist(), tokens, offsets)


def write_corpus(chosen: ChosenCells, gene_set: GeneSet, folder: Path) -> Path:
    """Write the chosen cells as a corpus of this gene set, into a new folder."""
    folder.mkdir()
    part = "part-00000.parquet"
    tokens = pa.LargeListArray.from_arrays(chosen.offsets, chosen.tokens)
    pq.write_table(pa.table({"input_ids": tokens, "cell_id": chosen.ids}), folder / part)
    facts = {"format_version": 1, "gene_set": gene_set.describe(), "parts": [{"file": part, "cells": len(chosen.ids)}]}
    (folder / "corpus.json").write_text(json.dumps(facts))
    return folder


def embed_corpus(
    model: Path,
    gene_set: Path,
    corpus: Path,
    output: Path,
    *,
    layer: int,
    pooling: str,
    dtype: str,
    tokens: int | None = None,
    max_tokens: int | None = None,
) -> NDArray[np.float32]:
    """Embed a corpus, [cells, H] in its order; `output` is the parquet file that holds them meanwhile.

    `tokens` is the size of a forward pass; None: by device. `max_tokens`: see `EmbedOptions`.
    """
    embed(
        EmbedOptions(
            model,
            [str(corpus)],
            output,
            layer=layer,
            pooling=pooling,
            gene_set=gene_set,
            dtype=dtype,
            tokens=tokens,
            max_tokens=max_tokens,
        )
    )
    column = pq.read_table(output, columns=["embedding"])["embedding"].combine_chunks()
    vectors: NDArray[np.float32] = column.flatten().to_numpy().reshape(len(column), -1)
    return vectors


def save_random_weights(model: Path, folder: Path, seed: int) -> Path:
    """Save a model of the same architecture with new weights, drawn with `seed`."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        BertForMaskedLM(BertConfig.from_pretrained(model)).save_pretrained(folder)
    return folder


def random_subset(chosen: ChosenCells, number: int, seed: int) -> Sequence[np.ndarray]:
    """Tokens of at most so many of the cells, each an array."""
    rows = np.arange(len(chosen.ids))
    if len(rows) > number:
        rows = np.sort(np.random.default_rng(seed).choice(rows, number, replace=False))
    return [chosen.tokens[chosen.offsets[row] : chosen.offsets[row + 1]] for row in rows]
