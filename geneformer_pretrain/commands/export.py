"""Command `export`: a checkpoint of a run, complete or stopped, to a plain Hugging Face BERT."""

import argparse
from pathlib import Path

from geneformer_pretrain.console import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="STEP_FOLDER|RUN_FOLDER",
        help="a step_N folder, or a run's folder, of which the newest good checkpoint is exported; a run that is "
        "training may go on",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the exported model")
    parser.add_argument(
        "--gene-set",
        type=Path,
        metavar="GENES",
        help="gene-set folder to copy into the export; default: that of the run",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(arguments: argparse.Namespace) -> Summary:
    """Export one checkpoint, whichever engine wrote it; needs a CPU and host memory for the weights in FP32.

    Raises
    ------
    UserError
        No usable checkpoint, an output that exists, or a gene set of another vocabulary.
    """
    from geneformer_pretrain.checkpoint.export import (
        CONFIG_FILE,
        GENE_SET_SUFFIXES,
        WEIGHTS_FILE,
        find_checkpoint,
        read_weights,
        write_model,
    )
    from geneformer_pretrain.files import require_new_folder

    own = WEIGHTS_FILE, CONFIG_FILE, *(f"*{suffix}" for suffix in GENE_SET_SUFFIXES)
    require_new_folder(arguments.output, overwrite=arguments.overwrite, own=own, what="model")
    folder, passed_over = find_checkpoint(arguments.checkpoint)
    weights, architecture, seq_length = read_weights(folder)
    gene_set = arguments.gene_set or _gene_set_of_run(folder.parent)
    if gene_set is not None:
        _require_same_vocabulary(gene_set, architecture["vocab_size"])
    write_model(weights, architecture, seq_length, arguments.output, gene_set=gene_set)
    parameters = sum(tensor.numel() for tensor in weights.values())
    lines = [*passed_over, f"Exported {folder} to {arguments.output}: {parameters:,} parameters in FP32."]
    if gene_set is not None:
        lines.append(f"With the gene set {gene_set}.")
    return Summary(
        lines,
        {
            "checkpoint": str(folder),
            "output": str(arguments.output),
            "step": int(folder.name.removeprefix("step_")),
            "parameters": parameters,
        },
    )


def _gene_set_of_run(run: Path) -> Path | None:
    """Return the gene set that a run was trained with, by its config.yaml.

    Raises
    ------
    DataError
        It is not where it was.
    """
    import yaml

    from geneformer_pretrain.errors import DataError
    from geneformer_pretrain.run.record import CONFIG_FILE

    try:
        given = yaml.safe_load((run / CONFIG_FILE).read_text())["data"]["gene_set"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):  # a step folder by itself, or a run of release 0.1
        return None
    if given is not None and not Path(given).is_dir():
        raise DataError(
            f"{run / CONFIG_FILE} names the gene set {given}, which is not there: name it with --gene-set (a "
            "run's final_model has a copy)."
        )
    return None if given is None else Path(given)


def _require_same_vocabulary(gene_set: Path, vocab_size: int) -> None:
    import pyarrow.parquet as pq

    from geneformer_pretrain.errors import DataError

    file = gene_set / "genes.parquet"
    if not file.is_file():
        raise DataError(f"{gene_set} is no gene-set folder: genes.parquet is missing.")
    tokens = pq.read_metadata(file).num_rows
    if tokens != vocab_size:
        raise DataError(f"{gene_set} has {tokens:,} tokens, but the model has {vocab_size:,}: give its own gene set.")
