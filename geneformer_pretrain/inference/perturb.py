"""In-silico perturbation: what a model makes of cells whose genes are deleted, overexpressed or shifted.

Originals go through the model once; their hidden states stay on the device while the perturbed copies, which are made
when a pack is filled and never stored, are compared with them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_pretrain.console import Progress, Summary, say
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import DataError, OutputError, require
from geneformer_pretrain.inference.cells import Cells, CountsOptions, open_cells
from geneformer_pretrain.inference.comparing import Comparing, Group
from geneformer_pretrain.inference.edits import Copies, Mode, Rule, find_copies
from geneformer_pretrain.inference.model import Model, load_model
from geneformer_pretrain.inference.packs import Pack
from geneformer_pretrain.inference.parts import (
    Job,
    Lock,
    Part,
    Writer,
    in_turn,
    join_ranks,
    local_device,
    remove,
    share,
    write_table,
)
from geneformer_pretrain.inference.runner import COMPILE_FROM, Runner, windows
from geneformer_pretrain.inference.states import find_states, state_vectors

PART_TOKENS = 2**28
"""About the tokens of a part: half a minute of work on a GPU for small models, some minutes for large ones."""

CENSUS_TOKENS = 2**21
"""Tokens of the cells whose copies are counted at a time."""

MEASURED_SECONDS = 1.0
"""Duration of the measurement that the estimate rests on."""

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
        require(self.max_cells is None or self.max_cells > 0, f"--max-cells {self.max_cells}: must be above 0.")

    @property
    def state_names(self) -> list[str]:
        """The states, the goal first."""
        if self.start is None or self.goal is None:
            return []
        return [self.goal, self.start, *self.alternatives]


def perturb(options: PerturbOptions) -> Summary:
    """Perturb cells, on one rank or several, and write scores and statistics.

    Raises
    ------
    ConfigError, DataError, OutputError
        Naming the option, file, gene or cell, and the remedy.
    """
    began = perf_counter()
    ranks = join_ranks()
    with in_turn(ranks, lambda: _prepare(options, is_main=ranks.rank == 0)):
        return _perturb(options, ranks, began)


def _prepare(options: PerturbOptions, *, is_main: bool) -> AbstractContextManager[object]:
    """Make the folders, unless they hold something else or finished results, and lock them; on the first rank."""
    if not is_main:
        return nullcontext()
    output = options.output
    if options.overwrite:
        remove(output)
    if (output / "summary.json").exists():
        raise OutputError(f"{output}: these results are complete; name another output or add --overwrite.")
    if output.exists() and any(output.iterdir()) and not (output / "scores").is_dir():
        raise OutputError(f"{output}: holds something else than scores; name another output.")
    (output / "scores").mkdir(parents=True, exist_ok=True)
    _work(options).mkdir(exist_ok=True)
    return Lock(output)


def _work(options: PerturbOptions) -> Path:
    """Folder for intermediate results."""
    return options.output / "work"


@dataclass(frozen=True, eq=False)
class _Census:
    """Number and tokens of the copies of each chosen cell; `tokens` counts what has to be computed."""

    copies: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class _Opened:
    """What is perturbed: all cells, the numbers of those chosen, and how."""

    cells: Cells
    chosen: np.ndarray
    rule: Rule
    states: list[np.ndarray]
    census: _Census
    job: Job


def _perturb(options: PerturbOptions, ranks: Ranks, began: float) -> Summary:
    model = load_model(options.model, gene_set=options.gene_set, dtype=options.dtype, device=local_device())
    opening = perf_counter()
    opened = in_turn(ranks, lambda: _open(options, model, ranks))
    opening = perf_counter() - opening
    left = ranks.gather(opened.job.left())[0]
    mine = share(left, ranks.rank, ranks.size)
    tokens, copies = (sum(int(x[part.first : part.last].sum()) for part in left) for x in _sizes(opened.census))
    cells = opened.cells
    length = tokens / max(1, copies)
    runner = Runner(
        model,
        options.layer,
        longest=model.max_tokens if opened.rule.mode is Mode.overexpress else int(cells.lengths.max()),
        tokens=options.tokens,
        compiled=model.flops_per_token(options.layer, length) * tokens / ranks.size > COMPILE_FROM,
    )
    names = options.state_names
    vectors = None
    if names:
        vectors = state_vectors(runner, cells, names, opened.states, options.output / "states.parquet", ranks)
    comparing = Comparing(runner, opened.rule, vectors)
    rate = runner.measure(comparing.compare, MEASURED_SECONDS) * ranks.size
    if ranks.rank == 0:
        size = copies * (16 + 4 * comparing.num_scores) / 1e6
        say(
            f"{copies:,} perturbations of {len(opened.chosen):,} cells, {tokens:,} tokens: about "
            f"{tokens / rate / 60:.1f} min at {rate:,.0f} tokens/s, and {size:,.0f} MB of scores."
        )
    ranks.gather(None)
    started = perf_counter()
    _run(options, model, runner, comparing, opened, mine, ranks)
    ranks.gather(None)
    seconds = opening + perf_counter() - started
    if ranks.rank == 0:
        remove(_work(options))
    lines = [
        f"{options.output / 'scores'}: {opened.census.copies.sum():,} perturbations of {len(opened.chosen):,} cells, "
        f"{options.mode}, layer {options.layer}.",
        f"{tokens:,} tokens in {seconds:.1f} s after {started - began - opening:.1f} s of start: "
        f"{tokens / seconds:,.0f} tokens/s on {ranks.size} x {model.device.type}.",
    ]
    if options.statistics and ranks.rank == 0:
        _summarize(options, model, names)
        lines.append(f"{options.output / 'genes.parquet'}: statistics of each perturbation.")
    values = {
        "cells": len(opened.chosen),
        "perturbations": copies,
        "tokens": tokens,
        "start_seconds": started - began - opening,
        "opening_seconds": opening,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "ranks": ranks.size,
        "pack_tokens": runner.tokens,
        "compiled": runner.compiled_tokens > 0,
        "output": str(options.output),
    }
    return Summary(lines, values)


def _sizes(census: _Census) -> tuple[np.ndarray, np.ndarray]:
    return census.tokens, census.copies


def _summarize(options: PerturbOptions, model: Model, names: Sequence[str]) -> None:
    from geneformer_pretrain.inference.statistics import summarize

    genes = model.gene_set
    symbols = {token: symbol for token, symbol in zip(genes.tokens, genes.symbols, strict=True) if symbol}
    summarize(
        options.output / "scores",
        options.output,
        states=[name for name in names if name != options.start] or None,
        replicates=options.replicates,
        symbols=symbols,
    )


def _open(options: PerturbOptions, model: Model, ranks: Ranks) -> _Opened:
    """Open cells and job."""
    cells = open_cells(options.cells, model, _work(options), options.counts, show_progress=ranks.rank == 0)
    if options.replicates is not None:
        cells.require_columns([options.replicates], "--replicates")
    rule = make_rule(options, model)
    states: list[np.ndarray] = []
    chosen = np.arange(cells.num_cells)
    if options.states is not None:
        states = find_states(cells, options.states, options.state_names)
        chosen = states[options.state_names.index(str(options.start))]
    if options.max_cells is not None and options.max_cells < len(chosen):
        generator = np.random.default_rng(options.seed)
        chosen = np.sort(generator.choice(chosen, options.max_cells, replace=False))
    census = _count(cells, chosen, rule, is_main=ranks.rank == 0)
    kept = ("mode", "genes", "together", "anchor", "fraction", "states", "start", "goal", "alternatives", "replicates")
    asked = asdict(options)
    settings: dict[str, Any] = {
        "command": "perturb",
        "model": model.fingerprint,
        "gene set": model.gene_set.fingerprint,
        "cells": cells.corpus.fingerprint,
        **{name: asked[name] for name in kept},
        "perturbations": None if rule.sets is None else rule.sets.tolist(),
        "layer": model.num_layers_below(options.layer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max cells": options.max_cells,
        "seed": options.seed,
    }
    costs = census.tokens * (1.0 + cells.lengths[chosen] / (6.0 * model.hidden_size)) + 1.0
    part_cost = PART_TOKENS * float(costs.sum()) / max(1.0, float(census.tokens.sum()))
    job = Job.open(options.output / "scores", settings, costs, part_cost, ranks.size)
    return _Opened(cells, chosen, rule, states, census, job)


def make_rule(options: PerturbOptions, model: Model) -> Rule:
    """Turn gene ids into tokens.

    Raises
    ------
    DataError
        Genes that the gene set does not have.
    """
    anchor = None if options.anchor is None else int(_tokens_of([options.anchor], model, "--anchor")[0])
    sets = None
    if options.genes != "all":
        tokens = _tokens_of(_listed(options.genes), model, "--genes")
        sets = tokens[None] if options.together else tokens[:, None]
        if anchor is not None:
            sets = sets[sets[:, 0] != anchor]
            sets = np.concatenate([np.full_like(sets, anchor), sets], axis=1)
    return Rule(
        mode=Mode[options.mode],
        sets=sets,
        anchor=anchor,
        fraction=options.fraction or 0.0,
        limit=model.max_tokens,
        added=int(model.cls_token is not None),
        vocab_size=model.vocab_size,
    )


def _listed(text: str) -> list[str]:
    """Gene ids of a file, one a line, or of a list with commas."""
    path = Path(text)
    ids = path.read_text().split() if path.is_file() else text.split(",")
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
            "the ids (`gene-set show` lists them)."
        )
    repeated = [gene for place, gene in enumerate(ids) if tokens[place] in tokens[:place]]
    if repeated:
        raise DataError(f"{option}: {repeated[0]} is named twice.")
    return tokens


def _count(cells: Cells, chosen: np.ndarray, rule: Rule, *, is_main: bool) -> _Census:
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
    return _Census(copies, tokens)


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
        where = cells.corpus.describe_cell(int(numbers[bad.argmax()]))
        raise DataError(f"{where}: the cell is not between <cls> and <eos>; tokenize it with the model's gene set.")


@dataclass(eq=False)
class _Results:
    """Groups of a part, and how many copies still have no scores."""

    part: Part
    groups: list[Group]
    waiting: int


def _run(
    options: PerturbOptions, model: Model, runner: Runner, comparing: Comparing, opened: _Opened, mine: list[Part],
    ranks: Ranks,
) -> None:  # fmt: skip
    """Perturb the cells of this rank's parts and write each part once it is complete."""
    total = int(sum(opened.census.copies[part.first : part.last].sum() for part in mine))
    begun: list[_Results] = []
    commit = partial(_commit, options, model, opened)

    def packs() -> Iterator[Pack]:
        for part in mine:
            results = _begin(part, comparing, opened)
            begun.append(results)
            for group in results.groups:
                yield from comparing.packs(group, results)

    with Progress(total, "perturb", "perturbation", enabled=ranks.rank == 0) as progress, Writer() as writer:
        for pack, rows in runner.run(packs()):
            group, results = pack.owner
            if not comparing.receive(group, pack, rows):
                continue
            progress.advance(len(rows))
            results.waiting -= len(rows)
            if not results.waiting:
                progress.advance(sum(group.num_skipped for group in results.groups))
                writer.write(partial(commit, results))
                begun.remove(results)
        for results in begun:  # parts in which there was nothing to compute
            progress.advance(sum(group.num_skipped for group in results.groups))
            writer.write(partial(commit, results))


