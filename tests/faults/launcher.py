"""Starts the ranks of a run within a second: each is forked from a process that has imported everything.

torchrun needs some seconds for a start, nearly all of them for imports. Tests that stop a run again and again take
the same way through `train.py`, with the environment that torchrun would give it, but without that wait.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from geneformer_pretrain.training import main as train
from tests.forks import CONTEXT

Fault = Callable[[int], None]
"""Called with the rank, in its process, before train.py begins: replaces what is to fail. Importable by name."""


def _be_rank(
    rank: int, size: int, port: int, arguments: Sequence[str], log: Path, folder: Path, fault: Fault | None
) -> None:
    """Do what torchrun and the shell do for one rank, and call `train.py`."""
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
    )
    torch.set_num_threads(1)
    if fault is not None:
        fault(rank)
    train.main(arguments)


class Run:
    """`train.py` on several ranks, just started.

    Parameters
    ----------
    logs
        Folder for the ranks' output.
    arguments
        Overrides; those of each rank where `size` is a list of them.
    size
        Number of ranks.
    fault
        What goes wrong.
    more
        Further overrides of each rank.
    folders
        Working folder of each rank; `logs` if not given.
    """

    def __init__(
        self,
        logs: Path,
        arguments: Sequence[str],
        size: int,
        fault: Fault | None = None,
        more: Sequence[Sequence[str]] | None = None,
        folders: Sequence[Path] | None = None,
    ) -> None:
        # The store listens here, on a port that the system picks, as torchrun's does.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number = len(list(logs.iterdir()))
        self._logs = [logs / f"{number}.{rank}.log" for rank in range(size)]
        self.ranks = []
        for rank, log in enumerate(self._logs):
            given = [*arguments, *(more[rank] if more else ())]
            folder = folders[rank] if folders else logs
            args = (rank, size, self._store.port, given, log, folder, fault)
            self.ranks.append(CONTEXT.Process(target=_be_rank, args=args))
            self.ranks[-1].start()

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far."""
        log = self._logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Wait for something that the run does.

        Raises
        ------
        AssertionError
            If a rank ends or `timeout` seconds pass before.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            assert all(rank.exitcode is None for rank in self.ranks), f"ended before {what}:\n{self._tails()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout} s:\n{self._tails()}"
            time.sleep(0.002)

    def wait_for_training(self) -> None:
        """Wait for the training loop to begin: by then checkpoints are loaded and logs cut back."""
        self.wait_until(lambda: "train:" in self.output(), "the first step")

    def wait(self, timeout: float = 60, like_torchrun: bool = False) -> list[int]:
        """Wait for all ranks and return their exit codes.

        With `like_torchrun`, the others get a SIGTERM once one has failed; else they have to end by themselves.
        """
        deadline = time.monotonic() + timeout
        while alive := [rank for rank in self.ranks if rank.exitcode is None]:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self._tails()}"
            wait([rank.sentinel for rank in alive], timeout=0.1)
            if like_torchrun and any(rank.exitcode for rank in self.ranks):
                like_torchrun = False
                for rank in alive:
                    rank.terminate()
        return [int(rank.exitcode or 0) for rank in self.ranks]

    def complete(self, timeout: float = 60) -> None:
        """Wait for the end of a run that has to succeed."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}:\n{self._tails()}"

    def send(self, rank: int, signum: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, signum)

    def kill(self) -> None:
        """End whatever still runs."""
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def _tails(self) -> str:
        return "\n".join(f"rank {rank}: {self.output(rank)[-3000:]}" for rank in range(len(self.ranks)))
