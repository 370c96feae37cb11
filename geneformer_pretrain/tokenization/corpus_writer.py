"""Makes a corpus part by part: restartable, with any number of processes, always with the same bytes.

A part holds a fixed range of rows of one file. It is written aside under a lock and renamed once it is on the disk,
so a part is there and complete, or not there; who comes next makes what is missing. When the last part is there,
`corpus.json` is written from what the parts say of themselves: whichever process finds them complete does it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_pretrain.console import Progress, say
from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.files import locked, open_lock, replacing, sync_file, sync_folder
from geneformer_pretrain.tokenization.corpus_plan import (
    FORMAT_VERSION,
    LOCK_FILE,
    OWN_COLUMNS,
    PLAN_FILE,
    Part,
    Plan,
    Rule,
    open_source,
)
from geneformer_pretrain.tokenization.counts import NO_ROOM, file_state
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.repeated_ids import find_repeated_ids
from geneformer_pretrain.tokenization.tokenizer import Tally, TokenBlock, describe_left_out, tokenize_blocks
from geneformer_pretrain.tokenization.workers import process_pool

CORPUS_FILE = "corpus.json"
GENE_SET_FOLDER = "gene_set"
"""Copy of the gene set inside a corpus, so that a refusal of another one can name the tokens that differ."""
SCRATCH = ".scratch"
"""Folder inside a corpus for row-wise copies, until it is complete."""
METADATA = b"tokenize"
"""Key of a part's metadata: where it comes from, and its sums."""
ROW_GROUP_CELLS = 4096


@dataclass(frozen=True)
class Job:
    """All that a process needs to make any part."""

    folder: Path
    plan: Plan
    gene_set: GeneSet
    allow_noninteger: bool = False
    allow_low_match: bool = False

    @property
    def rule(self) -> Rule:
        """Options that decide the tokens."""
        return Rule(**{**self.plan.rule, "columns": tuple(self.plan.rule["columns"])})


def missing_parts(job: Job) -> list[Part]:
    """Return the parts that are missing; all others are there and of this plan.

    Raises
    ------
    OutputError
        If a part is of another rule, or damaged.
    """
    names = {part.name for part in job.plan.parts}
    for path in sorted(job.folder.glob("part-*.parquet")):
        if path.name not in names:
            raise OutputError(f"{path} is no part of this corpus; delete it, or start again with --overwrite.")
    missing = []
    for part in job.plan.parts:
        try:
            read_tally(job, part)
        except FileNotFoundError:
            missing.append(part)
    return missing


def read_tally(job: Job, part: Part) -> Tally:
    """Read the sums of a part that is there.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    OutputError
        If it is of another rule, or damaged.
    """
    path = job.folder / part.name
    try:
        metadata = pq.read_metadata(path).metadata or {}
        said = json.loads(metadata[METADATA])
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise OutputError(f"{path} is damaged; delete it, and the same command makes it again.") from error
    if said["origin"] != job.plan.origin(part):
        raise OutputError(f"{path} is a part of another corpus; delete it, and the same command makes it again.")
    return Tally(**said["tally"])


def write_part(job: Job, part: Part) -> int:
    """Make one part unless it is there; return the cells that it covers.

    Raises
    ------
    DataError
        For counts that cannot be used; if the file changed since the plan was made.
    OSError
        If the part cannot be written, on a full disk for instance; nothing of it is left then.
    """
    path = job.folder / part.name
    temporary = path.with_name(path.name + ".tmp")
    with _alone(temporary) as file:
        if path.exists():
            temporary.unlink()
        else:
            _write(job, part, file)
            sync_file(file)
            temporary.rename(path)
            sync_folder(job.folder)
    return part.last - part.first


@contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """Open an empty file that no other process writes; it is deleted if there is an error."""
    try:
        descriptor = open_lock(path, wait=False)
    except BlockingIOError:
        say(f"Another process is at {path.stem}; waiting for it.", error=True)
        descriptor = open_lock(path, wait=True)
    with os.fdopen(descriptor, "wb") as file:
        file.truncate(0)
        try:
            yield file
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
            raise


def _write(job: Job, part: Part, file: IO[bytes]) -> None:
    """Write the cells of a part as parquet."""
    source = job.plan.sources[part.source]
    path, scratch = Path(source["path"]), job.folder / SCRATCH / f"{part.source:05d}"
    with open_source(path, job.rule, job.allow_noninteger, scratch) as counts:
        blocks = []
        if counts.num_cells == source["cells"]:
            blocks = list(
                tokenize_blocks(
                    counts,
                    job.gene_set,
                    n_counts_column=job.rule.n_counts_column,
                    filter_column=job.rule.filter_column,
                    columns=job.rule.columns,
                    min_genes=job.rule.min_genes,
                    allow_low_match=job.allow_low_match,
                    first=part.first,
                    last=part.last,
                )
            )
    if file_state(path) != source["state"]:
        raise DataError(f"{path} changed while it was read; once it is complete, start again with --overwrite.")
    tally = Tally()
    for block in blocks:
        tally += block.tally
    said = {"origin": job.plan.origin(part), "tally": tally.as_dict()}
    table = _table(blocks).replace_schema_metadata({METADATA: json.dumps(said)})
    pq.write_table(
        table,
        file,
        row_group_size=ROW_GROUP_CELLS,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in table.column_names if name not in OWN_COLUMNS],
        column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT"},
        write_statistics=False,
    )


