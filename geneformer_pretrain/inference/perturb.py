"""In-silico perturbation: what a model makes of cells whose genes are deleted, overexpressed or shifted.

Originals go through the model once; their hidden states stay on the device while the perturbed copies, which are made
when a pack is filled and never stored, are compared with them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_pretrain.console import Summary, amount, say
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.inference.cells import Cells, open_cells
from geneformer_pretrain.inference.comparing import Comparing, Group
from geneformer_pretrain.inference.corpus import find_corpus
from geneformer_pretrain.inference.edits import Copies, Mode, Rule
from geneformer_pretrain.inference.model import Model, load_model
from geneformer_pretrain.inference.packs import Pack
from geneformer_pretrain.inference.parts import (
    LOCK_FILE,
    Job,
    Lock,
    Part,
    Writer,
    at_once,
    clear,
    in_turn,
    join_ranks,
    local_device,
    part_tokens,
    remaining,
    remove,
    share,
    share_progress,
    write_table,
)
from geneformer_pretrain.inference.perturbations import Census, PerturbOptions, count_copies, make_rule
from geneformer_pretrain.inference.phases import Phases
from geneformer_pretrain.inference.runner import COMPILE_FROM, Runner, windows
from geneformer_pretrain.inference.states import find_states, state_vectors
from geneformer_pretrain.inference.statistics_scores import MIN_REPLICATES, TESTED_REPLICATES

PART_TOKENS = 2**28
"""About the tokens of a part: half a minute of work on a GPU for small models, some minutes for large ones."""

RESULTS = ("summary.json", "genes.parquet", "ranked.png", "volcano.png", "states.parquet")
"""Files beside the folder of scores; the first is written last and says that all are complete."""

MEASURED_SECONDS = 0.5
"""Duration of the measurement that the estimate rests on."""


def perturb(options: PerturbOptions) -> Summary:
    """Perturb cells, on one rank or several, and write scores and statistics.

    Raises
    ------
    ConfigError, DataError, OutputError
        Naming the option, file, gene or cell, and the remedy.
    """
    phases = Phases()
    ranks = join_ranks()
    in_turn(ranks, lambda: _require_output(options))
    model = load_model(options.model, gene_set=options.gene_set, dtype=options.dtype, device=local_device())
    make_rule(options, model, model.max_tokens)  # refuses unknown genes before anything is made
    phases.end("model")
    with in_turn(ranks, lambda: Lock(options.output) if ranks.rank == 0 else nullcontext()):
        return _perturb(options, model, ranks, phases)


def _require_output(options: PerturbOptions) -> None:
    """Raise OutputError if the output holds something else, or finished results."""
    output = options.output
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; name a folder.")
    is_ours = (output / LOCK_FILE).exists() or (output / "scores").is_dir()  # the lock is made first, and stays
    if output.is_dir() and any(output.iterdir()) and not is_ours:
        raise OutputError(f"{output}: holds something else than scores; name another output.")
    if (output / "summary.json").exists() and not options.overwrite:
        raise OutputError(f"{output}: these results are complete; name another output or add --overwrite.")


def _work(options: PerturbOptions) -> Path:
    """Folder for intermediate results."""
    return options.output / "work"


def _clear(options: PerturbOptions) -> None:
    """Delete earlier results, but neither what has just been made of counts nor files of others."""
    for name in RESULTS:
        (options.output / name).unlink(missing_ok=True)
    if (options.output / "scores").is_dir():
        clear(options.output / "scores")


@dataclass(frozen=True, eq=False)
class _Opened:
    """What is perturbed: all cells, the numbers of those chosen, and how."""

    cells: Cells
    chosen: np.ndarray
    rule: Rule
    states: list[np.ndarray]
    census: Census


def _perturb(options: PerturbOptions, model: Model, ranks: Ranks, phases: Phases) -> Summary:
    is_main = ranks.rank == 0
    work = _work(options)
    if is_main:
        work.mkdir(exist_ok=True)
    needed = {"--states": options.states, "--replicates": options.replicates}
    corpus = in_turn(
        ranks, lambda: find_corpus(options.cells, model, work, options.counts, is_main=is_main, needed=needed)
    )
    opened = at_once(ranks, lambda: _open(options, model, corpus, is_main=is_main))
    job = in_turn(ranks, lambda: _open_job(options, model, opened, ranks))
    left = remaining(job, ranks)
    phases.end("open")
    tokens, copies = sum(map(opened.census.tokens_of, left)), sum(map(len, left))
    cells = opened.cells
    flops = model.flops_per_token(options.layer, tokens / max(1, copies)) * tokens / ranks.size
    runner = Runner(
        model,
        options.layer,
        longest=cells.max_tokens if opened.rule.mode is Mode.overexpress else int(cells.lengths.max()),
        tokens=options.tokens,
        compiled=flops > COMPILE_FROM,
    )
    vectors = None
    if options.state_names:
        path = options.output / "states.parquet"
        vectors = state_vectors(runner, cells, options.state_names, opened.states, path, ranks)
        phases.end("states")
    comparing = Comparing(runner, opened.rule, vectors)
    rate = runner.measure(comparing.compare, _typical_length(opened), MEASURED_SECONDS) * ranks.size
    if is_main:
        minutes, size = tokens / rate / 60, copies * (16 + 4 * comparing.num_scores) / 1e6
        duration = f"{minutes:,.1f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
        say(
            f"{amount(copies, 'perturbation')} of {_cells_with_copies(opened)}, {tokens:,} tokens: about {duration} at "
            f"{rate:,.0f} tokens/s, and {size:,.0f} MB of scores."
        )
    ranks.gather(None)
    phases.end("warm-up")
    writing = _run(options, model, runner, comparing, opened, job, share(left, ranks.rank, ranks.size), ranks)
    phases.end_forward(ranks, packs=runner.waited, writing=writing)
    seconds = phases.total("open", "forward")
    rate, forward_rate = tokens / seconds, tokens / phases.total("forward")
    lines = [
        f"{options.output / 'scores'}: {amount(int(opened.census.copies.sum()), 'perturbation')} of "
        f"{_cells_with_copies(opened)}, {options.mode}, layer {options.layer}.",
        f"{tokens:,} tokens in {seconds:.1f} s on {ranks.size} x {model.device.type}, reading and writing included: "
        f"{rate:,.0f} tokens/s; forward alone {forward_rate:,.0f} tokens/s.",
    ]
    if is_main:
        if options.statistics:
            _summarize(options, model)
            lines.append(f"{options.output / 'genes.parquet'}: statistics of each perturbation.")
        remove(work)
    phases.end("statistics")
    values = {
        "cells": len(opened.chosen),
        "perturbations": copies,
        "tokens": tokens,
        **phases.values,
        "seconds": seconds,
        "tokens_per_second": rate,
        "forward_tokens_per_second": forward_rate,
        "ranks": ranks.size,
        "pack_tokens": runner.tokens,
        "compiled": runner.compiled_tokens > 0,
        "output": str(options.output),
    }
    return Summary([*lines, phases.line], values)


def _cells_with_copies(opened: _Opened) -> str:
    """Number of cells that are perturbed, and of the chosen ones if others have nothing to perturb."""
    number, chosen = int(np.count_nonzero(opened.census.copies)), len(opened.chosen)
    if number == chosen:
        return amount(chosen, "cell")
    return f"{number:,} of {amount(chosen, 'cell')} (the others have nothing to perturb)"


def _typical_length(opened: _Opened) -> int:
    """Mean tokens of the cell that a token is in: with cells of this length, attention costs what it costs the job."""
    lengths, tokens = opened.cells.lengths[opened.chosen], opened.census.tokens
    return round(float(lengths @ tokens) / float(tokens.sum()))


def _summarize(options: PerturbOptions, model: Model) -> None:
    from geneformer_pretrain.inference.statistics import summarize

    genes = model.gene_set
    symbols = {token: symbol for token, symbol in zip(genes.tokens, genes.symbols, strict=True) if symbol}
    summarize(
        options.output / "scores",
        options.output,
        states=[name for name in options.state_names if name != options.start] or None,
        replicates=options.replicates,
        symbols=symbols,
    )


def _open(options: PerturbOptions, model: Model, corpus: Path, *, is_main: bool) -> _Opened:
    """Open the cells, choose those to perturb and count their copies."""
    cells = open_cells(corpus, model, max_tokens=options.max_tokens, is_main=is_main)
    rule = make_rule(options, model, cells.max_tokens)
    states: list[np.ndarray] = []
    chosen = np.arange(cells.num_cells)
    if options.states is not None:
        states = find_states(cells, options.states, options.state_names)
        chosen = states[options.state_names.index(str(options.start))]
    if options.max_cells is not None and options.max_cells < len(chosen):
        generator = np.random.default_rng(options.seed)
        chosen = np.sort(generator.choice(chosen, options.max_cells, replace=False))
    if options.replicates is not None:
        _require_replicates(cells, options, chosen, is_main=is_main)
    return _Opened(cells, chosen, rule, states, count_copies(cells, chosen, rule, is_main=is_main))


def _require_replicates(cells: Cells, options: PerturbOptions, chosen: np.ndarray, *, is_main: bool) -> None:
    """Raise DataError unless the chosen cells have at least two values in the column of replicates."""
    column = str(options.replicates)
    cells.require_columns([column], "--replicates")
    if options.statistics:
        values = cells.names(column, chosen).drop_null().unique().to_pylist()
        if len(values) < MIN_REPLICATES:
            only = f"is {values[0]!r} in all" if values else "has no value in any"
            raise DataError(
                f"--replicates {column}: the column {only} of the {amount(len(chosen), 'cell')} to perturb, and "
                f"statistics need at least {MIN_REPLICATES} replicates, p-values {TESTED_REPLICATES}; choose another "
                "column or leave the option out."
            )
        if len(values) < TESTED_REPLICATES and is_main:
            say(f"--replicates {column}: {len(values)} replicates; p-values need {TESTED_REPLICATES} and stay empty.")


def _open_job(options: PerturbOptions, model: Model, opened: _Opened, ranks: Ranks) -> Job:
    """Open the job, or begin it."""
    scores = options.output / "scores"
    if ranks.rank == 0:
        if options.overwrite:
            _clear(options)
        scores.mkdir(exist_ok=True)
    kept = ("mode", "genes", "together", "anchor", "fraction", "states", "start", "goal", "alternatives", "replicates")
    asked, rule, cells, census = asdict(options), opened.rule, opened.cells, opened.census
    settings: dict[str, Any] = {
        "command": "perturb",
        "model": model.fingerprint,
        "gene set": model.gene_set.fingerprint,
        "cells": cells.source.fingerprint,
        "max tokens": cells.max_tokens,
        **{name: asked[name] for name in kept},
        "perturbations": None if rule.sets is None else rule.sets.tolist(),
        "layers computed": model.num_layers_below(options.layer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max cells": options.max_cells,
        "seed": options.seed,
    }
    costs = census.tokens * (1.0 + cells.lengths[opened.chosen] / (6.0 * model.hidden_size)) + 1.0
    total = int(census.tokens.sum())
    part_cost = part_tokens(PART_TOKENS, model.device, total) * float(costs.sum()) / max(1, total)
    return Job.open(scores, settings, costs, part_cost, ranks.size, copies=census.copies)


@dataclass(eq=False)
class _Results:
    """Groups of a part, and how many copies still have no scores."""

    part: Part
    groups: list[Group]
    waiting: int


def _run(
    options: PerturbOptions, model: Model, runner: Runner, comparing: Comparing, opened: _Opened, job: Job,
    mine: list[Part], ranks: Ranks,
) -> float:  # fmt: skip
    """Perturb the cells of this rank's parts and write each once it is complete; return the seconds waited for that."""
    begun: list[_Results] = []
    commit = partial(_commit, options, model, opened, job)

    def packs() -> Iterator[Pack]:
        for part in mine:
            results = _begin(part, comparing, opened)
            begun.append(results)
            for group in results.groups:
                yield from comparing.packs(group, results)

    with (
        share_progress(ranks, sum(map(len, mine)), "perturb", "perturbation") as progress,
        Writer() as writer,
    ):
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
    return writer.waited


