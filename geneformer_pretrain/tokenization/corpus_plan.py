"""The plan of a corpus: which rows of which files become which part, by which rule.

The plan is a pure function of the files and the options, and lies in the folder as `tokenize.json` from the start.
Every process that works at the corpus makes its own and compares: what is being made is always one thing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_pretrain.errors import ConfigError, DataError, OutputError, require
from geneformer_pretrain.files import locked, replacing
from geneformer_pretrain.tokenization.counts import CountsFile, file_state, open_counts
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.tokenizer import match_genes

PLAN_FILE = "tokenize.json"
LOCK_FILE = ".tokenize.lock"
FORMAT_VERSION = 1
PART_CELLS = 16_384
"""Rows of the input that become one part: about 20 MB."""
MOST_PART_CELLS = 1 << 18

OWN_COLUMNS = ("input_ids", "length", "cell_id")
"""Columns of a corpus that no column of the cells may replace."""


@dataclass(frozen=True)
class Rule:
    """Options that decide the tokens; see the options of `tokenize`."""

    gene_id_column: str = "ensembl_id"
    layer: str | None = None
    raw: bool = False
    n_counts_column: str | None = None
    filter_column: str | None = None
    columns: tuple[str, ...] = ()
    min_genes: int = 0

    def __post_init__(self) -> None:
        require(self.min_genes >= 0, f"--min-genes {self.min_genes} is negative.")
        require(len(set(self.columns)) == len(self.columns), "--columns names a column twice.")
        for name in OWN_COLUMNS:
            require(name not in self.columns, f"--columns {name}: a corpus has a column of its own with this name.")


@dataclass(frozen=True)
class Part:
    """Rows of one file that become one file of the corpus."""

    number: int
    source: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Plan:
    """A corpus before it is made.

    Attributes
    ----------
    gene_set
        Description of the gene set.
    rule
        `Rule` as a dictionary.
    part_cells
        Rows that become one part.
    columns
        Type of each column that is carried along.
    sources
        For each file: path, cells, genes, how they match, notes, and the file's state (see `file_state`).
    """

    gene_set: dict[str, Any]
    rule: dict[str, Any]
    part_cells: int
    columns: dict[str, str]
    sources: list[dict[str, Any]]

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, in the order of the files and rows; a file without cells has none."""
        ranges = [
            (source, first, min(first + self.part_cells, facts["cells"]))
            for source, facts in enumerate(self.sources)
            for first in range(0, facts["cells"], self.part_cells)
        ]
        return [Part(number, *rows) for number, rows in enumerate(ranges)]

    def origin(self, part: Part) -> dict[str, Any]:
        """Return what a part says of itself: the same for the same cells, wherever they lie and whenever."""
        rule = {name: value for name, value in self.rule.items() if value}
        name = Path(self.sources[part.source]["path"]).name
        return {"gene_set": self.gene_set["fingerprint"], "rule": rule, "file": name, "rows": [part.first, part.last]}

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in self.__dataclass_fields__}}


def make_plan(
    paths: Sequence[Path],
    gene_set: GeneSet,
    rule: Rule,
    *,
    part_cells: int = PART_CELLS,
    allow_noninteger: bool = False,
) -> Plan:
    """Open every file once and plan the corpus.

    Raises
    ------
    DataError
        If a file cannot be read, has no gene of the gene set, lacks a column, or has columns of other types than the
        files before.
    """
    require(1 <= part_cells <= MOST_PART_CELLS, f"--part-cells {part_cells} is not between 1 and {MOST_PART_CELLS}.")
    columns: dict[str, str] = {}
    sources = []
    for path in paths:
        state = file_state(path)
        with open_source(path, rule, allow_noninteger) as counts:
            for name, kind in _column_types(counts, rule).items():
                if columns.setdefault(name, kind) != kind:
                    raise DataError(
                        f"{path}: column {name!r} holds {kind} values, in {paths[0]} {columns[name]}; "
                        "make them the same, or leave it out of --columns."
                    )
            genes = match_genes(counts, gene_set)
            facts = {"path": str(path.resolve()), "cells": counts.num_cells, "genes": len(counts.gene_ids)}
            facts |= {"genes_matched": genes.match.num_matched, "matched_by": genes.match.num_columns_by_way}
            unranked = np.unique(counts.gene_ids[genes.unranked])
            facts |= {"genes_without_median": len(unranked), "such_genes": unranked[:3].tolist()}
            facts |= {} if genes.match.summed is None else {"genes_summed": genes.match.summed}
            facts |= {"notes": counts.notes, "state": state}
            sources.append(facts)
    if not any(source["cells"] for source in sources):
        raise DataError(f"{paths[0]}: no cells{' in this and the other files' if len(paths) > 1 else ''}.")
    settings = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
    plan = Plan(gene_set.describe(), settings, part_cells, columns, sources)
    return Plan(**{name: json.loads(json.dumps(getattr(plan, name))) for name in plan.__dataclass_fields__})


