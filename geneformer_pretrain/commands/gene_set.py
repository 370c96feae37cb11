"""Command `gene-set`: import, build, show and export gene sets."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_pretrain.console import Summary, amount
from geneformer_pretrain.errors import ConfigError, require

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.gene_set import GeneSet
    from geneformer_pretrain.tokenization.gene_set_build import Counted, GeneSetBuilder

BUILD = """
Medians are those of the non-zero count / n_counts * 10,000 of each gene over all cells, within 0.5% of the exact ones
in one pass, or exact with --exact. Memory does not depend on the number of cells: 7.8 kB a gene.

On many machines: each runs `gene-set build ITS-FILES... --partial --output part-N.parquet`, all with the same choice of
genes; then `gene-set build --merge part-*.parquet --output GENES` gives the same gene set as one machine would. Files
that need other options (--layer, --n-counts-column) can be partial results of their own, too.
"""

READING = ("gene_id_column", "layer", "raw", "n_counts_column", "filter_column", "allow_noninteger", "allow_low_match")
CHOOSING = ("genes", "gene_table", "biotypes")
FINISHING = ("min_cells", "special_tokens", "max_tokens", "name", "species")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the four actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, add, text in (
        ("import", _add_import, "make a gene set of Geneformer's dictionaries"),
        ("build", _add_build, "make a gene set, with medians, from counts of any species"),
        ("show", _add_show, "print what a gene set holds"),
        ("export", _add_export, "write a gene set as Geneformer's dictionaries"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(action)
        action.add_argument(
            "--report", metavar="FILE", default=argparse.SUPPRESS, help="write the summary to this file, as JSON"
        )


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token-dictionary", required=True, metavar="FILE", help="{gene id: token id}, pickle or JSON")
    parser.add_argument("--gene-medians", required=True, metavar="FILE", help="{gene id: median}")
    parser.add_argument("--gene-names", metavar="FILE", help="{symbol: gene id}; symbols are then matched too")
    parser.add_argument("--gene-mapping", metavar="FILE", help="{gene id as found: gene id of today}")
    _add_output(parser, "GENES", "folder of the gene set")
    _add_naming(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.epilog = BUILD
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "counts", nargs="*", metavar="COUNTS", help="h5ad, zarr, 10x h5, 10x mtx folder or loom; folders, patterns"
    )
    _add_output(parser, "GENES", "folder of the gene set; with --partial a parquet file")
    genes = parser.add_mutually_exclusive_group()
    genes.add_argument("--genes", metavar="FILE", help="only genes of this list, an id a line; default: all")
    genes.add_argument(
        "--gene-table", metavar="FILE", help="only genes of this table (CSV, TSV, GTF), which gives symbols too"
    )
    parser.add_argument("--biotypes", metavar="A,B", help="only these biotypes of the table: protein_coding,miRNA")
    parser.add_argument("--min-cells", type=int, metavar="N", help="only genes with counts in N cells; default: 1")
    parser.add_argument(
        "--special-tokens", choices=("v1", "v2"), help="v1: <pad>, <mask>; v2: <cls> and <eos> too; default: v1"
    )
    _add_naming(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="exact medians, by a second pass")
    how.add_argument("--partial", action="store_true", help="write a partial result, to be merged with others")
    how.add_argument("--merge", nargs="+", metavar="PARTIAL", help="make the gene set of partial results")
    parser.add_argument(
        "--gene-id-column", default="ensembl_id", metavar="NAME", help='column of var with gene ids, or "index"'
    )
    matrix = parser.add_mutually_exclusive_group()
    matrix.add_argument("--layer", metavar="NAME", help="read this layer instead of X")
    matrix.add_argument("--raw", action="store_true", help="read raw.X instead of X")
    parser.add_argument("--n-counts-column", metavar="NAME", help="column of obs with each cell's total")
    parser.add_argument("--filter-column", metavar="NAME", help="only cells with True or 1 in this column of obs")
    parser.add_argument("--allow-noninteger", action="store_true", help="accept values that are not whole numbers")
    parser.add_argument(
        "--allow-low-match", action="store_true", help="accept files in which less than half of the counts match"
    )


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gene_set", metavar="GENES", help="folder of a gene set")
    parser.add_argument("--tsv", metavar="FILE", help="write all tokens with symbols and medians as a table, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the table")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gene_set", metavar="GENES", help="folder of a gene set")
    _add_output(parser, "DIR", "folder of the dictionaries")


def _add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument("--output", required=True, metavar=metavar, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _add_naming(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest cell; default: 2048, or 4096 with <cls> and <eos>"
    )
    parser.add_argument("--name", metavar="TEXT", help="name of the gene set; default: that of its folder")
    parser.add_argument("--species", metavar="TEXT", help='for people, such as "Mus musculus"')


def run(arguments: argparse.Namespace) -> Summary:
    """Run one of the four actions."""
    actions = {"import": _import, "build": _build, "show": _show, "export": _export}
    return actions[arguments.action](arguments)


def _import(arguments: argparse.Namespace) -> Summary:
    from geneformer_pretrain.files import require_new_folder
    from geneformer_pretrain.tokenization.gene_set import FILES
    from geneformer_pretrain.tokenization.geneformer_dictionaries import Dictionaries, read_dictionary

    require_new_folder(Path(arguments.output), overwrite=arguments.overwrite, own=FILES)
    files = {
        "tokens": arguments.token_dictionary,
        "medians": arguments.gene_medians,
        "names": arguments.gene_names,
        "mapping": arguments.gene_mapping,
    }
    dictionaries = Dictionaries(**{name: read_dictionary(file) for name, file in files.items() if file is not None})
    gene_set = dictionaries.to_gene_set(
        name=arguments.name or Path(arguments.output).resolve().name,
        species=arguments.species,
        max_tokens=arguments.max_tokens,
        origin={"made_by": "gene-set import", **{name: str(file) for name, file in files.items() if file is not None}},
    )
    gene_set.save(arguments.output, overwrite=arguments.overwrite)
    summary = _describe(gene_set, arguments.output)
    without = len(set(dictionaries.medians) - set(gene_set.tokens))
    if without:
        summary.lines.append(f"  medians of genes without a token, left out: {without:,}")
    summary.values["medians_without_token"] = without
    return summary


def _build(arguments: argparse.Namespace) -> Summary:
    from geneformer_pretrain.files import require_new, require_new_folder
    from geneformer_pretrain.tokenization.gene_set import FILES

    _check_build(arguments)
    output = Path(arguments.output)
    if arguments.partial:
        require_new(output, overwrite=arguments.overwrite)
    else:
        require_new_folder(output, overwrite=arguments.overwrite, own=FILES)
    exact, result = None, None
    if arguments.merge is not None:
        from geneformer_pretrain.tokenization.counted_genes import merge

        counted = merge([Path(path) for path in arguments.merge])
    else:
        builder = _builder(arguments)
        result = builder.count()
        counted = result.genes
        if arguments.exact:
            exact = builder.exact_medians(counted)
    if arguments.partial:
        counted.save(output, overwrite=arguments.overwrite)
        summary = Summary(
            [f"{output}: partial result of {amount(counted.counted_cells, 'cell')}; merge it with --merge"],
            {"cells": counted.counted_cells, "genes": len(counted.gene_ids)},
        )
        genes = counted.gene_ids
    else:
        gene_set = counted.to_gene_set(
            name=arguments.name or output.resolve().name,
            species=arguments.species,
            special_tokens=arguments.special_tokens or "v1",
            max_tokens=arguments.max_tokens,
            min_cells=1 if arguments.min_cells is None else arguments.min_cells,
            exact=exact,
        )
        gene_set.save(output, overwrite=arguments.overwrite)
        summary = _describe(gene_set, output)
        genes = gene_set.tokens
    if result is not None:
        _add_shares(summary, result, genes, arguments)
    return summary


def _add_shares(summary: Summary, result: "Counted", genes: list[str], arguments: argparse.Namespace) -> None:
    """Add the share of the counts that these genes hold and, where genes were chosen beforehand, how files match.

    Parameters
    ----------
    genes
        Genes of the result: those that were counted, less what `--min-cells` left out.
    """
    from geneformer_pretrain.tokenization.gene_ids import describe_summed

    inside = set(genes)
    held = sum(
        count for gene, count in zip(result.genes.gene_ids, result.gene_counts.tolist(), strict=True) if gene in inside
    )
    share = held / sum(source.counts for source in result.genes.sources)
    counted = len(result.genes.gene_ids)
    left_out = counted - len(inside.intersection(result.genes.gene_ids))
    line = f"  these genes hold {share:.1%} of the counts"
    if left_out:
        fewer = "no cell" if arguments.min_cells in (None, 1) else f"fewer than {arguments.min_cells:,} cells"
        line += f"; left out, with counts in {fewer}: {left_out:,} of {amount(counted, 'gene')}"
    summary.lines.append(line)
    summary.values |= {"share_of_counts": share, "genes_left_out": left_out}
    if result.summed is not None:
        path, summed = result.summed
        where = "" if len(result.genes.sources) == 1 else f" of {path.name}, the file with the most"
        summary.lines.append(f"  {describe_summed(summed)}{where}")
        summary.values["genes_summed"] = summed
    if result.strange is not None:
        path, shared, of = result.strange
        summary.lines.append(
            f"  WARNING {path}: the files before it have only {shared:,} of its {amount(of, 'gene')}; if its ids are "
            "of another kind (symbols, Ensembl ids) or species, build without it, or choose genes with --genes"
        )
        summary.values["strange_file"] = {"file": str(path), "genes_shared": shared, "genes": of}
    if arguments.genes is not None or arguments.gene_table is not None:
        summary.lines.append("chosen genes, in the file in which they hold the least of the counts:")
        summary.lines += [f"  {line}" for line in result.match.lines(result.column_counts)]
        summary.values["least_match"] = result.match.values(result.column_counts)


def _builder(arguments: argparse.Namespace) -> "GeneSetBuilder":
    from functools import partial

    from geneformer_pretrain.tokenization.counts import find_counts, open_counts
    from geneformer_pretrain.tokenization.gene_set_build import GeneSetBuilder
    from geneformer_pretrain.tokenization.gene_table import read_gene_list, read_gene_table

    genes = None
    if arguments.genes is not None:
        genes = read_gene_list(arguments.genes)
    elif arguments.gene_table is not None:
        biotypes = [name.strip() for name in (arguments.biotypes or "").split(",") if name.strip()]
        genes = read_gene_table(arguments.gene_table, biotypes)
    return GeneSetBuilder(
        partial(
            open_counts,
            gene_id_column=arguments.gene_id_column,
            layer=arguments.layer,
            raw=arguments.raw,
            allow_noninteger=arguments.allow_noninteger,
        ),
        find_counts(arguments.counts),
        genes,
        n_counts_column=arguments.n_counts_column,
        filter_column=arguments.filter_column,
        allow_low_match=arguments.allow_low_match,
    )


def _check_build(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing."""
    given = {
        name
        for name in (*READING, *CHOOSING, *FINISHING)
        if getattr(arguments, name) not in (None, False) and (name, getattr(arguments, name)) != _DEFAULT_ID_COLUMN
    }
    if arguments.merge is not None:
        require(not arguments.counts, "--merge takes partial results only; name no COUNTS beside it.")
        _refuse(
            given & {*READING, *CHOOSING}, "was decided when the partial results were made; leave it out of --merge"
        )
    else:
        require(bool(arguments.counts), "Name COUNTS to read, or partial results with --merge.")
    if arguments.partial:
        _refuse(given & set(FINISHING), "is decided when partial results are merged; give it to --merge")
    require(
        arguments.biotypes is None or arguments.gene_table is not None,
        "--biotypes needs a --gene-table that says which gene has which.",
    )
    require(arguments.min_cells is None or arguments.min_cells >= 0, f"--min-cells {arguments.min_cells} is negative.")


