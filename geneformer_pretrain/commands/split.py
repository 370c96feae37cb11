"""`split`: a training and a held-out part of a corpus, the same each time."""

import argparse
from pathlib import Path

from geneformer_pretrain.console import Summary, amount

DEFAULT_FRACTION = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("corpus", help="corpus folder, parquet file, folder or pattern, or save_to_disk folder")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the corpora train/ and held_out/")
    parser.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help=f"share to hold out, of the cells or with --by of the groups; with --by {DEFAULT_FRACTION} if not given",
    )
    parser.add_argument("--by", metavar="COLUMN", help="keep the cells that share a value of this column together")
    parser.add_argument("--hold-out", metavar="A,B", help="values of --by to hold out; none: chosen by a hash")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(arguments: argparse.Namespace) -> Summary:
    """Copy each cell to one of the two parts."""
    from geneformer_pretrain.data.reading import column_types, open_cells
    from geneformer_pretrain.data.sources import read_description
    from geneformer_pretrain.data.splitting import PARTS, by_cell, by_group, choose_groups, describe_part, split
    from geneformer_pretrain.errors import require
    from geneformer_pretrain.files import new_folder, require_apart, require_new_folder

    column, fraction, named = arguments.by, arguments.fraction, arguments.hold_out
    require(fraction is None or 0 < fraction < 1, f"--fraction is {fraction}; it must lie between 0 and 1.")
    require(column is not None or fraction is not None, "give --fraction F, or --by COLUMN for whole groups.")
    require(named is None or column is not None, "--hold-out names values of a column: give --by COLUMN as well.")
    require(named is None or fraction is None, "give --fraction or --hold-out, not both.")
    require_new_folder(Path(arguments.output), overwrite=arguments.overwrite, own=PARTS)

    cells = open_cells(arguments.corpus)
    require_apart(Path(arguments.output), [Path(source.path) for source in cells.sources])
    if column is None:
        has_ids = "cell_id" in column_types(cells.sources[0])
        choose = by_cell(fraction, has_ids)
        origin = {"fraction": fraction, "by": "cell_id" if has_ids else "tokens"}
        how = f"by a hash of the {'cell_id' if has_ids else 'tokens, since there is no cell_id'}"
    else:
        names = None if named is None else [name.strip() for name in named.split(",") if name.strip()]
        groups, held_out = choose_groups(cells.sources, column, fraction or DEFAULT_FRACTION, names)
        choose = by_group(column, held_out)
        origin = {"by": column, "held_out": sorted(held_out)}
        how = f"{len(held_out)} of {amount(len(groups), 'value')} of {column}: {', '.join(sorted(held_out)[:8])}"
        how += ", ..." if len(held_out) > 8 else ""

    description = read_description(Path(arguments.corpus))
    with new_folder(Path(arguments.output), overwrite=arguments.overwrite) as folder:
        parts = split(cells.sources, choose, folder)
        if description is not None:
            for part in parts:
                describe_part(part, description, origin)
    summary = Summary(values={"corpus": str(arguments.corpus), "output": str(arguments.output), "split": origin})
    total = sum(part.cells for part in parts)
    for part in parts:
        path = Path(arguments.output) / part.folder.name
        summary.values[part.folder.name] = {"path": str(path), "cells": part.cells, "tokens": part.tokens}
        summary.lines.append(
            f"{part.folder.name:<9} {amount(part.cells, 'cell')} ({part.cells / total:.1%}), "
            f"{amount(part.tokens, 'token')}: {path}"
        )
    summary.lines.append(f"held out  {how}")
    return summary
