"""Promise 1 for `tokenize`: killed at any moment and started again, it loses no cell and doubles none."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from geneformer_pretrain.tokenization.corpus_plan import Part
from tests.unit.tokenization.files import example_anndata, example_counts, example_gene_set, write_h5ad

PART_CELLS = 50


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Any]:
    """Return `command(output, ...)`, which starts `tokenize` on two files, one of them by genes, in some 120 parts."""
    example_gene_set().save(tmp_path / "genes")
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    write_h5ad(files[0], example_anndata(example_counts(cells=3000)))
    write_h5ad(files[1], example_anndata(example_counts(cells=3010, seed=1).tocsc()))
    started: list[subprocess.Popen[bytes]] = []

    def start(output: str, *options: str) -> subprocess.Popen[bytes]:
        words = [
            "tokenize",
            *map(str, files),
            "--gene-set",
            str(tmp_path / "genes"),
            "--output",
            str(tmp_path / output),
        ]
        words += ["--part-cells", str(PART_CELLS), "--workers", "2", *options]
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "geneformer_pretrain", *words], stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _contents(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def _complete(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()


def _finished_parts(corpus: Path) -> int:
    return len(list(corpus.glob("part-*.parquet")))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_of_tokenize_at_any_moment(tmp_path: Path, command: Any, tally: Any, kills: int) -> None:
    """The first process, a worker, or all of them at once; what is there is never touched again."""
    row = tally(1, "SIGKILL of tokenize or of one of its workers at a random moment")
    choose = random.Random(kills)
    _complete(command("whole"), tmp_path)
    whole, corpus = _contents(tmp_path / "whole"), tmp_path / "killed"
    total = _finished_parts(tmp_path / "whole")
    assert Part(total - 1, 1, 0, 0).name in whole
    for number in range(kills):
        process = command("killed")
        wanted = min(_finished_parts(corpus) + choose.randint(0, max(1, total // kills)), total - 1)
        if number % 3 == 1:
            time.sleep(choose.uniform(0, 1.5))
        while _finished_parts(corpus) < wanted and process.poll() is None:
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02))
        inside = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        victim = ("first", "all", "worker")[number % 3]
        if victim == "worker" and inside:
            _kill(choose.choice(inside).pid)
        elif victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            _kill(process.pid)
        row.injected += 1
        assert process.wait(timeout=60) in (-signal.SIGKILL, 1, 0)
        _, alive = psutil.wait_procs(inside, timeout=20)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], (
            "workers outlive the first process"
        )
        for name, content in _contents(corpus).items() if corpus.exists() else ():
            if name.endswith(".parquet"):
                assert content == whole[name]
        row.survived += 1
    _complete(command("killed"), tmp_path)
    assert _contents(corpus) == whole


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_shards_at_once_make_one_corpus(tmp_path: Path, command: Any) -> None:
    """Three shards side by side, one of them twice, make the bytes of one process, and one of them the description."""
    _complete(command("whole"), tmp_path)
    shards = [command("shards", "--shard", shard, "--workers", "1") for shard in ("1/3", "2/3", "3/3", "3/3")]
    for process in shards:
        _complete(process, tmp_path)
    assert _contents(tmp_path / "shards") == _contents(tmp_path / "whole")
