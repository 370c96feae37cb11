"""Plots of perturbation statistics: perturbations ranked by their mean score, and a volcano."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geneformer_pretrain.figures import label, save_figure

SIGNIFICANT = 0.05
LABELLED, LISTED = 12, 8
"""Perturbations that get their name in the volcano, and at each end of the ranked plot."""

PLAIN, MARKED = "#9aa5b1", "#c0392b"


def plot_ranked(table: pa.Table, score: str, test: str, path: Path) -> None:
    """Draw the mean score of every perturbation in ascending order, and list those at the two ends.

    The list gives their numbers of cells: means of few cells are found at the ends, whatever the gene.

    Parameters
    ----------
    table
        `genes.parquet`.
    score
        Name of the score.
    test
        Prefix of the adjusted p-values that mark a perturbation: `q` or `replicate_q`.
    path
        PNG to write.
    """
    mean, q, names = _columns(table, f"mean_{score}", f"{test}_{score}")
    order = np.argsort(mean, kind="stable")
    order = order[~np.isnan(mean[order])]
    place = np.arange(1, len(order) + 1)
    significant = q[order] < SIGNIFICANT
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(place, mean[order], s=8, c=PLAIN, linewidths=0, rasterized=True)
    axes.scatter(
        place[significant], mean[order][significant], s=12, c=MARKED, linewidths=0, label=f"{test} < {SIGNIFICANT}"
    )
    listed = np.array([f"{name} ({cells:,})" for name, cells in zip(names, table["cells"].to_pylist(), strict=True)])
    lowest, highest = listed[order[:LISTED]], listed[order[::-1][:LISTED]]
    # The points rise from the lower left to the upper right and leave the other two corners free.
    axes.text(0.02, 0.98, "\n".join(["lowest (cells)", *lowest]), fontsize=7, va="top", transform=axes.transAxes)
    axes.text(0.98, 0.02, "\n".join(["highest (cells)", *highest]), fontsize=7, ha="right", transform=axes.transAxes)
    axes.set(xlabel="perturbations, by mean score", ylabel=label(f"mean {score}"))
    if significant.any():
        axes.legend(loc="upper center", frameon=False)
    _save(figure, axes, path)


def plot_volcano(table: pa.Table, score: str, test: str, path: Path) -> None:
    """Draw effect against adjusted p-value for every perturbation, and name the most significant.

    With replicates the effect is their mean, else the rank-based effect size against all pooled. Parameters are
    those of `plot_ranked`.
    """
    effect_column = f"replicate_mean_{score}" if test.startswith("replicate") else f"effect_{score}"
    effect, q, names = _columns(table, effect_column, f"{test}_{score}")
    there = ~np.isnan(effect) & ~np.isnan(q)
    effect, q, names = effect[there], q[there], names[there]
    smallest = np.min(q[q > 0], initial=1.0)  # a p-value that underflowed is drawn at the smallest that did not
    height = -np.log10(np.maximum(q, smallest))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(effect, height, s=10, c=np.where(q < SIGNIFICANT, MARKED, PLAIN), linewidths=0, rasterized=True)
    axes.axhline(-np.log10(SIGNIFICANT), color="black", linewidth=0.6, linestyle=":")
    axes.axvline(0, color="black", linewidth=0.6, linestyle=":")
    most = np.argsort(q, kind="stable")[:LABELLED]
    most = most[q[most] < SIGNIFICANT]
    # Many adjusted p-values are equal: names stand one below the other beside the picture, a line leads to each point.
    line = {"arrowstyle": "-", "linewidth": 0.4, "color": PLAIN, "shrinkA": 0, "relpos": (0, 0.5)}
    for place, gene in enumerate(most[np.lexsort((-effect[most], -height[most]))]):
        axes.annotate(
            names[gene], (effect[gene], height[gene]), (1.02, 0.98 - 0.05 * place), textcoords="axes fraction",
            fontsize=7, va="center", arrowprops=line,
        )  # fmt: skip
    axes.set(xlabel=label(effect_column), ylabel=label(f"-log10 {test}"))
    _save(figure, axes, path)


def _columns(table: pa.Table, value: str, q: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = table["perturbation"]
    if "symbol" in table.column_names:
        names = pc.coalesce(table["symbol"], names)
    return table[value].to_numpy(), table[q].to_numpy(), np.array([label(name) for name in names.to_pylist()], object)


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