def _table(blocks: Sequence[TokenBlock]) -> pa.Table:
    """Join blocks to the table of a part."""
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks]).astype(np.int32)
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    tokens = np.concatenate([block.tokens for block in blocks])
    ids = pa.array([name for block in blocks for name in block.cell_ids], pa.string())
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, tokens), "length": lengths, "cell_id": ids})
    columns = pa.concat_tables([block.columns for block in blocks])
    for name in columns.column_names:
        table = table.append_column(name, columns.column(name))
    return table


def make_parts(job: Job, parts: Sequence[Part], workers: int) -> None:
    """Make parts with some processes, showing progress.

    The first error stops the work; parts that are complete by then stay.

    Raises
    ------
    OutputError
        If a worker process was killed.
    """
    cells = sum(part.last - part.first for part in parts)
    workers = min(workers, len(parts))
    with Progress(cells, "tokenize", "cell") as progress:
        if workers <= 1:
            for part in parts:
                progress.advance(write_part(job, part))
            return
        with process_pool(workers, _start_job, job) as pool:
            try:
                futures: list[Future[int]] = [pool.submit(_work, part) for part in parts]
                for future in as_completed(futures):
                    progress.advance(future.result())
            except BrokenProcessPool:
                raise OutputError(
                    "a worker process was killed, perhaps for want of memory; the same command goes on where it "
                    "stopped, with fewer --workers if it happens again."
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_job: Job | None = None
"""In a worker process: its job."""


def _start_job(job: Job) -> None:
    global _job
    _job = job


def _work(part: Part) -> int:
    assert _job is not None
    return write_part(_job, part)


def finish(job: Job) -> dict[str, Any] | None:
    """Write the copy of the gene set and `corpus.json` if all parts are there, and return it; else return None.

    May be called again, and by several processes at once: the result is the same.

    Raises
    ------
    DataError
        If no cell is left, and then nothing of the corpus; if a file changed since the plan was made.
    """
    with locked(job.folder / LOCK_FILE):
        parts, sums = [], [Tally() for _ in job.plan.sources]
        for part in job.plan.parts:
            try:
                tally = read_tally(job, part)
            except FileNotFoundError:
                return None
            sums[part.source] += tally
            parts.append({"file": part.name, "cells": tally.kept, "tokens": tally.tokens} | _rows(part))
        total = Tally()
        for tally in sums:
            total += tally
        if not total.kept:
            delete_corpus(job.folder)
            reasons = describe_left_out(total.left_out)
            raise DataError(f"{job.folder}: no cell is left of {total.cells:,} ({reasons}).")
        for source in job.plan.sources:
            if file_state(Path(source["path"])) != source["state"]:
                raise DataError(f"{source['path']} changed since the corpus was begun; start again with --overwrite.")
        repeated = find_repeated_ids([job.folder / part.name for part in job.plan.parts], total.kept)
        described = {
            "format_version": FORMAT_VERSION,
            "gene_set": job.plan.gene_set,
            "rule": job.plan.rule,
            "columns": job.plan.columns,
            "cells": total.kept,
            "tokens": total.tokens,
            "left_out": total.left_out,
            "repeated_ids": None if repeated is None else asdict(repeated),
            "sums": total.as_dict(),
            "sources": [
                {**source, "sums": tally.as_dict()} for source, tally in zip(job.plan.sources, sums, strict=True)
            ],
            "parts": parts,
        }
        if not (job.folder / GENE_SET_FOLDER).exists():
            job.gene_set.save(job.folder / GENE_SET_FOLDER)
        with replacing(job.folder / CORPUS_FILE) as temporary:
            temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(job.folder / SCRATCH, ignore_errors=True)
        (job.folder / LOCK_FILE).unlink()
    return described


def _rows(part: Part) -> dict[str, int]:
    return {"source": part.source, "first_row": part.first, "last_row": part.last}


def forget_plan(folder: Path) -> None:
    """Delete a corpus of which nothing but the plan is there, so that other options may follow a mistake."""
    if {path.name for path in folder.iterdir()} <= {PLAN_FILE, LOCK_FILE}:
        shutil.rmtree(folder)


def delete_corpus(folder: Path) -> None:
    """Delete a corpus, complete or not, to make it anew.

    Raises
    ------
    OutputError
        If the folder is something else.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not ((folder / PLAN_FILE).exists() or (folder / CORPUS_FILE).exists()):
        raise OutputError(f"{folder} is no corpus and is not overwritten; name another folder.")
    shutil.rmtree(folder)
