"""Command `tokenize`: counts to a corpus."""

import argparse
import os
from pathlib import Path
from typing import Any

from geneformer_pretrain.console import Summary, amount
from geneformer_pretrain.errors import ConfigError, DataError, OutputError, require
from geneformer_pretrain.files import require_apart, require_room_beside
from geneformer_pretrain.tokenization.workers import start_server

LAYOUT = """
The corpus is made in parts of --part-cells rows of the input. A part is complete or absent: if the command is killed,
the same command goes on where it stopped. The bytes are the same for any number of workers and shards.

--shard I/N makes every Nth part, for a SLURM array: sbatch --array=1-8 ... --shard $SLURM_ARRAY_TASK_ID/8, all with
the same other arguments and --output. Whichever task finds all parts there writes corpus.json; if one failed, start it
again, or start the command without --shard to make what is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = LAYOUT
    parser.add_argument(
        "counts",
        nargs="+",
        metavar="COUNTS",
        help="h5ad, zarr, 10x h5, 10x mtx folder or loom; files, folders, patterns",
    )
    parser.add_argument("--gene-set", required=True, metavar="GENES", help="gene-set folder")
    parser.add_argument("--output", required=True, metavar="CORPUS", help="folder to make, or to go on with")
    add_counts_arguments(parser)
    parser.add_argument("--columns", default="", metavar="A,B", help="columns of obs to carry along")
    parser.add_argument("--min-genes", type=int, default=0, metavar="N", help="leave out cells with fewer ranked genes")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the CPUs this process may use")
    parser.add_argument("--shard", metavar="I/N", help="make only every Nth part, the I-th of them; see below")
    parser.add_argument("--part-cells", type=int, default=16_384, metavar="N", help="rows of the input in one part")
    parser.add_argument("--overwrite", action="store_true", help="delete a corpus that is there and start anew")


def add_counts_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say how counts are read; other commands that tokenize on the way share them."""
    parser.add_argument(
        "--gene-id-column", default="ensembl_id", metavar="NAME", help='column of var with gene ids, or "index"'
    )
    matrix = parser.add_mutually_exclusive_group()
    matrix.add_argument("--layer", metavar="NAME", help="read this layer instead of X")
    matrix.add_argument("--raw", action="store_true", help="read raw.X instead of X")
    parser.add_argument(
        "--n-counts-column", metavar="NAME", help="column of obs with each cell's total; default: the sum of its counts"
    )
    parser.add_argument(
        "--filter-column", metavar="NAME", help="only cells with True or 1 in it; default: filter_pass if there is one"
    )
    parser.add_argument(
        "--allow-noninteger", action="store_true", help="accept values that are no whole numbers (negative never)"
    )
    parser.add_argument(
        "--allow-low-match", action="store_true", help="accept that less than half of the counts are of known genes"
    )


