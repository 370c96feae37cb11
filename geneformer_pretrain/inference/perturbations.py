"""Options of `perturb`: which genes of which cells are perturbed, and how many copies that makes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from geneformer_pretrain.console import say
from geneformer_pretrain.errors import DataError, require
from geneformer_pretrain.inference.cells import Cells
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.edits import Mode, Rule, find_copies
from geneformer_pretrain.inference.model import Model
from geneformer_pretrain.inference.parts import Part
from geneformer_pretrain.inference.runner import windows

SCORE_COLUMNS = (
    *("cell", "cell_id", "perturbation", "rank"),
    *("gene_similarity", "cell_similarity", "cls_similarity"),
)
"""Columns of the scores that no column of the cells may replace."""

CENSUS_TOKENS = 2**21
"""Tokens of the cells whose copies are counted at a time."""

LISTED = 5
"""Genes that a message names."""


@dataclass(frozen=True)
class PerturbOptions:
    """Arguments of `perturb`; see the command.

    Attributes
    ----------
    genes
        "all", gene ids joined by commas, or a file with one id a line.
    fraction
        Share of a cell's genes by which *shift* moves, positive to the front.
    states
        Column of the cells, of whose values `start`, `goal` and `alternatives` are some.
    tokens
        Token budget of a pack.
    max_tokens
        Longer cells are cut; by default those longer than the model's training cells.
    """

    model: Path
    cells: list[str]
    output: Path
    mode: str
    genes: str = "all"
    together: bool = False
    anchor: str | None = None
    fraction: float | None = None
    layer: int = -2
    states: str | None = None
    start: str | None = None
    goal: str | None = None
    alternatives: list[str] = field(default_factory=list)
    replicates: str | None = None
    max_cells: int | None = None
    seed: int = 0
    gene_set: Path | None = None
    dtype: str = "auto"
    tokens: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False
    statistics: bool = True
    counts: CountsOptions = field(default_factory=CountsOptions)

    def __post_init__(self) -> None:
        is_shift = self.mode == Mode.shift.name
        require(is_shift == (self.fraction is not None), "--mode shift and --shift FRACTION go together.")
        require(abs(self.fraction or 0) <= 1, f"--shift {self.fraction}: choose a share from -1 to 1.")
        require(not (self.together and self.genes == "all"), "--together needs a list of genes, not --genes all.")
        require(not (self.together and self.anchor), "--anchor pairs a gene with each other one; leave out --together.")
        given = (self.states is not None, self.start is not None, self.goal is not None)
        require(all(given) or not any(given), "--states COLUMN, --start A and --goal B go together.")
        require(self.states is not None or not self.alternatives, "--alternatives needs --states, --start and --goal.")
        names = self.state_names
        require(len(set(names)) == len(names), "--start, --goal and --alternatives: a state is named twice.")
        require(self.seed >= 0, f"--seed {self.seed}: must not be negative.")
        require(self.tokens is None or self.tokens > 0, f"--pack-tokens {self.tokens}: must be above 0.")
        require(
            self.replicates not in SCORE_COLUMNS and not str(self.replicates).startswith(("shift_", "cls_shift_")),
            f"--replicates {self.replicates}: scores have a column of this name themselves; rename that of the cells.",
        )
        require(self.max_cells is None or self.max_cells > 0, f"--max-cells {self.max_cells}: must be above 0.")

    @property
    def state_names(self) -> list[str]:
        """The states, the goal first."""
        if self.start is None or self.goal is None:
            return []
        return [self.goal, self.start, *self.alternatives]


@dataclass(frozen=True, eq=False)
class Census:
    """Number and tokens of the copies of each chosen cell; `tokens` counts what has to be computed."""

    copies: np.ndarray
    tokens: np.ndarray

    @cached_property
    def ends(self) -> np.ndarray:
        """Copies before each cell, and all of them: int64 [cells + 1]."""
        return np.insert(np.cumsum(self.copies), 0, 0)

    @cached_property
    def _token_ends(self) -> np.ndarray:
        return np.insert(np.cumsum(self.tokens), 0, 0)

    def tokens_of(self, part: Part) -> int:
        """Tokens of a part of the copies; those of a cell that is cut are shared out evenly."""
        tokens = np.interp([part.first, part.last], self.ends, self._token_ends)
        return int(np.diff(np.rint(tokens))[0])


def make_rule(options: PerturbOptions, model: Model, limit: int) -> Rule:
    """Turn gene ids into tokens; cells may have up to `limit` tokens.

    Raises
    ------
    DataError
        Genes that the gene set does not have.
    ConfigError
        More genes to overexpress together than cells have room for.
    """
    anchor = None if options.anchor is None else int(_tokens_of([options.anchor], model, "--anchor")[0])
    sets = None
    if options.genes != "all":
        tokens = _tokens_of(_listed(options.genes), model, "--genes")
        sets = tokens[None] if options.together else tokens[:, None]
        if anchor is not None:
            sets = sets[sets[:, 0] != anchor]
            require(len(sets) > 0, f"--genes {options.genes}: names none besides the anchor; pairs need another gene.")
            sets = np.concatenate([np.full_like(sets, anchor), sets], axis=1)
    rule = Rule(
        mode=Mode[options.mode],
        sets=sets,
        anchor=anchor,
        fraction=options.fraction or 0.0,
        limit=limit,
        added=int(model.cls_token is not None),
        vocab_size=model.vocab_size,
    )
    require(
        rule.mode is not Mode.overexpress or rule.size < limit - 2 * rule.added,
        f"--mode overexpress: {rule.size:,} genes in front leave no room for others in cells of up to {limit:,} "
        "tokens; name fewer, or allow longer cells by --max-tokens.",
    )
    return rule


def _listed(text: str) -> list[str]:
    """Gene ids of a file, one a line, or of a list with commas."""
    try:
        # Unlike that of Path, this one is false for a list that is too long to name a file.
        is_file = os.path.isfile(text)
        ids = Path(text).read_text(encoding="utf-8-sig").split() if is_file else text.split(",")
    except UnicodeDecodeError as error:
        raise DataError(f"--genes {text}: not a text file; write one gene id a line.") from error
    ids = [gene.strip() for gene in ids if gene.strip()]
    if not ids:
        raise DataError(f"--genes {text}: names no gene.")
    return ids


def _tokens_of(ids: Sequence[str], model: Model, option: str) -> np.ndarray:
    tokens = np.asarray(model.gene_set.match(list(ids)).token_of_column, np.int32)
    unknown = [gene for gene, token in zip(ids, tokens, strict=True) if token < 0]
    if unknown:
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        raise DataError(
            f"{option}: the gene set {model.gene_set.name!r} has no gene {', '.join(unknown[:LISTED])}{more}; correct "
            "the ids (`gene-set show MODEL --tsv FILE` lists them), or the name of the file with one id a line."
        )
    repeated = [gene for place, gene in enumerate(ids) if tokens[place] in tokens[:place]]
    if repeated:
        raise DataError(f"{option}: {repeated[0]} is named twice.")
    return tokens


def count_copies(cells: Cells, chosen: np.ndarray, rule: Rule, *, is_main: bool) -> Census:
    """Count the copies of each cell, and the tokens of their forward passes.

    Raises
    ------
    DataError
        No cell has any of the genes.
    """
    copies, tokens = np.zeros(len(chosen), np.int64), np.zeros(len(chosen), np.int64)
    cells_with = np.zeros(rule.vocab_size, np.int64)
    for part in windows(cells.lengths[chosen], CENSUS_TOKENS):
        some, offsets = cells.tokens(chosen[part])
        _require_added(cells, chosen[part], some, offsets, rule)
        found = find_copies(rule, some, offsets)
        n = len(offsets) - 1
        computed = np.where(found.unchanged | found.empty, 0, found.lengths)
        copies[part] = np.bincount(found.cell, minlength=n)
        tokens[part] = np.bincount(found.cell, computed, n).astype(np.int64) + np.diff(offsets)
        cells_with += np.bincount(some, minlength=rule.vocab_size)
    tokens[copies == 0] = 0
    if rule.mode is not Mode.overexpress:
        wanted = [] if rule.sets is None else np.unique(rule.sets).tolist()
        wanted += [] if rule.anchor is None or rule.anchor in wanted else [rule.anchor]
        _report_absent([cells.model.gene_set.tokens[token] for token in wanted if not cells_with[token]], is_main)
    if not copies.sum():
        raise DataError("No cell has the genes to perturb (together, if --together or --anchor): name others.")
    return Census(copies, tokens)


def _report_absent(absent: Sequence[str], is_main: bool) -> None:
    if absent and is_main:
        more = f" and {len(absent) - LISTED} more" if len(absent) > LISTED else ""
        say(f"No cell has {', '.join(absent[:LISTED])}{more}; there are no scores for these genes.", error=True)


def _require_added(cells: Cells, numbers: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, rule: Rule) -> None:
    """Raise DataError, naming the cell, where <cls> or <eos> is missing."""
    if not rule.added:
        return
    special = cells.model.gene_set.special_tokens
    bad = (tokens[offsets[:-1]] != special["cls"]) | (tokens[offsets[1:] - 1] != special["eos"])
    if bad.any():
        where = cells.source.describe_cell(int(numbers[bad.argmax()]))
        raise DataError(f"{where}: the cell is not between <cls> and <eos>; tokenize it with the model's gene set.")
