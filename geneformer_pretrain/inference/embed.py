"""Embeddings of cells, and mean contextual embeddings of genes."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from geneformer_pretrain.console import Summary, amount
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import ConfigError, DataError, OutputError, require
from geneformer_pretrain.files import replacing, require_new
from geneformer_pretrain.inference.cells import Cells, open_cells
from geneformer_pretrain.inference.corpus import CountsOptions, find_corpus
from geneformer_pretrain.inference.merging import GENE_COLUMNS, Groups, Merging, genes_path, merge_genes, write_part
from geneformer_pretrain.inference.model import Model, load_model
from geneformer_pretrain.inference.packs import TOKENS_PER_CELL, Pack, Parts
from geneformer_pretrain.inference.parts import (
    JOB_FILE,
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
)
from geneformer_pretrain.inference.phases import Phases
from geneformer_pretrain.inference.pooling import first_token, mean_of_genes
from geneformer_pretrain.inference.runner import COMPILE_FROM, Ahead, Runner, windows

PART_TOKENS, GENES_PART_TOKENS = 2**25, 2**27
"""About the tokens of a part: seconds of work on a GPU. Parts with sums of genes, which are large files, are longer."""

CLS, MEAN = "cls", "mean"


@dataclass(frozen=True)
class EmbedOptions:
    """Arguments of `embed`; see the command.

    Attributes
    ----------
    genes
        File for the mean contextual embedding of each gene.
    group_by
        Column of the cells; genes are averaged for each of its values.
    tokens
        Token budget of a pack.
    max_tokens
        Longer cells are cut; by default those longer than the model's training cells.
    """

    model: Path
    cells: list[str]
    output: Path
    layer: int = -2
    pooling: str = MEAN
    genes: Path | None = None
    group_by: str | None = None
    gene_set: Path | None = None
    dtype: str = "auto"
    tokens: int | None = None
    max_tokens: int | None = None
    overwrite: bool = False
    counts: CountsOptions = field(default_factory=CountsOptions)


def embed(options: EmbedOptions) -> Summary:
    """Embed cells, on one rank or several, and write one file in the order of the cells.

    Raises
    ------
    ConfigError, DataError, OutputError
        Naming the option, file or cell, and the remedy.
    """
    phases = Phases()
    ranks = join_ranks()
    work = options.output.with_name(options.output.name + ".parts")
    with in_turn(ranks, lambda: _prepare(options, work, is_main=ranks.rank == 0)):
        return _embed(options, work, ranks, phases)


def _prepare(options: EmbedOptions, work: Path, *, is_main: bool) -> AbstractContextManager[object]:
    """Check the outputs, make the folder of intermediate results and lock it; on the first rank."""
    if not is_main:
        return nullcontext()
    require(options.output.suffix in (".parquet", ".h5ad"), f"{options.output}: name a .parquet or an .h5ad file.")
    require(options.tokens is None or options.tokens > 0, f"--pack-tokens {options.tokens}: must be above 0.")
    require(options.genes is None or options.genes.suffix == ".parquet", f"{options.genes}: name a .parquet file.")
    require(options.genes != options.output, f"{options.genes}: cells and genes need a file each.")
    require(options.group_by is None or options.genes is not None, "--group-by averages genes; add --genes FILE.")
    require(
        options.group_by not in GENE_COLUMNS,
        f"--group-by {options.group_by}: genes have a column of this name themselves; rename that of the cells.",
    )
    if options.genes is not None:
        place = options.genes.parent
        is_folder = place.is_dir() or place == options.output.parent  # that of the output is made
        require(is_folder, f"--genes {options.genes}: there is no folder {place}; make it, or correct the path.")
    for path in (options.output, options.genes):
        if path is not None:
            if path.is_dir():
                raise OutputError(f"{path}: is a folder; name a file.")
            if path.exists() and any(Path(cells).exists() and path.samefile(cells) for cells in options.cells):
                raise OutputError(f"{path}: these are the cells themselves; name another output.")
            is_unfinished = path == options.genes and _is_of_job(path, work)
            require_new(path, overwrite=options.overwrite or is_unfinished)
    lock = Lock(work)
    if options.overwrite:
        clear(work)
    return lock


def _relative(genes: Path, work: Path) -> str:
    """Path of the file of genes from the folder of the output, the same if both are moved."""
    return os.path.relpath(genes, work.parent)


def _is_of_job(genes: Path, work: Path) -> bool:
    """Decide whether a job that was stopped may have written its file of genes, which precedes the output."""
    try:
        settings = json.loads((work / JOB_FILE).read_text())["settings"]
        return bool(settings["genes"] == _relative(genes, work))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _embed(options: EmbedOptions, work: Path, ranks: Ranks, phases: Phases) -> Summary:
    model = load_model(options.model, gene_set=options.gene_set, dtype=options.dtype, device=local_device())
    _require_cls(model, options.pooling)
    phases.end("model")
    cells, job, groups = _open(options, model, work, ranks)
    left = remaining(job, ranks)
    phases.end("open")
    tokens = sum(int(cells.lengths[part.first : part.last].sum()) for part in left)
    flops = model.flops_per_token(options.layer, float(cells.lengths.mean())) * tokens / ranks.size
    runner = Runner(
        model,
        options.layer,
        longest=int(cells.lengths.max()),
        tokens=options.tokens,
        compiled=flops > COMPILE_FROM,
    )
    head = _Head(model, options.pooling, groups, with_genes=options.genes is not None)
    runner.warm_up(head, int(cells.lengths.mean()))
    head.reset()
    ranks.gather(None)
    phases.end("warm-up")
    with Merging(job, options.output) if ranks.rank == 0 else nullcontext() as merging:
        writing = _run(runner, head, cells, job, share(left, ranks.rank, ranks.size), groups, merging, ranks)
        phases.end_forward(ranks, packs=runner.waited, writing=writing)
        if merging is not None and options.genes is not None:
            merge_genes(job, model, options.group_by, groups, options.genes)
    if merging is not None:
        remove(work)
    phases.end("merge")
    seconds = phases.total("open", "forward", "merge")
    rate, forward_rate = tokens / seconds, tokens / phases.total("forward")
    return Summary(
        [
            f"{options.output}: {amount(cells.num_cells, 'cell')}, {model.hidden_size} dimensions, "
            f"layer {options.layer}, {options.pooling}.",
            f"{tokens:,} tokens in {seconds:.1f} s on {ranks.size} x {model.device.type}, reading and writing "
            f"included: {rate:,.0f} tokens/s; forward alone {forward_rate:,.0f} tokens/s.",
            phases.line,
        ],
        {
            "cells": cells.num_cells,
            "tokens": tokens,
            **phases.values,
            "seconds": seconds,
            "tokens_per_second": rate,
            "forward_tokens_per_second": forward_rate,
            "ranks": ranks.size,
            "pack_tokens": runner.tokens,
            "compiled": runner.compiled_tokens > 0,
            "output": str(options.output),
        },
    )


def _require_cls(model: Model, pooling: str) -> None:
    if pooling == CLS and model.cls_token is None:
        raise ConfigError(f"--pooling cls: gene set {model.gene_set.name!r} has no token <cls>; use --pooling mean.")


def _open(options: EmbedOptions, model: Model, work: Path, ranks: Ranks) -> tuple[Cells, Job, Groups | None]:
    """Open cells and job; the first rank alone tokenizes counts and begins the job."""
    is_main = ranks.rank == 0
    needed = {"--group-by": options.group_by}
    corpus = in_turn(
        ranks, lambda: find_corpus(options.cells, model, work, options.counts, is_main=is_main, needed=needed)
    )

    def open_all() -> tuple[Cells, Groups | None]:
        cells = open_cells(corpus, model, max_tokens=options.max_tokens, is_main=is_main)
        return cells, None if options.group_by is None else _group(cells, options.group_by)

    cells, groups = at_once(ranks, open_all)
    settings = {
        "command": "embed",
        "model": model.fingerprint,
        "gene set": model.gene_set.fingerprint,
        "cells": cells.source.fingerprint,
        "max tokens": cells.max_tokens,
        "layers computed": model.num_layers_below(options.layer),
        "pooling": options.pooling,
        "dtype": str(model.dtype).removeprefix("torch."),
        "genes": None if options.genes is None else _relative(options.genes, work),
        "group by": options.group_by,
    }
    # A cell takes that much room in a pack at least; and a part of so many tiny cells would be a large file.
    tokens = np.maximum(cells.lengths, TOKENS_PER_CELL[0])
    costs = tokens * (1.0 + cells.lengths / (6.0 * model.hidden_size))
    has_sums = options.genes is not None
    most = GENES_PART_TOKENS if has_sums else PART_TOKENS
    part_cost = part_tokens(most, model.device, int(tokens.sum())) * float(costs.sum()) / float(tokens.sum())
    job = in_turn(ranks, lambda: Job.open(work, settings, costs, part_cost, ranks.size, tapers=not has_sums))
    return cells, job, groups


def _group(cells: Cells, column: str) -> Groups:
    cells.require_columns([column], "--group-by")
    values = cells.names(column, np.arange(cells.num_cells)).cast(pa.string())
    encoded = pc.dictionary_encode(values, null_encoding="encode")
    names = encoded.dictionary.to_pylist()
    return Groups(names, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32))


@dataclass(eq=False)
class _Results:
    """Embeddings of a part as they come in."""

    part: Part
    embeddings: np.ndarray
    started: int = 0
    finished: int = 0
    genes: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class _Head:
    """Pools cells; adds up the vectors of genes, if they are wanted, until a part is complete."""

    def __init__(self, model: Model, pooling: str, groups: Groups | None, *, with_genes: bool) -> None:
        self.pooling = pooling
        self.vocab_size = model.vocab_size
        self.sums: Tensor | None = None
        if with_genes:
            rows = model.vocab_size * (1 if groups is None else len(groups.names))
            self.sums = torch.zeros(rows, model.hidden_size, dtype=torch.float64, device=model.device)
            self.counts = torch.zeros(rows, dtype=torch.int64, device=model.device)

    def reset(self) -> None:
        """Forget the sums."""
        if self.sums is not None:
            self.sums.zero_()
            self.counts.zero_()

    def __call__(self, pack: Pack, hidden: Tensor, parts: Parts) -> Tensor:
        pooled = first_token(hidden, parts) if self.pooling == CLS else mean_of_genes(hidden, parts)
        if self.sums is not None:
            row = parts.rows.clamp(min=0) * self.vocab_size + parts.input_ids
            is_gene = (parts.rows >= 0).long()
            vectors = hidden.double() * is_gene[:, None]
            self.sums.index_add_(0, row, vectors)
            self.counts.index_add_(0, row, is_gene)
            results = pack.owner
            if results is not None:
                results.started += pack.num_cells
                if results.started == len(results.embeddings):
                    results.genes = self._take()
        return pooled

    def _take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows with genes, their numbers and sums; the next part begins with zeros.

        The device may have no memory left: a pack that failed here would be run, and added, once more.
        """
        assert self.sums is not None
        counts, sums = self.counts.cpu().numpy(), self.sums.cpu().numpy()
        rows = np.flatnonzero(counts)
        taken = rows, counts[rows], sums[rows]
        self.reset()
        return taken


