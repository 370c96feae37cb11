"""training_curves.png: a run's losses, learning rate and speed, from its metrics.jsonl."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geneformer_pretrain.console import say
from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.figures import save_figure
from geneformer_pretrain.files import replacing

log = logging.getLogger(__name__)

NAME = "training_curves.png"
DRAWN = ("step", "loss", "validation_loss", "validation_unigram_loss", "learning_rate", "tokens_per_second")
SMOOTHING = 200
"""Points that a smoothed curve has at least, where there are so many steps."""


def draw_at_end(folder: Path) -> None:
    """Draw the curves of a run that is complete into its folder; a failure is logged and raises nothing."""
    png = folder / NAME
    try:
        draw_curves(folder / "metrics.jsonl", png)
    except Exception as error:  # Of any kind: the run itself is complete.
        log.warning("%s is not drawn (%s: %s)", png, type(error).__name__, str(error).partition("\n")[0])
    else:
        say(f"curves       {png}")


def draw_curves(metrics: Path, png: Path) -> dict[str, Any]:
    """Draw loss, validation loss, learning rate and tokens per second over the steps of a run.

    Parameters
    ----------
    metrics
        A run's metrics.jsonl. A last line that is torn, as while the run writes, is left out.
    png
        Picture to write, in place of an earlier one.

    Returns
    -------
    dict
        The last value of each metric.

    Raises
    ------
    DataError
        The file is not there, has no steps, or a line of it is not a record.
    OutputError
        The picture cannot be written.
    """
    from matplotlib.figure import Figure

    records, last = read_records(metrics)
    figure = Figure(figsize=(9, 8), layout="constrained")
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    _curve(loss, records, "loss", "training")
    steps, values = _points(records, "validation_loss")
    if steps:
        loss.plot(steps, values, "o-", color="tab:orange", markersize=3, label="validation")
    _, unigram = _points(records, "validation_unigram_loss")
    if unigram:
        loss.axhline(unigram[-1], color="tab:gray", linestyle="--", label="model without context")
    loss.set(ylabel="loss (nats a masked token)", title=str(metrics.parent).replace("$", r"\$"))
    loss.legend()
    rate.plot(*_points(records, "learning_rate"), color="tab:blue")
    rate.set(ylabel="learning rate")
    _curve(speed, records, "tokens_per_second", "tokens/s")
    speed.set(ylabel="tokens/s", xlabel="step", ylim=(0, None))
    for axis in (loss, rate, speed):
        axis.grid(alpha=0.3)
    try:
        with replacing(png) as temporary:
            save_figure(figure, temporary, dpi=120)
    except OSError as error:
        raise OutputError(f"{png}: cannot be written ({error.strerror}); choose another --output.") from error
    return last


def read_records(metrics: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read a metrics.jsonl.

    Returns
    -------
    records : list of dict
        The values that are drawn, of each step; of a long run all of them would take a gigabyte.
    last : dict
        The last value of each metric.

    Raises
    ------
    DataError
        As `draw_curves`.
    """
    try:
        lines = metrics.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{metrics}: {error.strerror}; name the training.checkpoint_dir of a run.") from error
    records: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for number, line in enumerate(lines[:-1], 1):  # What follows the last newline is torn, or nothing.
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{metrics}, line {number}: not a record of a step; mend or move the file away.") from error
        records.append({name: record[name] for name in DRAWN if name in record})
        last |= {name: value for name, value in record.items() if value is not None}
    if not records:
        raise DataError(f"{metrics}: no step is recorded yet.")
    return records, last


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values where the metric is there and a number."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _curve(axis: Any, records: Sequence[dict[str, Any]], name: str, label: str) -> None:
    """Draw each step faintly and medians over neighbouring steps above it."""
    from statistics import median

    steps, values = _points(records, name)
    width = max(1, len(steps) // SMOOTHING)
    if width == 1:
        axis.plot(steps, values, color="tab:blue", label=label)
        return
    axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.5)
    chunks = range(0, len(steps), width)
    middle = [median(steps[start : start + width]) for start in chunks]
    axis.plot(middle, [median(values[start : start + width]) for start in chunks], color="tab:blue", label=label)
    axis.set(ylim=_limits(values))


def _limits(values: list[float]) -> tuple[float, float]:
    """Return limits that leave out single outliers: the middle 99.8% and a margin."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 1000], ordered[-1 - len(ordered) // 1000]
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
