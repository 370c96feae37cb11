"""Command `embed`: embeddings of cells from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geneformer_pretrain.console import Summary
    from geneformer_pretrain.inference.corpus import CountsOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model_and_cells(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="embeddings in the order of the cells: .parquet or .h5ad",
    )
    parser.add_argument("--pooling", choices=["mean", "cls"], default="mean", help="mean over genes, or <cls>")
    parser.add_argument(
        "--genes", type=Path, metavar="FILE", help="also write the mean contextual embedding of each gene, .parquet"
    )
    parser.add_argument("--group-by", metavar="COLUMN", help="average genes for each value of this column of the cells")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs, and start anew")


def _layer(text: str) -> int:
    """Read `--layer`, which elsewhere names a layer of the counts."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of a hidden state; name a layer of counts with --counts-layer"
        ) from None


def add_model_and_cells(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that `embed` and `perturb` share."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a run's final_model, or another Hugging Face BERT")
    parser.add_argument(
        "cells", metavar="CELLS", nargs="+", help="a corpus; or counts (files, folders, globs), tokenized on the way"
    )
    parser.add_argument("--gene-set", type=Path, metavar="GENES", help="gene set of a model that brings none")
    parser.add_argument(
        "--layer",
        type=_layer,
        default=-2,
        metavar="N",
        help="hidden state: 0 is the embeddings, -1 the last, -2 the second to last",
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="cut longer cells; default: as the model's training did"
    )
    parser.add_argument("--pack-tokens", type=int, metavar="N", help="tokens of a forward pass; default: by device")
    counts = parser.add_argument_group("counts", "where they are in their files")
    counts.add_argument(
        "--gene-id-column", default="ensembl_id", metavar="NAME", help='column of var with gene ids, or "index"'
    )
    counts.add_argument(
        "--n-counts-column",
        metavar="NAME",
        help="column of obs with each cell's total; default: the sum of its counts",
    )
    counts.add_argument(
        "--filter-column",
        metavar="NAME",
        help="only cells with True or 1 in it; default: filter_pass if there is one",
    )
    matrix = counts.add_mutually_exclusive_group()
    matrix.add_argument("--counts-layer", metavar="NAME", help="layer with the counts, instead of X")
    matrix.add_argument("--raw", action="store_true", help="counts are in raw.X")
    counts.add_argument("--min-genes", type=int, default=0, metavar="N", help="leave out cells with fewer genes")
    counts.add_argument("--allow-noninteger", action="store_true", help="accept values that are no whole numbers")
    counts.add_argument(
        "--allow-low-match", action="store_true", help="accept that less than half of the counts are of known genes"
    )


def counts_options(arguments: argparse.Namespace) -> CountsOptions:
    """Options that say where counts are."""
    from geneformer_pretrain.inference.corpus import CountsOptions

    return CountsOptions(
        gene_id_column=arguments.gene_id_column,
        n_counts_column=arguments.n_counts_column,
        filter_column=arguments.filter_column,
        layer=arguments.counts_layer,
        raw=arguments.raw,
        min_genes=arguments.min_genes,
        allow_noninteger=arguments.allow_noninteger,
        allow_low_match=arguments.allow_low_match,
    )


def run(arguments: argparse.Namespace) -> Summary:
    """Embed cells."""
    from geneformer_pretrain.inference.embed import EmbedOptions, embed

    return embed(
        EmbedOptions(
            model=arguments.model,
            cells=arguments.cells,
            output=arguments.output,
            layer=arguments.layer,
            pooling=arguments.pooling,
            genes=arguments.genes,
            group_by=arguments.group_by,
            gene_set=arguments.gene_set,
            dtype=arguments.dtype,
            tokens=arguments.pack_tokens,
            max_tokens=arguments.max_tokens,
            overwrite=arguments.overwrite,
            counts=counts_options(arguments),
        )
    )