def _begin(part: Part, comparing: Comparing, opened: _Opened) -> _Results:
    """List the copies of a part, which may begin and end within a cell."""
    ends = opened.census.ends
    first, last = int(np.searchsorted(ends, part.first, "right")) - 1, int(np.searchsorted(ends, part.last))
    chosen, ends = opened.chosen[first:last], ends[first:last]
    groups = []
    for some in windows(opened.cells.lengths[chosen] * comparing.most_originals, comparing.capacity):
        tokens, offsets = opened.cells.tokens(chosen[some])
        kept = slice(max(0, part.first - ends[some.start]), part.last - ends[some.start])
        groups.append(comparing.group(chosen[some], tokens, offsets, kept))
    return _Results(part, groups, sum(group.num_computed for group in groups))


def _commit(options: PerturbOptions, model: Model, opened: _Opened, job: Job, results: _Results) -> None:
    """Write the scores of a part, in the order of the cells."""
    for group in results.groups:
        _require_finite(opened.cells, opened.rule, group)
    tables = [_table(options, model, opened.cells, group) for group in results.groups]
    write_table(pa.concat_tables(tables), job.path(results.part))


def _require_finite(cells: Cells, rule: Rule, group: Group) -> None:
    """Raise DataError, naming the cell, where finite weights overflowed: a score is missing, but not for want of genes.

    Genes of the perturbation are not compared, and are in all copies but those by *delete*.
    """
    compared = group.copies.lengths - 2 * rule.added - (0 if rule.mode is Mode.delete else rule.size)
    bad = (compared > 0) & np.isnan(group.scores).any(axis=1)
    if bad.any():
        where = cells.source.describe_cell(int(group.cells[group.copies.cell[bad.argmax()]]))
        raise DataError(f"{where}: its scores are not finite; the model's training diverged.")