def _run(
    runner: Runner, head: _Head, cells: Cells, job: Job, mine: list[Part], groups: Groups | None,
    merging: Merging | None, ranks: Ranks,
) -> float:  # fmt: skip
    """Embed the parts of this rank and write each once it is complete; return the seconds waited for that."""
    total = sum(map(len, mine))
    packs = _packs(runner, head, cells, mine, groups)
    with share_progress(ranks, total, "embed", "cell") as progress, Writer() as writer:
        for pack, rows in runner.run(packs):
            results = pack.owner
            _require_finite(cells, results.part.first + pack.items, rows)
            results.embeddings[pack.items] = rows
            results.finished += len(rows)
            progress.advance(len(rows))
            if results.finished == len(results.embeddings):
                writer.write(partial(_commit, job, cells, results))
                if merging is not None:
                    merging.require_progress()
    return writer.waited


def _require_finite(cells: Cells, numbers: np.ndarray, embeddings: np.ndarray) -> None:
    """Raise DataError, naming the cell, where finite weights overflowed."""
    bad = ~np.isfinite(embeddings).all(axis=1)
    if bad.any():
        where = cells.source.describe_cell(int(numbers[bad.argmax()]))
        raise DataError(f"{where}: its embedding is not finite; the model's training diverged.")


@dataclass(frozen=True, eq=False)
class _Window:
    """Neighbouring cells of a part, whose packs are made together: their numbers and tokens."""

    results: _Results
    numbers: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray


