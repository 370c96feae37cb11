"""The benchmarks start, and the one that others are asked to rerun measures something."""

import json
import sys

import pytest

from benchmarks.throughput import watch
from tests.forks import ROOT, Fork, is_running, run_script

pytestmark = pytest.mark.process


def run(tmp_path, name, *arguments):
    return Fork(tmp_path / "output", run_script, ROOT / "benchmarks" / name, list(map(str, arguments))).wait()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_help(tmp_path, path):
    done = run(tmp_path, path.name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("name", ["attention.py", "precision.py", "profile_step.py"])
def test_what_needs_a_gpu_says_so_at_once(tmp_path, name):
    done = run(tmp_path, name)
    assert done.returncode == 2
    assert f"{name}: error: no CUDA GPU is visible here" in done.stderr


LAUNCHER = """
import pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
folder = pathlib.Path(sys.argv[1])
(folder / "worker").write_text(str(worker.pid))
(folder / "run").mkdir()
(folder / "run" / "metrics.jsonl").write_text('{"step": 1}\\n{"step": 2}\\n{"step": 3')
time.sleep(1000)
"""


def test_a_run_is_ended_with_its_workers_once_its_steps_are_there(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    assert watch(command, tmp_path, 2).records == [{"step": 1}, {"step": 2}]
    worker = int((tmp_path / "worker").read_text())
    assert not is_running(worker)


def test_recompilations_after_the_first_step_are_counted(tmp_path):
    code = """
import pathlib, sys, time, torch
metrics = pathlib.Path(sys.argv[1]) / "run" / "metrics.jsonl"
metrics.parent.mkdir()
compiled = torch.compile(lambda x: x + 1, backend="eager")
for size, line in ((3, ""), (4, '{"step": 1}\\n'), (4, '{"step": 2}\\n'), ((5, 5), '{"step": 3}\\n')):
    compiled(torch.ones(size))
    with metrics.open("a") as file:
        file.write(line)
    time.sleep(0.5)
time.sleep(1000)
"""
    found = watch([sys.executable, "-c", code, str(tmp_path)], tmp_path, 2)
    assert found.recompilations == 1
    assert found.launch_seconds > 0.5


def test_a_run_that_fails_is_told_with_its_output(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such corpus')"]
    with pytest.raises(RuntimeError, match="failed:\nno such corpus"):
        watch(command, tmp_path, 2)


def test_throughput_measures_both_sides(tmp_path):
    shrunk = ["model.num_hidden_layers=1", "model.hidden_size=64", "model.seq_length=256", "model.micro_batch_size=4"]
    of_the_engine = "training.reshard_after_forward=false"
    results = tmp_path / "results.json"
    done = run(
        tmp_path,
        *("throughput.py", "--models", "10m", "--engines", "fsdp2", "--steps", 8, "--skip", 1, "--cells", 300),
        *("--lengths", "genecorpus", "--variants", "as-shipped", "--save-every", 3),
        *("--baseline", "plain", "--baseline-cells", 1, "--json", results, "--overrides", *shrunk, of_the_engine),
    )
    assert done.returncode == 0, done.stderr
    ours, baseline = json.loads(results.read_text())
    assert (ours["engine"], baseline["engine"]) == ("fsdp2", "baseline")
    assert min(ours["tokens_per_second"], baseline["tokens_per_second"]) > 0
    assert (ours["lengths"], ours["variant"], ours["recompilations"]) == ("genecorpus", "as-shipped", 0)
    assert ours["launch_to_first_step_seconds"] > ours["first_step_seconds"] > 0
    assert ours["wall_tokens_per_second"] > 0
    assert len(ours["stall_seconds"]) == 1  # the second of two saves: the first one is apart
    assert ours["saving_share_as_shipped"] == pytest.approx(ours["stall_seconds"][0] / 900)
    # Tokens a second and FLOPs a second differ by the FLOPs a token, the same for both.
    assert ours["tflops"] / ours["tokens_per_second"] == pytest.approx(
        baseline["tflops"] / baseline["tokens_per_second"]
    )
    assert f"{ours['tokens_per_second']:,.0f}" in done.stdout
