"""The real W&B, offline, whose helper process is stopped or killed: the run goes on to its export."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.tiny import overrides, read_exit, read_metrics

pytest.importorskip("wandb")
pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300

SCRIPT = """
import sys, time
from pathlib import Path
from geneformer_pretrain.run import tracking
from geneformer_pretrain.training import saving
from geneformer_pretrain.training.main import main

place, reached = sys.argv.pop(1), Path(sys.argv.pop(1))
write, begin = saving.write_model, tracking.start_trackers
go = reached.with_name("go")

def pause():
    reached.touch()
    while not go.exists():
        time.sleep(0.01)

def export(*arguments, **more):
    if place == "before the end":
        pause()
    write(*arguments, **more)

def start(*arguments):
    trackers = begin(*arguments)
    if place == "after the start":
        pause()
    if place == "log raises":
        import wandb
        wandb.Run.log = lambda *_, **__: 1 / 0
    return trackers

saving.write_model, tracking.CLOSE_SECONDS = export, 2.0
from geneformer_pretrain.run import logs
logs.start_trackers = start
main()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return `start(place)`, which starts a tracked run that pauses at a place until there is a file `go`."""
    processes = []

    def begin(place: str, *more: str) -> subprocess.Popen[str]:
        given = overrides(tmp_path, "training.wandb_init_args={name: n, project: p}", *more)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, place, str(tmp_path / "reached"), *given],
            cwd=ROOT,
            env=environment | {"WANDB_TEST": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in [*processes, *_helpers(tmp_path)]:
        process.kill()
    for process in processes:
        process.communicate()


def _helpers(tmp_path: Path) -> list[psutil.Process]:
    """W&B's processes of this test's run."""
    found = []
    for process in psutil.process_iter(["name", "environ"]):
        name, environment = process.info["name"] or "", process.info["environ"] or {}
        if name.startswith("wandb") and environment.get("WANDB_TEST") == str(tmp_path):
            found.append(process)
    return found


def wait_for(ready: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("place", "number", "reason"),
    [
        ("during the start", signal.SIGKILL, "ServicePollForTokenError: wandb-core exited with code -9"),
        pytest.param("after the start", signal.SIGKILL, r"\w+Error: .*", marks=pytest.mark.slow),
        ("after the start", signal.SIGSTOP, "it did not finish within 2 s"),
        ("before the end", signal.SIGKILL, r"\w+Error: .*"),
        pytest.param("before the end", signal.SIGSTOP, "it did not finish within 2 s", marks=pytest.mark.slow),
        pytest.param("log raises", None, "ZeroDivisionError: division by zero", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value)[:20],
)
def test_a_run_outlives_its_tracker(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], place: str, number: signal.Signals | None, reason: str
) -> None:
    process = start(place, f"training.num_train_steps={STEPS}")
    if place == "during the start":
        wait_for(lambda: _helpers(tmp_path), process)
    elif number is not None:
        wait_for((tmp_path / "reached").exists, process)
    for helper in _helpers(tmp_path) if number is not None else []:
        helper.send_signal(number)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=120)  # until no process holds standard error open
    assert process.returncode == 0, errors
    assert read_exit(tmp_path / "run") == {"reason": "completed", "exit_code": 0, "step": STEPS}
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert (tmp_path / "run/final_model/model.safetensors").exists()
    (line,) = [line for line in errors.splitlines() if "is lost" in line]
    assert re.fullmatch(rf"ERROR W&B is lost \({reason}\); the run goes on without it, .*", line)
    assert "Traceback" not in errors


def test_a_restart_goes_on_with_the_same_run(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    for steps in (2, 4):
        process = start("nowhere", f"training.num_train_steps={steps}")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "W&B is lost" not in errors
    name = (tmp_path / "run/wandb_id.txt").read_text().strip()
    runs = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run.name.endswith(f"-{name}") for run in runs)
