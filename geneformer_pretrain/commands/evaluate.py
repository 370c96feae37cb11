"""Command `evaluate`: the worth of a model's embeddings on labelled cells, beside baselines."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from geneformer_pretrain.commands.embed import add_model_and_cells, counts_options

if TYPE_CHECKING:
    from geneformer_pretrain.console import Summary
    from geneformer_pretrain.inference.evaluate_cells import ChosenCells
    from geneformer_pretrain.tokenization.gene_set import GeneSet

RANDOM = "random weights"
LOSS_CELLS = 1000
"""Cells of the masked-token loss, drawn at random if there are more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_and_cells(parser)
    parser.add_argument("--label", metavar="COLUMN", required=True, help="column that names the class of each cell")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the report")
    parser.add_argument("--groups", metavar="COLUMN", help="hold out whole groups, such as donors")
    parser.add_argument(
        "--counts", metavar="COUNTS", nargs="+", help="counts of the cells of a corpus, for one more baseline"
    )
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="mean over genes, or <cls>")
    parser.add_argument("--max-cells", metavar="N", type=int, default=20_000, help="draw so many if there are more")
    parser.add_argument("--seed", type=int, default=0, help="seed of folds, draws and random weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")


def run(arguments: argparse.Namespace) -> Summary:
    """Embed the cells with the model and with random weights, score both and the baselines, and write the report."""
    from geneformer_pretrain.errors import require
    from geneformer_pretrain.files import new_folder, require_new_folder

    own = "report.json", "report.md", "map.png", "confusion.png"
    require_new_folder(arguments.output, overwrite=arguments.overwrite, own=own)
    require(os.environ.get("WORLD_SIZE", "1") == "1", "evaluate runs in one process; start it without torchrun.")
    require(arguments.max_cells > 0, f"--max-cells {arguments.max_cells}: at least 1 is needed.")
    with (
        TemporaryDirectory(prefix="evaluate-") as work,
        new_folder(arguments.output, overwrite=arguments.overwrite) as folder,
    ):
        return _evaluate(arguments, Path(work), folder)


def _evaluate(arguments: argparse.Namespace, work: Path, report: Path) -> Summary:
    import numpy as np

    from geneformer_pretrain.console import Summary, say
    from geneformer_pretrain.inference.cells import open_cells
    from geneformer_pretrain.inference.corpus import find_corpus, is_corpus
    from geneformer_pretrain.inference.evaluate import (
        Features,
        log_normalised,
        principal_components,
        score_features,
        score_majority,
        split_folds,
        token_presence,
    )
    from geneformer_pretrain.inference.evaluate_cells import (
        choose_cells,
        embed_corpus,
        save_random_weights,
        write_corpus,
    )
    from geneformer_pretrain.inference.evaluate_counts import Wanted, counts_of_cells, options_of_corpus
    from geneformer_pretrain.inference.evaluate_report import MODEL, report_values, summary_lines, write_report
    from geneformer_pretrain.inference.model import load_model

    seed, options = arguments.seed, counts_options(arguments)
    model = load_model(arguments.model, gene_set=arguments.gene_set, dtype=arguments.dtype)
    needed = {"--label": arguments.label, "--groups": arguments.groups}
    corpus = find_corpus(arguments.cells, model, work, options, is_main=True, needed=needed)
    cells = open_cells(corpus, model, max_tokens=arguments.max_tokens)
    chosen = choose_cells(cells, arguments.label, arguments.groups, max_cells=arguments.max_cells, seed=seed)
    folds = split_folds(chosen.classes, seed)
    features: dict[str, Features] = {}
    if is_corpus(arguments.cells[0]):
        paths, options = arguments.counts, options_of_corpus(arguments.cells[0], options)
    else:
        paths = arguments.counts or arguments.cells
    if paths:  # first, as it can fail in the shortest time
        cells.require_columns(["cell_id"], "--counts finds cells by it")
        wanted = Wanted(
            chosen.ids,
            chosen.classes.kept,
            lambda: cells.ids(np.arange(cells.num_cells)).to_pylist(),
            chosen.tokens,
            chosen.offsets,
        )
        counts = counts_of_cells(paths, wanted, model.gene_set, options)
        features["PCA of log-normalised counts"] = principal_components(
            log_normalised(counts.matrix, counts.totals), seed
        )
    presence = token_presence(chosen.tokens, chosen.offsets, model.vocab_size)
    features["PCA of token presence"] = principal_components(presence, seed)
    chosen_corpus = write_corpus(chosen, model.gene_set, work / "corpus")
    models = {MODEL: arguments.model, RANDOM: save_random_weights(arguments.model, work / "random", seed)}
    for name, folder in models.items():
        features[name] = embed_corpus(
            folder,
            arguments.gene_set or arguments.model,
            chosen_corpus,
            work / f"{folder.name}.parquet",
            layer=arguments.layer,
            pooling=arguments.pooling,
            dtype=arguments.dtype,
            tokens=arguments.pack_tokens,
            max_tokens=cells.max_tokens,
        )
    features = {name: features[name] for name in (*models, *(name for name in features if name not in models))}
    scores = {}
    for name, vectors in features.items():
        say(f"Scoring: {name}", error=True)
        scores[name] = score_features(vectors, chosen.classes, folds, seed)
    values = report_values(
        chosen.classes,
        scores,
        score_majority(chosen.classes),
        _losses(models, chosen, model.gene_set, seed),
        evaluated={
            "model": str(arguments.model),
            "cells_of": [str(path) for path in arguments.cells],
            "layer": arguments.layer,
            "pooling": arguments.pooling,
        },
        label=arguments.label,
        group=arguments.groups,
        counts_options=asdict(options) if paths else None,
        folds=folds,
        seed=seed,
    )
    write_report(report, values, chosen.classes, features, scores[MODEL]["logistic"]["predicted"], seed)
    return Summary(summary_lines(values, arguments.output), values)


def _losses(models: dict[str, Path], chosen: ChosenCells, gene_set: GeneSet, seed: int) -> dict[str, float]:
    """Masked-token loss of each model and of the genes' frequencies; empty if the model has no head."""
    import numpy as np

    from geneformer_pretrain.console import say
    from geneformer_pretrain.inference.evaluate_cells import random_subset
    from geneformer_pretrain.inference.masked_loss import load_with_head, masked_loss, unigram_loss

    cells = random_subset(chosen, LOSS_CELLS, seed)
    tokens, offsets = np.concatenate(cells), np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    losses = {}
    for name, folder in models.items():
        model = load_with_head(folder)
        if model is None:
            say(f"{folder}: has no head for masked tokens, so there is no masked-token loss.", error=True)
            return {}
        losses[name] = masked_loss(
            model,
            tokens,
            offsets,
            num_special_tokens=gene_set.num_special_tokens,
            mask_token=gene_set.special_tokens["mask"],
            seed=seed,
        )
    return losses | {"gene frequencies of these cells": unigram_loss(tokens, gene_set.num_special_tokens)}
