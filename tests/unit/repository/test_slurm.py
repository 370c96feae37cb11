"""`slurm/train.sbatch` against stand-ins for SLURM's commands: what it starts, and when it queues again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.tiny import overrides, read_exit, read_metrics

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "slurm" / "train.sbatch"

# The stand-in for srun drops srun's own options, runs the command once for each node and passes signals on.
SRUN = """
while [[ $1 == --* ]]; do shift; done
tasks=()
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
for signal in USR1 TERM; do trap "kill -$signal ${tasks[*]}" "$signal"; done
echo $$ > "$STUBS/srun.pid"
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task" || true; done
    wait "$task" || status=$?
done
exit $status
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STUBS/scontrol.log"; fi\n',
    "squeue": 'echo "$JOB_STATE"\n',
}
TRAIN = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[-1].removeprefix("training.checkpoint_dir=").strip('"'))

def leave(reason, code):
    if os.environ["RANK"] == "0":
        (folder / "exit.json").write_text(json.dumps({"reason": reason, "step": 7, "exit_code": code}))
    sys.exit(code)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: leave("signal", 75))
(folder / f"arguments{os.environ['RANK']}").write_text(" ".join(sys.argv[1:]))
match sys.argv[1]:
    case "completed":
        leave("completed", 0)
    case "tracker":  # the run is complete; its tracker's end is not
        leave("completed", 1)
    case "error":
        leave("error", 3)
    case "crash":
        sys.exit(1)
    case "wait":
        time.sleep(60)
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Environment of a SLURM job on one node, in a folder with a stand-in `train.py`."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STAND_INS.items():
        (stubs / name).write_text("#!/usr/bin/env bash\n" + text)
        (stubs / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAIN)
    return os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "JOB_STATE": "RUNNING",
        "PYTHON": sys.executable,
        "NPROC_PER_NODE": "1",
        "CHECKPOINT_DIR": str(tmp_path / "lr=1e-4,wd=0.01"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_NUM_NODES": "1",
    }


def run(
    job: dict[str, str],
    *args: str,
    signum: signal.Signals | None = None,
    ready: tuple[str, ...] = ("arguments0",),
    to_script: bool = False,
) -> tuple[int, str, list[str]]:
    """Run the script; return its exit status, its output and the jobs it queued again.

    A signal goes to srun, and to the script too, once there is content in files of the run's folder: of each worker,
    or after a step of all, since a signal kills a worker that has no handler yet.
    """
    folder, stubs = Path(job["CHECKPOINT_DIR"]), Path(job["STUBS"])
    process = subprocess.Popen(
        ["bash", SCRIPT, *args], env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if signum is not None:
        deadline = time.monotonic() + 90
        while (
            not all(any(path.stat().st_size for path in folder.glob(name)) for name in ready)
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.05)
        os.kill(int((stubs / "srun.pid").read_text()), signum)
        if to_script:
            process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    log = stubs / "scontrol.log"
    return process.returncode, output, log.read_text().splitlines() if log.exists() else []


def test_completed_run_ends(job: dict[str, str]) -> None:
    status, output, requeued = run(job, "completed", "training.seed=3")
    assert (status, requeued) == (0, []), output
    arguments = (Path(job["CHECKPOINT_DIR"]) / "arguments0").read_text().split()
    assert arguments[:2] == ["completed", "training.seed=3"]
    override = OverridesParser.create().parse_override(arguments[2])
    assert (override.key_or_group, override.value()) == ("training.checkpoint_dir", job["CHECKPOINT_DIR"])


def test_several_nodes_are_one_run(job: dict[str, str]) -> None:
    """One task a node, which all meet at the first; each passes the signal to its worker."""
    job["SLURM_JOB_NUM_NODES"] = "2"
    status, output, requeued = run(job, "wait", signum=signal.SIGUSR1, ready=("arguments0", "arguments1"))
    assert (status, requeued) == (0, [f"requeue {job['SLURM_JOB_ID']}"]), output


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_time_limit_queues_again_unless_cancelled(job: dict[str, str], state: str) -> None:
    """SIGUSR1 passes torchrun, reaches the worker, and the reason in exit.json decides."""
    job["JOB_STATE"] = state
    status, output, requeued = run(job, "wait", signum=signal.SIGUSR1)
    assert "exit.json: signal" in output
    expected = (0, [f"requeue {job['SLURM_JOB_ID']}"]) if state == "RUNNING" else (1, [])
    assert (status, requeued) == expected, output


def test_preemption_queues_again(job: dict[str, str]) -> None:
    """SIGTERM goes to the tasks and, on some clusters, to the script, which outlives them to decide."""
    status, output, requeued = run(job, "wait", signum=signal.SIGTERM, to_script=True)
    assert (status, requeued) == (0, [f"requeue {job['SLURM_JOB_ID']}"]), output


def test_a_complete_run_whose_tracker_failed_is_complete(job: dict[str, str]) -> None:
    status, output, requeued = run(job, "tracker")
    assert (status, requeued) == (0, []), output
    assert "srun exited 1; reason in" in output


@pytest.mark.slow
def test_a_run_goes_through_a_time_limit(job: dict[str, str], tmp_path: Path) -> None:
    """The real train.py on two nodes: stopped with a checkpoint, queued again, and complete."""
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": ""}
    job |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "OMP_NUM_THREADS": "1"}
    folder = Path(job["CHECKPOINT_DIR"])
    given = [*overrides(tmp_path), "training.lr_schedule=constant", "training.save_every_n_steps=100000"]
    given = [each for each in given if not each.startswith("training.checkpoint_dir=")]
    status, output, requeued = run(
        job, *given, "training.num_train_steps=100000", signum=signal.SIGUSR1, ready=("metrics.jsonl",)
    )
    assert (status, requeued) == (0, [f"requeue {job['SLURM_JOB_ID']}"]), output
    step = read_exit(folder)["step"]
    status, output, _ = run(job, *given, f"training.num_train_steps={step + 2}")
    assert status == 0, output
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, step + 3))
    assert (folder / "final_model/model.safetensors").is_file()


@pytest.mark.parametrize("outcome", ["error", "crash"])
def test_faults_are_not_queued_again(job: dict[str, str], outcome: str) -> None:
    """Also when an earlier run left a reason that would queue the job again."""
    folder = Path(job["CHECKPOINT_DIR"])
    folder.mkdir()
    (folder / "exit.json").write_text('{"reason": "signal", "step": 5, "exit_code": 75}')
    status, output, requeued = run(job, outcome)
    assert (status, requeued) == (1, []), output
    assert f"exit.json: {'error' if outcome == 'error' else 'missing'}" in output


def test_checkpoint_folder_is_required(job: dict[str, str]) -> None:
    del job["CHECKPOINT_DIR"]
    completed = subprocess.run(["bash", SCRIPT], env=job, capture_output=True, text=True, check=False)
    assert completed.returncode != 0
    assert "set CHECKPOINT_DIR" in completed.stderr