def _begin(part: Part, comparing: Comparing, opened: _Opened) -> _Results:
    """List the copies of a part."""
    chosen = opened.chosen[part.first : part.last]
    groups = []
    for some in windows(opened.cells.lengths[chosen] * comparing.most_originals, comparing.capacity):
        tokens, offsets = opened.cells.tokens(chosen[some])
        groups.append(comparing.group(chosen[some], tokens, offsets))
    return _Results(part, groups, sum(group.num_computed for group in groups))


def _commit(options: PerturbOptions, model: Model, opened: _Opened, results: _Results) -> None:
    """Write the scores of a part, in the order of the cells."""
    tables = [_table(options, model, opened.cells, group) for group in results.groups]
    write_table(pa.concat_tables(tables), opened.job.path(results.part))


def _table(options: PerturbOptions, model: Model, cells: Cells, group: Group) -> pa.Table:
    """One row for each copy."""
    copies: Copies = group.copies
    place = pa.array(copies.cell)
    columns: dict[str, Any] = {
        "cell": group.cells[copies.cell],
        "cell_id": cells.ids(group.cells).take(place),
    }
    if options.replicates is not None:
        values = cells.table([options.replicates], group.cells)[options.replicates]
        columns[options.replicates] = values.combine_chunks().take(place)
    names = pa.array(model.gene_set.tokens, pa.string())
    parts = [names.take(pa.array(copies.genes[:, k])) for k in range(copies.genes.shape[1])]
    columns["perturbation"] = pc.binary_join_element_wise(*parts, "+")
    rank = copies.positions[:, -1 if options.anchor is not None else 0]
    columns["rank"] = pa.array(rank, pa.int32(), mask=rank < 0)
    names_of_scores = ["gene_similarity", "cell_similarity"]
    names_of_scores += ["cls_similarity"] if model.cls_token is not None else []
    names_of_scores += [f"shift_{name}" for name in options.state_names]
    for name, scores in zip(names_of_scores, group.scores.T, strict=True):
        columns[name] = pa.array(scores, pa.float32(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)
