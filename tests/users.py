"""Another user, for tests of shared folders that run as root."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geneformer_pretrain.data import stream as streaming
from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.data.packing import BatchShape
from geneformer_pretrain.data.stream import PackStream
from tests.corpora import write_parquet

OTHER_USER = 54321


def as_other_user(function: Callable[..., None], *arguments: Any, user: int = OTHER_USER) -> None:
    """Run a function of a module in a new process of another user and group.

    Raises
    ------
    AssertionError
        If it fails there.
    """
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(user, function, arguments))
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, "it failed as another user; its traceback is above"


def _run(user: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _import_all()
    os.umask(0o022)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    function(*arguments)


def _import_all() -> None:
    """Use what the tests use, so that it is imported: the other user may not be let into the interpreter's folders."""
    streaming.MIN_CELLS_FOR_PLAN_FILES = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for _ in range(2):
            corpus = open_corpus(write_parquet(folder / "cells.parquet", [[1, 2], [3]]), folder / "cache")
            shape = BatchShape(256, 64, 12, 128)
            PackStream(corpus.lengths, "f", 0, shape, plan_dir=folder / "plans").plan(0)


@contextmanager
def public_folder() -> Iterator[Path]:
    """Give a folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "shared"
        folder.mkdir()
        yield folder
