"""Two nodes on one machine: separate torchrun agents that meet over loopback."""

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, TorchrunProcess
from tests.tiny import read_exit, read_metrics

StartNodes = Callable[..., list[TorchrunProcess]]
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[StartNodes]:
    """Return `start(args, more=((), ()), folders=(ROOT, ROOT), code=(ROOT, ROOT), join_timeout=120, ...)`.

    It starts an agent for each entry of `more`, overrides of that node alone, in that node's folder, with that node's
    copy of the code and environment and `nproc` processes; two nodes are waited for.
    """
    started: list[TorchrunProcess] = []

    def start(
        args: list[str],
        more: tuple[tuple[str, ...], ...] = ((), ()),
        folders: tuple[Path, Path] = (ROOT, ROOT),
        code: tuple[Path, Path] = (ROOT, ROOT),
        join_timeout: int = 120,
        nproc: int = 1,
        environments: Sequence[Mapping[str, str]] = (ON_CPU, ON_CPU),
    ) -> list[TorchrunProcess]:
        port = free_port()
        nodes = []
        for number, own in enumerate(more):
            command = [
                *("env", f"--chdir={folders[number]}", sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes=2", f"--nproc-per-node={nproc}", "--local-addr=127.0.0.1", "--rdzv-backend=c10d"),
                *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"),
                f"--rdzv-conf=is_host={int(number == 0)},join_timeout={join_timeout}",
                *(str(code[number] / "train.py"), *args, *own),
            ]
            environment = os.environ | {
                "TEST_RUN_ID": uuid.uuid4().hex,
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                **environments[number],
            }
            nodes.append(TorchrunProcess(command, environment, tmp_path / f"node{number}-{port}.log"))
            started.append(nodes[-1])
        return nodes

    yield start
    for node in started:
        node.kill()


def complete(nodes: list[TorchrunProcess], timeout: float = 120) -> None:
    """Wait for all agents to succeed."""
    for node in nodes:
        completed = node.wait(timeout)
        assert completed.returncode == 0, completed.stdout[-6000:]


def stop_by_one_signal(nodes: list[TorchrunProcess], run: Path, steps: int, timeout: float = 120) -> int:
    """Send SIGTERM to the last node's agent after some steps; return the step of the checkpoint that all saved."""
    deadline = time.monotonic() + timeout
    while not (run / "metrics.jsonl").exists() or len(read_metrics_so_far(run)) < steps:
        assert time.monotonic() < deadline, nodes[0].output[-6000:]
        assert all(node.popen.poll() is None for node in nodes), nodes[0].output[-6000:]
        time.sleep(0.05)
    nodes[-1].send_signal(signal.SIGTERM)
    for node in nodes:
        node.wait(timeout)
    ending = read_exit(run)
    step: int = ending["step"]
    assert ending == {"reason": "signal", "exit_code": 75, "step": step}
    assert [record["step"] for record in read_metrics(run)] == list(range(1, step + 1))
    assert (run / f"step_{step}").is_dir()
    return step


def read_metrics_so_far(run: Path) -> list[str]:
    """Return the whole lines of a metrics.jsonl that is being written."""
    return [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
