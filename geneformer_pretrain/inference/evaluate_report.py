"""The report of an evaluation: one table with the model and its baselines, a reading of it, and pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from geneformer_pretrain.console import amount
from geneformer_pretrain.figures import label, save_figure
from geneformer_pretrain.inference.evaluate import (
    COMPONENTS,
    MIN_CELLS,
    NEIGHBOURS,
    Classes,
    Features,
    IntArray,
    Split,
    flat_map,
    unseen_cells,
)

FORMAT_VERSION = 1
MODEL = "model"
MAX_DRAWN = 5000
"""Cells of the picture, drawn at random if there are more."""

MAX_REASONS = 4
"""Reasons for leaving cells out that the terminal lists."""

LABELLED_CLASSES = 40
"""Classes up to which a legend is legible."""


def report_values(
    classes: Classes,
    scores: Mapping[str, Mapping[str, Any]],
    majority: Mapping[str, float],
    losses: Mapping[str, float],
    *,
    evaluated: Mapping[str, Any],
    label: str,
    group: str | None,
    counts_options: Mapping[str, Any] | None,
    folds: Sequence[Split],
    seed: int,
) -> dict[str, Any]:
    """Make the content of `report.json`.

    Parameters
    ----------
    scores
        `score_features` of each representation by its name; the model's is `MODEL`.
    majority
        `score_majority`.
    losses
        Masked-token losses by name, nats; empty if the model has no head.
    evaluated
        `model` and `cells_of`, as they were named, `layer` and `pooling`.
    counts_options
        `CountsOptions` with which counts were read; None if none were.
    """
    names, counts = np.unique(np.array(classes.names)[classes.codes], return_counts=True)
    rows = {}
    for name, score in scores.items():
        row: dict[str, Any] = {metric: score[metric] for metric in ("silhouette", "ari", "nmi")}
        for kind in ("logistic", "neighbours"):
            row[kind] = {metric: value for metric, value in score[kind].items() if metric != "predicted"}
        rows[name] = row
    return {
        "format_version": FORMAT_VERSION,
        **evaluated,
        "label": label,
        "groups": group,
        "cells": len(classes.codes),
        "classes": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "left_out": classes.left_out,
        "folds": len(folds),
        "cells_of_unseen_classes": unseen_cells(classes, folds),
        "seed": seed,
        "counts_options": None if counts_options is None else dict(counts_options),
        "representations": rows,
        "majority_class": dict(majority),
        "masked_loss": dict(losses),
    }


def table_lines(values: Mapping[str, Any]) -> list[str]:
    """Format the table in Markdown, one row a representation."""
    lines = [
        "| | logistic macro F1 | accuracy | kNN macro F1 | accuracy | silhouette | ARI | NMI |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in values["representations"].items():
        logistic, neighbours = row["logistic"], row["neighbours"]
        spread = np.std(logistic["macro_f1_folds"], ddof=1)
        cells = [
            f"{logistic['macro_f1']:.3f} ± {spread:.3f}",
            *(f"{x:.3f}" for x in (logistic["accuracy"], neighbours["macro_f1"], neighbours["accuracy"])),
            *(f"{row[metric]:.3f}" for metric in ("silhouette", "ari", "nmi")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    majority = values["majority_class"]
    lines.append(f"| largest class | {majority['macro_f1']:.3f} | {majority['accuracy']:.3f} | | | | | |")
    return lines


def reading(values: Mapping[str, Any]) -> list[str]:
    """Compare the model with each baseline in words, fold by fold."""
    rows = values["representations"]
    mine = np.array(rows[MODEL]["logistic"]["macro_f1_folds"])
    lines = []
    for name, row in rows.items():
        if name == MODEL:
            continue
        theirs = np.array(row["logistic"]["macro_f1_folds"])
        better = int((mine > theirs).sum())
        difference = rows[MODEL]["logistic"]["macro_f1"] - row["logistic"]["macro_f1"]
        lines.append(
            f"Against {name}: logistic macro F1 {difference:+.3f}; the model is ahead in {better} of {len(mine)} folds."
        )
    return lines


def write_report(
    folder: Path,
    values: Mapping[str, Any],
    classes: Classes,
    features: Mapping[str, Features],
    predicted: IntArray,
    seed: int,
) -> None:
    """Write `report.json`, `report.md`, `map.png` and `confusion.png` into a folder.

    Parameters
    ----------
    features
        [n, H] of each representation, for the map.
    predicted
        Class that the logistic regression on the model's embeddings gave to each cell, when it was not trained on it.
    """
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n")
    method = plot_maps(folder / "map.png", features, classes, seed)
    plot_confusion(folder / "confusion.png", classes, predicted)
    (folder / "report.md").write_text("\n".join(_markdown(values, method)) + "\n")


def _markdown(values: Mapping[str, Any], method: str) -> list[str]:
    held_out = f"whole groups ({values['groups']})" if values["groups"] else "cells, stratified by class"
    lines = [
        f"# Evaluation on {values['label']}",
        "",
        f"Model `{values['model']}`, layer {values['layer']}, {values['pooling']}; cells of "
        f"`{' '.join(values['cells_of'])}`.",
        "",
        f"{values['cells']:,} cells of {len(values['classes'])} classes; {values['folds']} folds hold out {held_out}.",
        "",
        *([] if values["counts_options"] is None else [_options_line(values["counts_options"]), ""]),
        *table_lines(values),
        "",
        f"Logistic regression and {NEIGHBOURS} nearest neighbours are scored on cells that they were not trained on; ± "
        "is the standard deviation over folds. ARI and NMI compare the classes with as many KMeans clusters. Principal "
        f"components are the first {COMPONENTS}.",
        "",
        *(f"- {line}" for line in reading(values)),
    ]
    if values["cells_of_unseen_classes"]:
        lines += [
            "",
            f"Cells of a class that no training cell of their fold has: {values['cells_of_unseen_classes']:,}.",
        ]
    if values["masked_loss"]:
        lines += ["", "| | masked-token loss, nats |", "|---|---|"]
        lines += [f"| {name} | {loss:.3f} |" for name, loss in values["masked_loss"].items()]
    lines += ["", "| class | cells |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in values["classes"].items()]
    if values["left_out"]:
        lines += ["", f"Left out: {_left_out(values)}. A class needs {MIN_CELLS} cells."]
    lines += ["", f"![{method} of each representation](map.png)", "", "![Confusion of the classes](confusion.png)"]
    return lines


def _options_line(options: Mapping[str, Any]) -> str:
    """Say with which options of the command line counts were read."""
    flags = {name: f"--{'counts-layer' if name == 'layer' else name.replace('_', '-')}" for name in options}
    words = [flags[name] if value is True else f"{flags[name]} {value}" for name, value in options.items() if value]
    return f"Counts were read with `{' '.join(words)}`."


def _left_out(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {amount(count, 'cell')}" for name, count in values["left_out"].items())


def plot_maps(path: Path, features: Mapping[str, Features], classes: Classes, seed: int) -> str:
    """Draw one map of the cells for each representation, coloured by class; return the method's name."""
    drawn = np.arange(len(classes.codes))
    if len(drawn) > MAX_DRAWN:
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, MAX_DRAWN, replace=False))
    codes, number = classes.codes[drawn], len(classes.names)
    if number <= 20:  # tab20 has neighbours of one hue
        colours = colormaps["tab10" if number <= 10 else "tab20"](np.arange(number))
    else:
        colours = colormaps["turbo"](np.linspace(0, 1, number))
    figure = Figure(figsize=(4.2 * len(features) + 2.2, 4.2), layout="constrained")
    panels = figure.subplots(1, len(features), squeeze=False)[0]
    method = ""
    for axes, (name, matrix) in zip(panels, features.items(), strict=True):
        places, method = flat_map(matrix[drawn], seed)
        axes.scatter(*places.T, s=6, c=colours[codes], linewidths=0, rasterized=True)
        axes.set(title=name, xticks=[], yticks=[], xlabel=f"{method} 1", ylabel=f"{method} 2")
    if number <= LABELLED_CLASSES:
        for code, name in enumerate(classes.names):
            panels[-1].scatter([], [], s=16, color=colours[code], label=label(name))
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    save_figure(figure, path)
    return method


