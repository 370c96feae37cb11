"""`curves`: a picture of a run's losses, learning rate and speed, from its metrics.jsonl."""

import argparse
from pathlib import Path

from geneformer_pretrain.console import Summary
from geneformer_pretrain.run.curves import NAME, draw_curves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `curves`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="a run's training.checkpoint_dir")
    parser.add_argument("--output", type=Path, metavar="PNG", help=f"picture to write; RUN_FOLDER/{NAME} if not given")


def run(arguments: argparse.Namespace) -> Summary:
    """Draw the curves of the run that the arguments name."""
    png = arguments.output or arguments.run_folder / NAME
    last = draw_curves(arguments.run_folder / "metrics.jsonl", png)
    losses = [f"{name} {last[name]:.4f}" for name in ("loss", "validation_loss") if last.get(name) is not None]
    return Summary(
        [f"step {last['step']:,}: {', '.join(losses)}", f"curves  {png}"],
        {"picture": str(png), "last": last},
    )
