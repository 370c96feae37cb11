"""Starts the ranks of a run within a second: each is forked from a process that has imported everything.

torchrun needs some seconds for a start, nearly all of them for imports. Tests that kill a run again and again take the
same way through `train.py` with the same environment, without that wait.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

import train
from geneformer_pretrain.config import CONFIG_DIR

Fault = Callable[[int], None]
"""Called with the rank, in its process, before train.py: patches what is to fail."""

CONTEXT = multiprocessing.get_context("forkserver")


def _rank(
    rank: int, size: int, port: int, arguments: Sequence[str], log: Path, folder: Path, fault: Fault | None
) -> None:
    """Be one rank: what torchrun and the shell do for `train.py`."""
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    os.chdir(folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("l0_sanity", overrides=list(arguments))
    train.main(composed)


class Run:
    """A run of `train.py` on several ranks.

    Parameters
    ----------
    arguments
        Overrides, of all ranks or of each one.
    logs
        Folder of the ranks' output.
    folders
        Working folder of each rank; `logs` for all if not given.
    """

    def __init__(
        self,
        arguments: Sequence[str] | Sequence[Sequence[str]],
        size: int,
        logs: Path,
        fault: Fault | None = None,
        folders: Sequence[Path] | None = None,
    ) -> None:
        each = [arguments] * size if isinstance(arguments[0], str) else arguments
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number = len(list(logs.glob("*.log")))
        self._logs = [logs / f"{number + rank}.log" for rank in range(size)]
        self.ranks = [
            CONTEXT.Process(
                target=_rank,
                args=(
                    rank,
                    size,
                    self._store.port,
                    each[rank],
                    self._logs[rank],
                    folders[rank] if folders else logs,
                    fault,
                ),
            )
            for rank in range(size)
        ]
        for rank in self.ranks:
            rank.start()
