"""Command `perturb`: in-silico perturbation and its statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_pretrain.commands.embed import add_model_and_cells, counts_options

if TYPE_CHECKING:
    from geneformer_pretrain.console import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_and_cells(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for scores and statistics")
    parser.add_argument(
        "--mode",
        choices=["delete", "overexpress", "shift"],
        required=True,
        help="remove genes, put them in front, or move them by --shift",
    )
    parser.add_argument(
        "--genes",
        default="all",
        metavar="all|ID,ID|FILE",
        help="each gene of a cell, a list, or a file of ids",
    )
    parser.add_argument("--together", action="store_true", help="perturb all listed genes at once")
    parser.add_argument("--anchor", metavar="ID", help="perturb this gene together with each of --genes")
    parser.add_argument(
        "--shift", type=float, metavar="FRACTION", help="share of a cell's genes to move by, positive to the front"
    )
    parser.add_argument("--states", metavar="COLUMN", help="column of the cells with their states")
    parser.add_argument(  # torchrun takes --start for an option of its own
        "--start", "--start-state", metavar="STATE", help="state of the cells to perturb"
    )
    parser.add_argument("--goal", metavar="STATE", help="state that shifts lead to if they are positive")
    parser.add_argument("--alternatives", default="", metavar="STATE,STATE", help="further states to measure shifts to")
    parser.add_argument(
        "--replicates", metavar="COLUMN", help="column, such as the donor, whose values are the replicates of the tests"
    )
    parser.add_argument("--max-cells", type=int, metavar="N", help="perturb a random choice of so many cells")
    parser.add_argument("--seed", type=int, default=0, help="decides the choice of cells")
    parser.add_argument("--no-statistics", action="store_true", help="write scores alone")
    parser.add_argument("--overwrite", action="store_true", help="delete earlier results there, and start anew")


def run(arguments: argparse.Namespace) -> Summary:
    """Perturb cells."""
    from geneformer_pretrain.inference.perturb import perturb
    from geneformer_pretrain.inference.perturbations import PerturbOptions

    return perturb(
        PerturbOptions(
            model=arguments.model,
            cells=arguments.cells,
            output=arguments.output,
            mode=arguments.mode,
            genes=arguments.genes,
            together=arguments.together,
            anchor=arguments.anchor,
            fraction=arguments.shift,
            layer=arguments.layer,
            states=arguments.states,
            start=arguments.start,
            goal=arguments.goal,
            alternatives=[name for name in arguments.alternatives.split(",") if name],
            replicates=arguments.replicates,
            max_cells=arguments.max_cells,
            seed=arguments.seed,
            gene_set=arguments.gene_set,
            dtype=arguments.dtype,
            tokens=arguments.pack_tokens,
            max_tokens=arguments.max_tokens,
            overwrite=arguments.overwrite,
            statistics=not arguments.no_statistics,
            counts=counts_options(arguments),
        )
    )