def _table(options: PerturbOptions, model: Model, cells: Cells, group: Group) -> pa.Table:
    """One row for each copy."""
    copies: Copies = group.copies
    place = pa.array(copies.cell)
    columns: dict[str, Any] = {
        "cell": group.cells[copies.cell],
        "cell_id": cells.ids(group.cells).take(place),
    }
    if options.replicates is not None:
        columns[options.replicates] = cells.names(options.replicates, group.cells).take(place)
    names = pa.array(model.gene_set.tokens, pa.string())
    parts = [names.take(pa.array(copies.genes[:, k])) for k in range(copies.genes.shape[1])]
    columns["perturbation"] = pc.binary_join_element_wise(*parts, "+")
    rank = copies.positions[:, -1 if options.anchor is not None else 0]
    columns["rank"] = pa.array(rank, pa.int32(), mask=rank < 0)
    names_of_scores = ["gene_similarity", "cell_similarity"]
    names_of_scores += ["cls_similarity"] if model.cls_token is not None else []
    names_of_scores += [f"shift_{name}" for name in options.state_names]
    if model.cls_token is not None:
        names_of_scores += [f"cls_shift_{name}" for name in options.state_names]
    for name, scores in zip(names_of_scores, group.scores.T, strict=True):
        columns[name] = pa.array(scores, pa.float32(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)
