"""`geneformer-pretrain evaluate`: the worth of a model's embeddings on labelled cells, beside baselines."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_pretrain.console import Summary, say

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from geneformer_pretrain.inference.evaluate import Classes, Features
    from geneformer_pretrain.tokenization.gene_set import GeneSet

PCA_OF_COUNTS = "PCA of log-normalised counts"
LOSS_CELLS = 1000
"""Cells of the masked-token loss, drawn at random if there are more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model, such as a run's final_model")
    parser.add_argument("cells", metavar="CELLS", nargs="+", help="a corpus, or counts, with the label as a column")
    parser.add_argument("--label", metavar="COLUMN", required=True, help="column that names the class of each cell")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the report")
    parser.add_argument(
        "--groups", metavar="COLUMN", help="hold out whole groups, such as donors, named by this column"
    )
    parser.add_argument(
        "--counts", metavar="COUNTS", nargs="+", help="counts of the cells of a corpus, for one more baseline"
    )
    parser.add_argument("--gene-set", metavar="GENES", help="gene-set folder, for a model that brings none")
    parser.add_argument("--layer", type=int, default=-2, help="hidden state: 0 embeddings, -1 last, -2 second to last")
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="mean over genes, or <cls>")
    parser.add_argument(
        "--max-cells", metavar="N", type=int, default=20_000, help="draw so many cells if there are more"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of folds, draws and random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")


def run(arguments: argparse.Namespace) -> Summary:
    """Embed the cells with the model and with random weights, score both and the baselines, and write the report."""
    from geneformer_pretrain.errors import require
    from geneformer_pretrain.files import new_folder, require_new

    output = Path(arguments.output)
    require_new(output, overwrite=arguments.overwrite)
    require(arguments.max_cells > 0, f"--max-cells {arguments.max_cells}: at least 1 is needed.")

    from geneformer_pretrain.inference.cells import is_corpus
    from geneformer_pretrain.inference.embed import embed_cells
    from geneformer_pretrain.inference.evaluate import (
        principal_components,
        score_features,
        score_majority,
        split_folds,
        token_presence,
    )
    from geneformer_pretrain.inference.evaluate_report import MODEL, report_values, summary_lines, write_report
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    options: dict[str, Any] = {
        "layer": arguments.layer,
        "pooling": arguments.pooling,
        "gene_set": arguments.gene_set,
    }
    embedded = embed_cells(arguments.model, arguments.cells, **options)
    classes = _classes(embedded.table, arguments)
    folds = split_folds(classes, arguments.seed)
    gene_set = GeneSet.load(Path(arguments.gene_set or arguments.model))
    random_weights = embed_cells(arguments.model, arguments.cells, random_weights=True, **options)
    presence = token_presence(embedded.tokens, embedded.offsets, gene_set.vocab_size)[classes.kept]
    features: dict[str, Features] = {
        MODEL: embedded.embeddings[classes.kept],
        "random weights": random_weights.embeddings[classes.kept],
        "PCA of token presence": principal_components(presence, arguments.seed),
    }
    counts = arguments.counts or [path for path in arguments.cells if not is_corpus(path)]
    if counts:
        features[PCA_OF_COUNTS] = _components_of_counts(counts, embedded.table, classes, arguments.seed)
    scores = {}
    for name, matrix in features.items():
        say(f"Scoring: {name}", error=True)
        scores[name] = score_features(matrix, classes, folds, arguments.seed)
    losses = _losses(arguments, embedded.tokens, embedded.offsets, classes, gene_set)
    values = report_values(
        classes,
        scores,
        score_majority(classes),
        losses,
        label=arguments.label,
        group=arguments.groups,
        folds=folds,
        seed=arguments.seed,
    )
    with new_folder(output, overwrite=arguments.overwrite) as folder:
        write_report(folder, values, classes, features, scores[MODEL]["logistic"]["predicted"], arguments.seed)
    return Summary(summary_lines(values, output), values)


def _classes(table: pa.Table, arguments: argparse.Namespace) -> Classes:
    """Choose the cells: those with a usable label, at most `--max-cells` of them."""
    import numpy as np

    from geneformer_pretrain.errors import DataError
    from geneformer_pretrain.inference.evaluate import select_classes

    for option, column in (("--label", arguments.label), ("--groups", arguments.groups)):
        if column is not None and column not in table.column_names:
            raise DataError(
                f"{option} {column}: {arguments.cells[0]} has no such column; it has {', '.join(table.column_names)}."
            )
    chosen = np.arange(len(table))
    if len(chosen) > arguments.max_cells:
        say(f"{len(chosen):,} cells: {arguments.max_cells:,} of them are drawn (--max-cells).", error=True)
        chosen = np.sort(np.random.default_rng(arguments.seed).choice(chosen, arguments.max_cells, replace=False))
    table = table.take(chosen)
    groups = table[arguments.groups].to_pylist() if arguments.groups else None
    labels = table[arguments.label].to_pylist()
    classes = select_classes(labels, groups, label=arguments.label, group=arguments.groups or "")
    return replace(classes, kept=chosen[classes.kept])


def _components_of_counts(counts: list[str], table: pa.Table, classes: Classes, seed: int) -> Features:
    """Principal components of the log-normalised counts of the chosen cells, found by their cell ids."""
    from geneformer_pretrain.errors import DataError
    from geneformer_pretrain.inference.evaluate import log_normalised, principal_components
    from geneformer_pretrain.inference.evaluate_counts import counts_of_cells

    if "cell_id" not in table.column_names:
        raise DataError("--counts: the cells have no column cell_id by which counts could be found; leave it out.")
    ids = table["cell_id"].take(classes.kept).to_pylist()
    return principal_components(log_normalised(counts_of_cells(counts, ids)), seed)


def _losses(
    arguments: argparse.Namespace, tokens: np.ndarray, offsets: np.ndarray, classes: Classes, gene_set: GeneSet
) -> dict[str, float]:
    """Masked-token loss of the model, of random weights and of the genes' frequencies; empty without a head."""
    import numpy as np

    from geneformer_pretrain.inference.masked_loss import load_with_head, masked_loss, unigram_loss

    chosen = classes.kept
    if len(chosen) > LOSS_CELLS:
        chosen = np.sort(np.random.default_rng(arguments.seed).choice(chosen, LOSS_CELLS, replace=False))
    cells = [tokens[offsets[cell] : offsets[cell + 1]] for cell in chosen]
    flat, bounds = np.concatenate(cells), np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    special, mask = gene_set.num_special_tokens, gene_set.special_tokens["mask"]
    losses = {}
    for name, random_weights in (("model", False), ("random weights", True)):
        model = load_with_head(Path(arguments.model), random_weights=random_weights, seed=arguments.seed)
        if model is None:
            say(f"{arguments.model}: has no head for masked tokens, so there is no masked-token loss.", error=True)
            return {}
        losses[name] = masked_loss(
            model, flat, bounds, num_special_tokens=special, mask_token=mask, seed=arguments.seed
        )
    return losses | {"gene frequencies of these cells": unigram_loss(flat, special)}