def run(arguments: argparse.Namespace) -> Summary:
    """Make the corpus, or the parts of one shard."""
    workers = arguments.workers if arguments.workers is not None else len(os.sched_getaffinity(0))
    require(workers >= 1, f"--workers {workers}: at least one is needed.")
    if workers > 1:  # before the imports below, which take as long
        start_server("geneformer_pretrain.tokenization.corpus_writer")
    from geneformer_pretrain.tokenization.corpus_plan import Rule, make_plan, parse_shard, settle
    from geneformer_pretrain.tokenization.corpus_writer import (
        Job,
        delete_corpus,
        finish,
        forget_plan,
        make_parts,
        missing_parts,
    )
    from geneformer_pretrain.tokenization.counts import find_counts
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    shard, shards = parse_shard(arguments.shard) if arguments.shard else (0, 1)
    require(
        not (arguments.overwrite and shards > 1),
        "--overwrite with --shard would delete the parts of the other shards; delete the folder before the array.",
    )
    rule = Rule(
        gene_id_column=arguments.gene_id_column,
        layer=arguments.layer,
        raw=arguments.raw,
        n_counts_column=arguments.n_counts_column,
        filter_column=arguments.filter_column,
        columns=tuple(filter(None, arguments.columns.split(","))),
        min_genes=arguments.min_genes,
    )
    gene_set, paths, folder = GeneSet.load(arguments.gene_set), find_counts(arguments.counts), Path(arguments.output)
    for path in paths:
        if folder.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"--output {folder} lies inside of the counts {path}.")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder.")
    require_room_beside(folder)
    plan = make_plan(
        paths, gene_set, rule, part_cells=arguments.part_cells, allow_noninteger=arguments.allow_noninteger
    )
    if arguments.overwrite:
        require_apart(folder, [*paths, Path(arguments.gene_set)])
        delete_corpus(folder)
    settle(plan, folder)
    job = Job(folder, plan, gene_set, arguments.allow_noninteger, arguments.allow_low_match)
    missing = missing_parts(job)
    mine = [part for part in missing if part.number % shards == shard % shards]
    try:
        make_parts(job, mine, workers)
    except DataError:
        if shards == 1:
            forget_plan(folder)
        raise
    corpus = finish(job)
    if corpus is None:
        left = len(missing_parts(job))
        made = f"made {amount(len(mine), 'part')}; still missing, of other shards: {left:,} of {len(plan.parts):,}"
        return Summary(
            [f"{folder}: {made}."], {"complete": False, "made": len(mine), "missing": left, "parts": len(plan.parts)}
        )
    there = len(plan.parts) - len(missing)
    made = f"there before: {there:,}" if there and mine else "all were there before" if there else ""
    return Summary(_lines(folder, corpus, made), {"complete": True, "output": str(folder), **corpus})


def _lines(folder: Path, corpus: dict[str, Any], made: str) -> list[str]:
    """Describe a finished corpus for people."""
    from geneformer_pretrain.tokenization.gene_ids import describe_summed
    from geneformer_pretrain.tokenization.repeated_ids import RepeatedIds
    from geneformer_pretrain.tokenization.tokenizer import describe_left_out

    sums, cells, tokens = corpus["sums"], corpus["cells"], corpus["tokens"]
    parts = amount(len(corpus["parts"]), "part") + (f" ({made})" if made else "")
    lines = [f"{folder}: {amount(cells, 'cell')}, {amount(tokens, 'token')} ({tokens / cells:,.0f} a cell), {parts}"]
    left_out = describe_left_out(corpus["left_out"])
    if left_out:
        lines.append(f"cells left out: {left_out}")
    matched = {(source["genes_matched"], source["genes"]) for source in corpus["sources"]}
    least, genes = min(matched, key=lambda pair: pair[0] / pair[1])
    where = "" if len(corpus["sources"]) == 1 else " in the file with the fewest"
    share = sums["matched_counts"] / max(sums["counts"], 1)
    lines.append(
        f"genes matched: {least:,} of {genes:,} ({least / genes:.1%}){where}; they hold {share:.1%} of the counts"
    )
    source = max(corpus["sources"], key=lambda source: source["genes_without_median"])
    if unranked := source["genes_without_median"]:
        share = sums["unranked_counts"] / max(sums["counts"], 1)
        shown = ", ".join(source["such_genes"])
        lines.append(f"genes without a median, left out: {unranked:,} ({shown}), {share:.2%} of the counts")
    summed = [source for source in corpus["sources"] if "genes_summed" in source]
    if summed:
        source = max(summed, key=lambda source: source["genes_summed"]["columns"])
        where = "" if len(corpus["sources"]) == 1 else f" of {Path(source['path']).name}, the file with the most"
        lines.append(describe_summed(source["genes_summed"]) + where)
    if sums["other_totals"]:
        lines.append(
            f"{corpus['rule']['n_counts_column']} differs from the sum of the counts in "
            f"{amount(sums['other_totals'], 'cell')}, by a factor of up to {sums['greatest_ratio']:.3g}; it was used "
            "as given"
        )
    if corpus.get("repeated_ids") is not None:  # corpora of earlier builds do not say
        remedy = "carry a column along that tells the samples apart (--columns)"
        lines.append(RepeatedIds(**corpus["repeated_ids"]).describe(remedy))
    lines += [f"{Path(source['path']).name}: {note}" for source in corpus["sources"] for note in source["notes"]]
    return lines
