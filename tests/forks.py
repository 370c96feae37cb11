"""Processes forked from one that has imported everything.

A process of its own needs some seconds for its start, nearly all of them for imports; a forked one starts at once.
Tests of what only a new interpreter shows (imports, torchrun, the shell) start one all the same.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")


def start_forkserver() -> None:
    """Start the process that others are forked from, once. It has one thread, and sees no GPU."""
    CONTEXT.set_forkserver_preload(["pytest", "tests.preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        forkserver.ensure_running()


class Fork:
    """A function of a module in a forked process, just started, on one thread, off the GPU, in a session of its own.

    Parameters
    ----------
    log
        File for its standard output; its standard error goes to the file of that name with ".err".
    folder
        Its working folder.
    """

    def __init__(self, log: Path, function: Callable[..., Any], *arguments: Any, folder: Path = ROOT) -> None:
        start_forkserver()
        self.logs = log, log.with_name(f"{log.name}.err")
        self.process = CONTEXT.Process(target=_be, args=(self.logs, folder, function, arguments))
        for log in self.logs:
            log.write_bytes(b"")
        self.process.start()

    def wait(self, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return its exit code and what it has printed.

        Raises
        ------
        AssertionError
            If it still runs after `timeout` seconds; it is killed.
        """
        try:
            self.process.join(timeout)
            code = self.process.exitcode
        finally:
            self.kill()
        out, err = (log.read_text(errors="replace") for log in self.logs)
        assert code is not None, f"it still ran after {timeout} s:\n{out[-4000:]}{err[-4000:]}"
        return subprocess.CompletedProcess((), code, out, err)

    def send_signal(self, signum: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    @property
    def ended(self) -> bool:
        """True once it has ended."""
        return self.process.exitcode is not None

    def kill(self) -> None:
        """Kill it, if it still runs, and reap it."""
        self.process.kill()
        self.process.join()


def is_running(pid: int) -> bool:
    """Return False for a process that is gone, or has ended and is not reaped by whoever inherited it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_script(path: Path, arguments: Sequence[str]) -> None:
    """Do what `python PATH ARGUMENTS` does: for a `Fork`."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _be(logs: Sequence[Path], folder: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()
    for number, log in zip((1, 2), logs, strict=True):
        with log.open("ab") as sink:
            os.dup2(sink.fileno(), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    function(*arguments)