def open_source(path: Path, rule: Rule, allow_noninteger: bool, scratch: Path | None = None) -> CountsFile:
    """Open a file as the rule says."""
    return open_counts(
        path,
        gene_id_column=rule.gene_id_column,
        layer=rule.layer,
        raw=rule.raw,
        allow_noninteger=allow_noninteger,
        scratch=scratch,
    )


def _column_types(counts: CountsFile, rule: Rule) -> dict[str, str]:
    """Return the type of each carried column; the columns of totals and of the filter must be there too."""
    used = [name for name in (rule.n_counts_column, rule.filter_column) if name is not None]
    counts.obs(used, 0, 0)
    schema = counts.obs(rule.columns, 0, min(counts.num_cells, 1)).schema
    return {name: str(schema.field(name).type) for name in rule.columns}


def settle(plan: Plan, folder: Path) -> None:
    """Write the plan into a new folder, or make sure that it is the plan of the folder.

    Raises
    ------
    OutputError
        If the folder holds something else: another corpus, files that are no corpus, parts of another rule.
    DataError
        If a source changed since the corpus was begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()} - {LOCK_FILE, f"{PLAN_FILE}.tmp"}
    if not (folder / PLAN_FILE).exists():  # looked for after the listing: another shard may be starting
        if others:
            raise OutputError(f"{folder} holds other files ({min(others)}); name a new folder.")
        with locked(folder / LOCK_FILE):
            if not (folder / PLAN_FILE).exists():
                with replacing(folder / PLAN_FILE) as temporary:
                    temporary.write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
    _compare(read_json(folder / PLAN_FILE), plan.as_dict(), folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of this project.

    Raises
    ------
    DataError
        If it is damaged or of a newer release.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = int(values["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete its folder and start again.") from error
    if version > FORMAT_VERSION:
        raise DataError(f"{path} was written by a newer release (format {version}); update this one.")
    return dict(values)


def _compare(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for difference in _changed_sources(before["sources"], now["sources"]):
        raise DataError(f"{difference} since the corpus {folder} was begun; start again with --overwrite.")
    for difference in _differences(before, now):
        raise OutputError(f"{folder} is a corpus of other settings ({difference}); name another folder or --overwrite.")


def _changed_sources(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    states = {source["path"]: source["state"] for source in before}
    for source in now:
        old, new = states.get(source["path"], source["state"]), source["state"]
        if old != new:
            size = (
                f"{old['bytes']:,} to {new['bytes']:,} bytes" if old["bytes"] != new["bytes"] else "its time of change"
            )
            yield f"{source['path']} changed ({size})"


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before["gene_set"] != now["gene_set"]:
        names = [f"{plan['gene_set']['name']!r} {plan['gene_set']['fingerprint'][:12]}" for plan in (before, now)]
        yield f"gene set {names[0]} before, {names[1]} now"
    for name in now["rule"]:
        if before["rule"].get(name) != now["rule"][name]:
            option = "--" + name.replace("_", "-")
            yield f"{option} {before['rule'].get(name)} before, {now['rule'][name]} now"
    if before["part_cells"] != now["part_cells"]:
        yield f"--part-cells {before['part_cells']} before, {now['part_cells']} now"
    paths = [[source["path"] for source in plan["sources"]] for plan in (before, now)]
    if paths[0] != paths[1]:
        other = [path for path in paths[1] if path not in paths[0]] + [
            path for path in paths[0] if path not in paths[1]
        ]
        yield f"other files, {other[0]} for example" if other else "the files in another order"
    if before != now:
        yield "files read in another way"


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `I/N`.

    Raises
    ------
    ConfigError
        If it is not that, or I is beyond N.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and 0 <= int(number) <= int(total) > 0):
        raise ConfigError(f"--shard {text}: give I/N, such as 3/8, with I from 1 to N (or from 0 to N - 1).")
    return int(number), int(total)