def _windows(runner: Runner, cells: Cells, mine: list[Part]) -> Iterator[_Window]:
    for part in mine:
        results = _Results(part, np.empty((len(part), runner.model.hidden_size), np.float32))
        for window in windows(cells.lengths[part.first : part.last], runner.window):
            numbers = np.arange(part.first + window.start, part.first + window.stop)
            yield _Window(results, numbers, *cells.tokens(numbers))


def _packs(runner: Runner, head: _Head, cells: Cells, mine: list[Part], groups: Groups | None) -> Iterator[Pack]:
    # Tokens of the next window are decoded while the packs of this one are made.
    with Ahead(_windows(runner, cells, mine), 1) as read:
        for window in read:
            numbers, rows = window.numbers, None
            if head.pooling == CLS:
                _require_cls_first(cells, window)
            if head.sums is not None:
                rows = np.zeros(len(numbers), np.int32) if groups is None else groups.of_cell[numbers]
            for chosen, shape in runner.plan(np.diff(window.offsets)):
                yield runner.pack_of(
                    chosen,
                    shape,
                    window.tokens,
                    window.offsets,
                    head,
                    window.results,
                    row_of_cell=rows,
                    items=numbers - window.results.part.first,
                )


def _require_cls_first(cells: Cells, window: _Window) -> None:
    """Raise DataError, naming the cell, where the first token is another one."""
    differs = window.tokens[window.offsets[:-1]] != cells.model.cls_token
    if differs.any():
        where = cells.source.describe_cell(int(window.numbers[differs.argmax()]))
        raise DataError(f"{where}: the cell does not begin with <cls>; tokenize it with the model's gene set.")


def _commit(job: Job, cells: Cells, results: _Results) -> None:
    """Write the sums of genes, then the cells, whose file says that the part is complete."""
    part, path = results.part, job.path(results.part)
    if results.genes is not None:
        with replacing(genes_path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, *results.genes)
    write_part(path, columns_of(cells, np.arange(part.first, part.last)), results.embeddings)


def columns_of(cells: Cells, numbers: np.ndarray) -> pa.Table:
    """Number, id and all other columns of some cells."""
    columns = {"cell": pa.array(numbers), "cell_id": cells.ids(numbers)}
    others = [name for name in cells.column_names if name not in (*columns, "embedding")]
    if others:
        table = cells.table(others, numbers)
        columns |= {name: table[name] for name in others}
    return pa.table(columns)
