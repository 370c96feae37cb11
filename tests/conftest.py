"""Fixtures shared by all tests: reproducible seeds, small thread pools and real multi-process runs.

`run_torchrun` and `start_torchrun` launch `train.py` the way a user does; `run_workers` calls a function
on every rank of a gloo group. Whatever they start is gone when the test ends, also when it fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Set before the libraries that read them are imported. Tests never reach for a hub or an account.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.pop("WANDB_API_KEY", None)

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from geneformer_pretrain.run.signals import exit_without_teardown  # noqa: E402
from tests.forks import start_forkserver  # noqa: E402

# A shared machine stalls at times: a slow example is no failure. CI tries the same examples every time.
hypothesis.settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("house")
torch.set_num_threads(2)

_RUN_ID = "TEST_RUN_ID"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy generator is what libraries draw from
    torch.manual_seed(0)


def _environment(request: pytest.FixtureRequest, nproc: int) -> dict[str, str]:
    """Environment of a test's processes: on loopback, off the GPU unless the test is marked `gpu`."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "2" if nproc == 1 else "1",
        "PYTHONUNBUFFERED": "1",
    }
    if request.node.get_closest_marker("gpu") is None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _kill_run(run_id: str) -> None:
    """Kill every process that carries `run_id` in its environment.

    torchrun starts each worker in a session of its own, so neither its process group nor its family
    tree (once torchrun is dead) leads to all of them. Their environment does.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.environ().get(_RUN_ID) == run_id:
                process.kill()


class TorchrunProcess:
    """A running `torchrun train.py ...`.

    Attributes
    ----------
    popen : subprocess.Popen
        The torchrun process itself.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._run_id = environment[_RUN_ID]
        self._log = log
        with log.open("wb") as sink:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What torchrun and its workers have printed so far, stdout and stderr together."""
        return self._log.read_text(errors="replace")

    def worker_pids(self) -> list[int]:
        """Process ids of the living workers, in no particular order."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.popen.pid).children()
            return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def send_signal(self, signum: signal.Signals) -> None:
        """Send `signum` to torchrun, not to its workers."""
        self.popen.send_signal(signum)

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for torchrun to end and return its exit status and output.

        Raises
        ------
        AssertionError
            If it still runs after `timeout` seconds; everything is killed first.
        """
        try:
            status = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"torchrun still ran after {timeout} s:\n{self.output[-8000:]}") from None
        return subprocess.CompletedProcess(self.popen.args, status, stdout=self.output)

    def kill(self) -> None:
        """Kill torchrun and every process it started, and reap it."""
        _kill_run(self._run_id)
        self.popen.wait()


StartTorchrun = Callable[..., TorchrunProcess]
RunTorchrun = Callable[..., "subprocess.CompletedProcess[str]"]
RunWorkers = Callable[..., list[Any]]


@pytest.fixture
def start_torchrun(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartTorchrun]:
    """Return `start(args, nproc=1, env=None, flags=())`, which launches `train.py` in the background.

    `args` follow `train.py` on the command line, `flags` are torchrun's own, `env` is added to the
    environment. The result is a `TorchrunProcess`.
    """
    started: list[TorchrunProcess] = []

    def start(
        args: Sequence[str] = (),
        nproc: int = 1,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> TorchrunProcess:
        run_id = uuid.uuid4().hex
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={nproc}", *flags, "train.py", *args]
        environment = _environment(request, nproc) | {_RUN_ID: run_id} | dict(env or {})
        process = TorchrunProcess(command, environment, tmp_path / f"torchrun-{run_id}.log")
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def run_torchrun(start_torchrun: StartTorchrun) -> RunTorchrun:
    """Return `run(args, nproc=1, env=None, timeout=120, check=True, flags=())`, which waits for `train.py`.

    The result is a `subprocess.CompletedProcess` whose `stdout` holds all output. With `check`, an exit
    status other than 0 fails the test and shows the end of that output.
    """

    def run(
        args: Sequence[str] = (),
        nproc: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        check: bool = True,
        flags: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        completed = start_torchrun(args, nproc, env, flags).wait(timeout)
        if check and completed.returncode != 0:
            raise AssertionError(f"torchrun exited {completed.returncode}:\n{completed.stdout[-8000:]}")
        return completed

    return run


def _rank(
    rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    environment: dict[str, str],
    initialise: bool,
    results: Path,
) -> None:
    """Run `function` as one rank, in a process of its own, and leave its result in a file."""
    os.setsid()  # By its session, all that this rank starts is found: see `_kill_sessions`.
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if initialise:
        dist.init_process_group("gloo")
    try:
        torch.save(function(rank, world_size, *args), results / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    exit_without_teardown(0)  # An error goes on to the parent by way of a file, whatever becomes of this process.


def _kill_sessions(leaders: Collection[int]) -> None:
    """Kill every process of the sessions that these processes lead or have led."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) in leaders:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def run_workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunWorkers]:
    """Return `run(function, nproc, *args, timeout=120, initialise=True)`, which runs ranks in parallel.

    Each of `nproc` processes calls `function(rank, world_size, *args)`; the list of what they returned, in rank order,
    comes back. `function` must be importable (defined at the top of a module). The processes are forked from one that
    has imported the package, in tests marked `gpu` spawned: a forked process can use no GPU.
    The default process group is gloo; with `initialise=False` only the environment that torchrun would
    set is there, and the function calls `init_process_group` itself. An exception in a rank is raised here
    with that rank's traceback.
    """
    start_method = "spawn" if request.node.get_closest_marker("gpu") else "forkserver"
    pids: set[int] = set()

    def run(
        function: Callable[..., Any],
        nproc: int,
        *args: Any,
        timeout: float = 120,
        initialise: bool = True,
    ) -> list[Any]:
        results = tmp_path / f"workers-{uuid.uuid4().hex}"
        results.mkdir()
        # The store listens here, on a port that the system picks, before any rank looks for it.
        store = dist.TCPStore("127.0.0.1", 0, nproc, is_master=True, wait_for_workers=False)
        environment = _environment(request, nproc) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
        }
        if start_method == "forkserver":
            start_forkserver()
        rank_args = (function, args, nproc, environment, initialise, results)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():  # Libraries read it when a spawned rank imports them.
                patch.setenv(name, value)
            context = mp.start_processes(_rank, rank_args, nprocs=nproc, join=False, start_method=start_method)
        pids.update(context.pids())
        deadline = time.monotonic() + timeout
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                raise AssertionError(f"{function.__name__} on {nproc} ranks still ran after {timeout} s")
        return [torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(nproc)]

    yield run
    _kill_sessions(pids)