_DEFAULT_ID_COLUMN = ("gene_id_column", "ensembl_id")


def _refuse(names: set[str], reason: str) -> None:
    for name in sorted(names):
        raise ConfigError(f"--{name.replace('_', '-')} {reason}.")


def _show(arguments: argparse.Namespace) -> Summary:
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    gene_set = GeneSet.load(arguments.gene_set)
    if arguments.tsv is not None:
        _write_tsv(gene_set, Path(arguments.tsv), overwrite=arguments.overwrite)
    return _describe(gene_set, arguments.gene_set)


def _write_tsv(gene_set: "GeneSet", path: Path, *, overwrite: bool) -> None:
    from geneformer_pretrain.files import replacing, require_new

    require_new(path, overwrite=overwrite, what="table")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(gene_set.tokens, gene_set.kinds, gene_set.symbols, gene_set.medians.tolist(), strict=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("token_id\ttoken\tkind\tsymbol\tmedian\n")
        for place, (token, kind, symbol, median) in enumerate(rows):
            file.write(f"{place}\t{token}\t{kind}\t{symbol or ''}\t{'' if median != median else median}\n")


def _export(arguments: argparse.Namespace) -> Summary:
    from geneformer_pretrain.files import require_new_folder
    from geneformer_pretrain.tokenization.gene_set import GeneSet
    from geneformer_pretrain.tokenization.geneformer_dictionaries import FILE_NAMES, export_dictionaries

    own = [f"{name}.{suffix}" for name in FILE_NAMES.values() for suffix in ("pkl", "json")]
    require_new_folder(Path(arguments.output), overwrite=arguments.overwrite, own=own)

    gene_set = GeneSet.load(arguments.gene_set)
    files = export_dictionaries(gene_set, arguments.output, overwrite=arguments.overwrite)
    lines = [f"{arguments.output}: {', '.join(file.name for file in files)}"]
    if gene_set.num_unranked_genes:
        lines.append(
            f"  genes without a median: {gene_set.num_unranked_genes:,}; Geneformer's own tokenizer raises a KeyError "
            "for cells with such a gene"
        )
    return Summary(lines, {"files": [file.name for file in files], "unranked_genes": gene_set.num_unranked_genes})


def _describe(gene_set: "GeneSet", folder: object) -> Summary:
    """Say what a gene set holds."""
    import numpy as np

    genes = gene_set.vocab_size - gene_set.num_special_tokens
    special = ", ".join(f"<{name}> {place}" for name, place in gene_set.special_tokens.items())
    medians = gene_set.medians[~np.isnan(gene_set.medians)]
    symbols = sum(symbol is not None for symbol in gene_set.symbols)
    lines = [
        f"{folder}: gene set {gene_set.name}, species {gene_set.species or 'not given'}",
        f"  {gene_set.vocab_size:,} tokens: {amount(genes, 'gene')}, {special}",
        f"  longest cell {gene_set.max_tokens:,} tokens, counts scaled to {gene_set.target_sum:,.0f}",
    ]
    values: dict[str, Any] = gene_set.describe() | {
        "species": gene_set.species,
        "target_sum": gene_set.target_sum,
        "genes": genes,
        "genes_without_median": gene_set.num_unranked_genes,
        "symbols": symbols,
        "aliases": len(gene_set.aliases),
        "origin": gene_set.origin,
    }
    if len(medians):
        quartiles = np.quantile(medians, [0, 0.25, 0.5, 0.75, 1]).tolist()
        low, first, middle, third, high = (f"{value:.3g}" for value in quartiles)
        lines.append(f"  medians {low} to {high}, half of them {first} to {third}, the middle one {middle}")
        values["median_quartiles"] = quartiles
    if gene_set.num_unranked_genes:
        lines.append(f"  genes without a median, which give no tokens: {gene_set.num_unranked_genes:,}")
    lines.append(f"  symbols of {amount(symbols, 'gene')}, {amount(len(gene_set.aliases), 'other id')}")
    if "cells" in gene_set.origin:
        lines.append(f"  medians {gene_set.origin['medians']}, of {amount(gene_set.origin['cells'], 'cell')}")
    lines.append(f"  fingerprint {gene_set.fingerprint}")
    return Summary(lines, values)