def plot_confusion(path: Path, classes: Classes, predicted: IntArray) -> None:
    """Draw how often each class is given each answer, as shares of the class's cells."""
    shares = confusion_matrix(classes.codes, predicted, labels=range(len(classes.names)), normalize="true")
    side = 3 + 0.3 * len(classes.names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    ticks, names = range(len(classes.names)), [label(name) for name in classes.names]
    axes.set_xticks(ticks, names, rotation=90, fontsize=7)
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set(xlabel="answer of the logistic regression", ylabel="class")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class's cells")
    save_figure(figure, path)


def summary_lines(values: Mapping[str, Any], folder: Path) -> list[str]:
    """Format the result for the terminal."""
    lines = [
        f"{values['cells']:,} cells, {len(values['classes'])} classes of {values['label']}, {values['folds']} folds."
    ]
    for name, row in values["representations"].items():
        lines.append(
            f"  {name}: logistic macro F1 {row['logistic']['macro_f1']:.3f}, kNN {row['neighbours']['macro_f1']:.3f}, "
            f"silhouette {row['silhouette']:.3f}, ARI {row['ari']:.3f}"
        )
    lines += [f"  {line}" for line in reading(values)]
    if values["masked_loss"]:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in values["masked_loss"].items())
        lines.append(f"  masked-token loss, nats: {losses}")
    if values["left_out"]:
        cells, reasons = sum(values["left_out"].values()), len(values["left_out"])
        few = _left_out(values) if reasons <= MAX_REASONS else f"{cells:,} cells for {reasons} reasons, see report.md"
        lines.append(f"  left out: {few}")
    return [*lines, f"Written: {folder}/report.md, report.json, map.png, confusion.png"]
