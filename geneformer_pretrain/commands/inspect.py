"""`inspect`: numbers and pictures of a corpus, before it is trained on."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_pretrain.console import Summary, amount

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from geneformer_pretrain.data.arrow_cache import SourceFile
    from geneformer_pretrain.data.inspection import Group, TokenStatistics

MOST_COLUMNS = 4
"""Columns that are counted unless --columns names others."""
MOST_GROUPS = 15
"""Groups of a column that are shown; the others are summed up."""
MOST_VALUES = 200
"""A column with more values in the first rows holds ids rather than groups, and is not counted by default."""
OWN_COLUMNS = ("input_ids", "length", "cell_id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("corpus", help="corpus folder, parquet file, folder or pattern, or save_to_disk folder")
    parser.add_argument("--output", metavar="DIR", help="folder for inspect.json and pictures (PNG); none: print only")
    parser.add_argument("--columns", metavar="A,B", help="columns to count cells by; none: the first with few values")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that steps per epoch are given for")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(arguments: argparse.Namespace) -> Summary:
    """Read the corpus once and report."""
    from geneformer_pretrain.data.inspection import count_groups, count_tokens, summarize_lengths
    from geneformer_pretrain.data.reading import open_cells
    from geneformer_pretrain.data.sources import read_description
    from geneformer_pretrain.errors import require
    from geneformer_pretrain.files import new_folder, require_new_folder

    require(arguments.gpus > 0, f"--gpus is {arguments.gpus}; it must be positive.")
    if arguments.output is not None:
        own = "inspect.json", "*.png"
        require_new_folder(Path(arguments.output), overwrite=arguments.overwrite, own=own)
    cells = open_cells(arguments.corpus)
    columns = _columns(cells.sources, arguments.columns)
    description = read_description(Path(arguments.corpus))
    gene_set = description.gene_set if description else None
    special = len(gene_set.special_tokens) if gene_set else 2

    statistics = count_tokens(cells)
    groups = {column: count_groups(cells.sources, column, statistics.lengths) for column in columns}
    lengths, genes = statistics.lengths, statistics.counts[special:]
    cap = statistics.cap(gene_set.max_tokens if gene_set else None)
    values: dict[str, Any] = {
        "corpus": str(arguments.corpus),
        "cells": len(lengths),
        "tokens": int(lengths.sum(dtype="int64")),
        "files": len(cells.sources),
        "empty_files": cells.empty_files,
        "gene_set": None if gene_set is None else vars(gene_set),
        "length": summarize_lengths(lengths),
        "cap": cap,
        "share_at_cap": None if cap is None else float((lengths == cap).mean()),
        "genes_seen": int((genes > 0).sum()),
        "genes_in_vocabulary": gene_set.vocab_size - special if gene_set else None,
        "genes_in_under_10_cells": int(((genes > 0) & (genes < 10)).sum()),
        "unigram_entropy": statistics.unigram_entropy(special),
        "configurations": _configurations(lengths, arguments.gpus),
        "columns": {column: [vars(group) for group in found] for column, found in groups.items()},
    }
    summary = Summary(_lines(values, arguments.gpus), values)
    if arguments.output is not None:
        with new_folder(Path(arguments.output), overwrite=arguments.overwrite) as folder:
            (folder / "inspect.json").write_text(json.dumps(values, indent=1) + "\n")
            _draw(folder, statistics, cap, special, groups)
        summary.lines.append(f"output         {arguments.output}")
    return summary


def _columns(sources: "Sequence[SourceFile]", named: str | None) -> list[str]:
    """Columns to count by: those named, or the first whose values are few."""
    from pyarrow import types

    from geneformer_pretrain.data.reading import as_text, column_types, read_rows

    if named is not None:
        columns = [name.strip() for name in named.split(",") if name.strip()]
        next(read_rows(sources, columns))  # all there?
        return columns
    tests = (types.is_string, types.is_large_string, types.is_dictionary, types.is_boolean)
    candidates = [
        name
        for name, kind in column_types(sources[0]).items()
        if name not in OWN_COLUMNS and any(test(kind) for test in tests)
    ]
    first_rows = next(read_rows(sources, candidates)) if candidates else {}
    few = [name for name in candidates if len(set(as_text(first_rows[name]))) <= MOST_VALUES]
    return few[:MOST_COLUMNS]


def _configurations(lengths: "np.ndarray", gpus: int) -> dict[str, dict[str, Any]]:
    """Packing and steps per epoch of each shipped configuration."""
    from geneformer_pretrain.config.compose import CONFIG_DIR, choices, load_config
    from geneformer_pretrain.data.inspection import measure_packing

    found = {}
    for name in choices(CONFIG_DIR):
        config = load_config(name)
        packing = measure_packing(lengths, config.model.micro_batch_size, config.model.seq_length)
        packs_per_step = gpus * config.training.gradient_accumulation_steps
        found[name] = {
            "seq_length": config.model.seq_length,
            "tokens_per_micro_batch": config.model.token_budget,
            "steps_per_epoch": -(-packing.packs // packs_per_step),
            **vars(packing),
        }
    return found


def _lines(values: dict[str, Any], gpus: int) -> list[str]:
    length, cap = values["length"], values["cap"]
    empty = f", {values['empty_files']:,} more without cells" if values["empty_files"] else ""
    at_cap = f"; {values['share_at_cap']:.1%} of the cells are cut at {cap:,}" if cap else ""
    of_all = f" of {values['genes_in_vocabulary']:,}" if values["genes_in_vocabulary"] else ""
    lines = [
        f"cells          {values['cells']:,} in {amount(values['files'], 'file')}{empty}",
        f"tokens         {values['tokens']:,}",
        f"gene set       {values['gene_set']['name'] if values['gene_set'] else 'not named by the corpus'}",
        f"length         mean {length['mean']:,.0f}, median {length['median']:,.0f}, 5% to 95% "
        f"{length['percentile_5']:,.0f} to {length['percentile_95']:,.0f}, longest {length['longest']:,}{at_cap}",
        f"genes          {values['genes_seen']:,}{of_all} seen, {values['genes_in_under_10_cells']:,} of them in fewer "
        "than 10 cells",
        f"entropy        {values['unigram_entropy']:.2f} nats: the loss if only the genes' frequencies are known",
    ]
    for name, found in values["configurations"].items():
        longer = found["truncated_cells"]
        cut = f", {amount(longer, 'cell')} cut at {found['seq_length']:,}" if longer else ""
        lines.append(
            f"{name:<14} {amount(found['steps_per_epoch'], 'step')} an epoch on {amount(gpus, 'GPU')}; "
            f"{found['fill']:.1%} of its tokens are genes ({found['fill_when_padded']:.1%} if padded){cut}"
        )
    for column, groups in values["columns"].items():
        largest = ", ".join(f"{group['value']} {group['cells']:,}" for group in groups[:5])
        lines.append(f"{column:<14} {amount(len(groups), 'value')}: {largest}{', ...' if len(groups) > 5 else ''}")
    return lines


def _draw(
    folder: Path, statistics: "TokenStatistics", cap: int | None, special: int, groups: "dict[str, list[Group]]"
) -> None:
    from geneformer_pretrain.data import pictures

    pictures.draw_lengths(folder / "lengths.png", statistics.lengths, cap)
    pictures.draw_genes(folder / "genes.png", statistics.counts[special:], len(statistics.lengths))
    for column, found in groups.items():
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in column)
        pictures.draw_groups(folder / f"tokens_by_{safe}.png", column, found, MOST_GROUPS)
