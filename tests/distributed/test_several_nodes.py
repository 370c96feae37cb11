"""Two nodes on one machine: separate torchrun agents that meet over loopback."""

import shutil
import signal
from pathlib import Path

import psutil
import pytest

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.training import main as train
from tests.agents import (
    StartNodes,
    complete,
    stop_by_one_signal,
)
from tests.conftest import ROOT, TorchrunProcess
from tests.distributed.test_signals import ENDLESS, has_steps, stopped_at, wait_until
from tests.distributed.test_training import assert_same_run, into, long_run
from tests.tiny import (
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_cells,
    read_exit,
    read_metrics,
    write_parquet,
)


def outputs(nodes: list[TorchrunProcess]) -> list[str]:
    """Wait for all agents to fail; return what each printed."""
    completed = [node.wait(90) for node in nodes]
    assert [run.returncode for run in completed] == [1] * len(nodes), "\n".join(node.output[-3000:] for node in nodes)
    return [run.stdout for run in completed]


def errors(output: str) -> list[str]:
    """The run's own messages among torchrun's."""
    return [line for line in output.splitlines() if line.startswith("Error: ")]


def test_two_nodes_train_as_one_process(tmp_path: Path, start_nodes: StartNodes) -> None:
    write_parquet(tmp_path / "held_out.parquet", make_cells(70, seed=1))
    assert train.run(load_config(overrides=long_run(tmp_path, *into(tmp_path / "one", 1)))) == 0
    nodes = start_nodes(long_run(tmp_path, *into(tmp_path / "two", 2)))
    complete(nodes)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert read_exit(tmp_path / "two") == {"reason": "completed", "exit_code": 0, "step": 6}
    assert "2 processes x 6 micro-batches" in nodes[0].output


@pytest.mark.slow
def test_a_copy_of_the_weights_on_each_node(tmp_path: Path, start_nodes: StartNodes) -> None:
    """FSDP2 in groups of a node's ranks; the second part of the run goes on from a checkpoint that both nodes wrote."""
    write_parquet(tmp_path / "held_out.parquet", make_cells(70, seed=1))
    constant = "training.lr_schedule=constant"  # a linear one would fall faster in the first, shorter part
    assert train.run(load_config(overrides=long_run(tmp_path, *into(tmp_path / "one", 1, constant)))) == 0
    given = [*into(tmp_path / "two", 4, constant), "training.use_fsdp2=true", "training.shard_group_size=2"]
    for steps in (4, 6):
        complete(start_nodes(long_run(tmp_path, *given, f"training.num_train_steps={steps}"), nproc=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_node_stops_all_and_other_sharding_resumes(tmp_path: Path, start_nodes: StartNodes) -> None:
    """Groups of one rank on each node, then full sharding across nodes."""
    given = overrides(tmp_path, *ENDLESS, "training.use_fsdp2=true")
    step = stop_by_one_signal(start_nodes([*given, "training.shard_group_size=1"]), tmp_path / "run", 3)
    complete(start_nodes([*given, f"training.num_train_steps={step + 2}"]))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, step + 3))
    assert read_exit(tmp_path / "run")["reason"] == "completed"


def test_nodes_with_different_data_are_refused(tmp_path: Path, start_nodes: StartNodes) -> None:
    """Each node prints the agreed reason once."""
    homes = tmp_path / "home0", tmp_path / "home1"
    for number, home in enumerate(homes):
        write_parquet(home / "cells.parquet", make_cells(60, seed=number))
    given = overrides(tmp_path, "data.path=cells.parquet", "data.cache_dir=cache")
    for output in outputs(start_nodes(given, folders=homes)):
        (error,) = errors(output)
        assert error.startswith("Error: The ranks of this run differ; give all of them the same: corpus is '")
        assert "Traceback" not in output.partition(error)[0]
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_nodes_with_different_code_are_refused(tmp_path: Path, start_nodes: StartNodes) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("geneformer_pretrain", "hydra_config"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "modeling_bert_te.py"):
        shutil.copy(ROOT / name, other)
    with (other / "geneformer_pretrain/errors.py").open("a") as file:
        file.write("\n# edited on one node\n")
    for output in outputs(start_nodes(overrides(tmp_path), code=(ROOT, other))):
        (error,) = errors(output)
        assert error.startswith("Error: The ranks of this run differ; give all of them the same: source code is '")


@pytest.mark.slow
def test_a_lost_node_ends_the_run_and_another_resumes_it(tmp_path: Path, start_nodes: StartNodes) -> None:
    """SIGKILL to one node's agent and process, as when its power fails; one node goes on from the last checkpoint."""
    given = overrides(tmp_path, *ENDLESS, "training.save_every_n_steps=1")
    run = tmp_path / "run"
    nodes = start_nodes(given)
    wait_until(has_steps(run, 3), "the third step")
    lost = [*psutil.Process(nodes[1].popen.pid).children(recursive=True), psutil.Process(nodes[1].popen.pid)]
    for process in lost:
        process.send_signal(signal.SIGKILL)
    (output,) = outputs(nodes[:1])
    (error,) = errors(output)
    assert error.startswith("Error: rank 0 lost its connection to another rank, or waited too long for it.")
    assert read_exit(run)["reason"] == "error"
    newest = max(int(path.name.removeprefix("step_")) for path in run.glob("step_*"))
    resumed = [*given, f"training.num_train_steps={newest + 2}", "training.gradient_accumulation_steps=4"]
    assert train.run(load_config(overrides=resumed)) == 0
    assert [record["step"] for record in read_metrics(run)] == list(range(1, newest + 3))
    assert sorted(read_cells(run)) == list(range(4 * (newest + 2)))


def killed_agent(nodes: list[TorchrunProcess], number: int, run: Path) -> psutil.Process:
    """SIGKILL one node's torchrun after some steps; return the process of train.py that it leaves behind."""
    wait_until(has_steps(run, 3), "the third step")
    (left,) = psutil.Process(nodes[number].popen.pid).children(recursive=True)
    nodes[number].popen.send_signal(signal.SIGKILL)
    nodes[number].popen.wait()
    return left


@pytest.mark.slow
def test_a_killed_agent_stops_nothing(tmp_path: Path, start_nodes: StartNodes) -> None:
    """Its process goes on without it, and a signal to the other node ends both with a checkpoint."""
    nodes = start_nodes(overrides(tmp_path, *ENDLESS))
    run = tmp_path / "run"
    left = killed_agent(nodes, 1, run)
    wait_until(has_steps(run, len(read_metrics(run)) + 5), "further steps")
    nodes[0].popen.send_signal(signal.SIGTERM)
    left.wait(60)
    stopped_at(run)


@pytest.mark.slow
def test_a_killed_first_agent_ends_the_run_with_a_checkpoint(tmp_path: Path, start_nodes: StartNodes) -> None:
    """The store of the rendezvous dies with it: the other node's torchrun raises, and all ranks save and leave."""
    nodes = start_nodes(overrides(tmp_path, *ENDLESS))
    run = tmp_path / "run"
    left = killed_agent(nodes, 0, run)
    assert "RendezvousConnectionError" in outputs(nodes[1:])[0]
    left.wait(60)
    stopped_at(run)


@pytest.mark.slow
def test_a_node_that_never_joins(tmp_path: Path, start_nodes: StartNodes) -> None:
    """No process starts before all nodes are there; torchrun gives up after join_timeout, 10 minutes by default."""
    (output,) = outputs(start_nodes(overrides(tmp_path), more=((),), join_timeout=5))
    assert "RendezvousTimeoutError" in output
    assert not (tmp_path / "run").exists()
