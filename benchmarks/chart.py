"""Draws results of benchmarks/throughput.py (its --json) as a chart: a dot a measurement, on a logarithmic scale.

usage: python benchmarks/chart.py docs/performance.json docs/performance.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any


def label(row: dict[str, Any]) -> str:
    """Name a measurement: code, engine and number of GPUs."""
    if row["engine"] == "baseline":
        return f"{row['model']}  {row['variant']}"
    gpus = "1 GPU" if row["nproc"] == 1 else f"{row['nproc']} GPUs, {row['engine'].upper()}"
    return f"{row['model']}  this project, {row['variant']}, {gpus}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens per second and GPU; rows of one model stay together, the largest model last."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines
    matplotlib.rcParams["svg.hashsalt"] = "geneformer"  # the same file each time
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.8 + 0.3 * len(rows)))
    for place, row in enumerate(rows):
        color = "tab:gray" if row["engine"] == "baseline" else "tab:blue"
        speed = row["tokens_per_second"]
        axis.plot(speed, place, "o", color=color)
        text = f"{speed / 1e6:.2f}M" if speed >= 1e6 else f"{speed / 1e3:.3g}k"
        axis.annotate(text, (speed, place), xytext=(8, 0), textcoords="offset points", va="center")
        if place and row["model"] != rows[place - 1]["model"]:
            axis.axhline(place - 0.5, color="lightgray", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="unpadded tokens/s per GPU, NVIDIA H200 (logarithmic)")
    axis.grid(axis="x", color="lightgray", linewidth=0.5)
    axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON of benchmarks/throughput.py")
    parser.add_argument("chart", type=Path, help="SVG, PNG or PDF to write")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.chart)


if __name__ == "__main__":
    main()
