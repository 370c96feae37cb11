"""`plan`: memory, time, disk and cost of a run, before it is started and without a GPU."""

import argparse
import json
import math
from dataclasses import asdict

from geneformer_pretrain.console import Summary

SAMPLE = "sample_data/cells.parquet"
"""The shipped `data.path`, a corpus too small to plan with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `plan`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys of the configuration to change; data.path=CORPUS has its lengths read",
    )
    parser.add_argument("--config-name", default="l0_sanity", metavar="NAME", help="configuration, as for train.py")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--gpu", default="h100", metavar="CARD", help="h100, h200, b200, a100, a100-40gb, l40s, rtx4090"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one node")
    parser.add_argument(
        "--network", type=float, default=400.0, metavar="GBPS", help="Gb/s between nodes that each GPU has"
    )
    parser.add_argument(
        "--disk", type=float, default=0.54, metavar="GBPS", help="GB/s that checkpoints are written with, all ranks"
    )
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument(
        "--corpus", metavar="PATH", help="corpus with its lengths and vocabulary; default: data.path, if given"
    )
    corpus.add_argument(
        "--tokens", type=float, metavar="N", help="tokens of a corpus with lengths like Genecorpus, such as 2e9"
    )
    parser.add_argument("--price", type=float, metavar="P", help="price of one GPU-hour")


def run(arguments: argparse.Namespace) -> Summary:
    """Plan the run that the arguments describe."""
    from geneformer_pretrain.config.compose import load_config, read_overrides
    from geneformer_pretrain.data.vocabulary import apply_gene_set, load_gene_set, require_gene_set
    from geneformer_pretrain.errors import require
    from geneformer_pretrain.planner.lengths import genecorpus, of_corpus, of_tokens
    from geneformer_pretrain.planner.measured import card
    from geneformer_pretrain.planner.plan import make_plan
    from geneformer_pretrain.planner.speed import Cluster
    from geneformer_pretrain.planner.text import describe

    for option, least in (("disk", 1e-6), ("tokens", 1), ("price", 0), ("network", 1e-6)):
        value = getattr(arguments, option)
        require(
            value is None or (math.isfinite(value) and value >= least),
            f"--{option} {value}: it must be a number of at least {least:g}.",
        )
    gpu = arguments.gpu.lower()
    cluster = Cluster(gpu, card(gpu), arguments.gpus, arguments.gpus_per_node, arguments.network)
    config = load_config(arguments.config_name, arguments.overrides)
    apply_gene_set(config)
    given = {override.key_or_group for override in read_overrides(arguments.overrides)}
    if arguments.corpus is not None:
        lengths = of_corpus(arguments.corpus)
    elif arguments.tokens is not None:
        lengths = of_tokens(int(arguments.tokens), config.model.seq_length)
    elif config.data.path != SAMPLE or "data.path" in given:
        lengths = of_corpus(config.data.path)
    else:
        lengths = genecorpus(config.model.seq_length)
    lines, description = [], lengths.description
    if description is not None:
        described, folder = description.gene_set, description.parts[0].parent
        genes = load_gene_set(config)
        if genes is not None:
            require_gene_set(described, folder, genes)
        elif "model.vocab_size" not in given:
            config.model.vocab_size = described.vocab_size
            copy = folder / "gene_set" if (folder / "gene_set").is_dir() else "FOLDER"
            lines = [
                f"vocabulary   {described.vocab_size:,} tokens of the corpus's gene set, {described.name}: give it to "
                f"train.py, data.gene_set={copy}"
            ]
    plan = make_plan(config, cluster, lengths, price=arguments.price, disk=1e9 * arguments.disk)
    values = asdict(plan)
    for engine, planned in zip(values["engines"], plan.engines, strict=True):
        engine["memory"]["total"] = planned.memory.total
    return Summary([*lines, *describe(plan)], json.loads(json.dumps(values)))
