"""Pictures of a corpus, wide enough for a slide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from geneformer_pretrain.console import amount
from geneformer_pretrain.data.inspection import Group
from geneformer_pretrain.figures import label, save_figure

BLUE, ORANGE, GREY = "#2563a8", "#d9762b", "#6b7280"


def _new_figure(title: str, height: float = 4.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    return figure, axes


def _thousands(value: float, _: object = None) -> str:
    return f"{value:,.0f}"


def draw_lengths(path: Path, lengths: np.ndarray, cap: int | None) -> None:
    """Draw a histogram of the cells' lengths, with the length at which cells were cut.

    Parameters
    ----------
    lengths
        int [cells].
    cap
        None if no length stands out.
    """
    figure, axes = _new_figure(f"Tokens per cell ({amount(len(lengths), 'cell')})")
    longest = int(lengths.max())
    axes.hist(lengths, bins=min(64, longest), range=(0, longest + 1), color=BLUE)
    axes.axvline(np.median(lengths), color=GREY, linestyle="--", label=f"median {np.median(lengths):,.0f}")
    if cap is not None:
        share = (lengths == cap).mean()
        axes.axvline(cap, color=ORANGE, linewidth=2, label=f"cut at {cap:,}: {share:.1%} of the cells")
    axes.set_xlabel("tokens per cell", fontsize=12)
    axes.set_ylabel("cells", fontsize=12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_thousands))
    axes.legend(frameon=False, fontsize=11)
    save_figure(figure, path)


def draw_genes(path: Path, counts: np.ndarray, num_cells: int) -> None:
    """Draw the share of cells that hold each gene, genes in order of that share.

    Parameters
    ----------
    counts
        int [genes], cells that hold each gene.
    """
    seen = np.sort(counts[counts > 0])[::-1]
    figure, axes = _new_figure(f"Genes by frequency ({amount(len(seen), 'gene')} seen)")
    axes.plot(np.arange(1, len(seen) + 1), 100 * seen / num_cells, color=BLUE, linewidth=2)
    axes.set_yscale("log")
    axes.set_xlabel("genes, most frequent first", fontsize=12)
    axes.set_ylabel("cells that hold the gene, %", fontsize=12)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color="#e5e7eb")
    save_figure(figure, path)


def draw_groups(path: Path, column: str, groups: Sequence[Group], most: int) -> None:
    """Draw the tokens of each group as bars, the largest on top; further ones are summed up."""
    shown = sorted(groups, key=lambda group: -group.tokens)
    rest = shown[most:]
    bars = [(group.value, group.tokens) for group in shown[:most]]
    if rest:
        bars.append((amount(len(rest), "other"), sum(group.tokens for group in rest)))
    figure, axes = _new_figure(f"Tokens by {label(column)}", height=1.5 + 0.32 * len(bars))
    places = np.arange(len(bars))
    axes.barh(places, [tokens for _, tokens in bars], color=[BLUE] * len(shown[:most]) + [GREY] * bool(rest))
    axes.set_yticks(places, [label(name) for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("tokens", fontsize=12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    save_figure(figure, path)


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
