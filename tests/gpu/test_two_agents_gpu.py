"""Two nodes on one machine: two torchrun agents, each with half of its GPUs, NCCL between them over loopback sockets.

Needs two GPUs (an agent with one each) or four (two each): `pytest tests/gpu/test_two_agents_gpu.py`.
"""

from pathlib import Path

import pytest
import torch

from tests.agents import (
    StartNodes,
    complete,
    stop_by_one_signal,
)
from tests.conftest import RunTorchrun
from tests.tiny import read_exit, read_metrics

GPUS = torch.cuda.device_count() // 2 * 2
PER_NODE = GPUS // 2
STEPS = 8
COMMON = [
    "--config-name=10m",
    "data.path=sample_data/cells.parquet",
    "model.num_hidden_layers=2",
    "model.micro_batch_size=8",
    "training.compile=false",  # a minute a start
    "training.warmup_steps=0",
    "training.lr_schedule=constant",
    "training.learning_rate=3e-4",
    "training.wandb_init_args=null",
    "training.save_every_minutes=0",
    "training.save_every_n_steps=100000",
]
FSDP2 = "training.use_fsdp2=true"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs"),
]


def of_node(number: int) -> dict[str, str]:
    """Environment of a node: its GPUs, and a name of its own for NCCL, which then sends over sockets between nodes."""
    gpus = range(number * PER_NODE, (number + 1) * PER_NODE)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        "NCCL_HOSTID": f"node{number}",
        "NCCL_SOCKET_IFNAME": "lo",
    }


NODES = [of_node(0), of_node(1)]


def overrides(folder: Path, steps: int, *more: str) -> list[str]:
    """Overrides of a run in a folder, up to a step."""
    shared = [f"data.cache_dir={folder.parent}/cache", f"training.checkpoint_dir={folder}"]
    return [*COMMON, *shared, f"training.num_train_steps={steps}", *more]


def losses(folder: Path) -> list[float]:
    """Return the losses of all steps, after checking that none is missing."""
    records = read_metrics(folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of one process with the same packs, filled by the first test."""
    return tmp_path_factory.mktemp("one") / "run"


@pytest.mark.parametrize(
    "link",
    [
        pytest.param([FSDP2, f"training.shard_group_size={PER_NODE}"], id="copy-a-node"),
        pytest.param([FSDP2], id="sharded-over-nodes"),
        pytest.param([], id="ddp"),
    ],
)
def test_two_nodes_go_on_from_their_checkpoint_and_train_as_one_process(
    tmp_path: Path,
    start_nodes: StartNodes,
    run_torchrun: RunTorchrun,
    expected: Path,
    link: list[str],
) -> None:
    if not expected.exists():
        given = overrides(expected, STEPS, f"training.gradient_accumulation_steps={GPUS}")
        run_torchrun(given, nproc=1, env=NODES[0], timeout=300)
    for steps in (STEPS // 2, STEPS):
        given = overrides(tmp_path / "run", steps, *link)
        complete(start_nodes(given, nproc=PER_NODE, environments=NODES), timeout=300)
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), abs=0.01)


def test_a_signal_to_one_node_stops_all_and_other_sharding_resumes(
    tmp_path: Path,
    start_nodes: StartNodes,
) -> None:
    """A copy on each node first; then sharded over both nodes."""
    run = tmp_path / "run"
    given = overrides(run, 10_000_000, FSDP2)
    groups = [*given, f"training.shard_group_size={PER_NODE}"]
    step = stop_by_one_signal(start_nodes(groups, nproc=PER_NODE, environments=NODES), run, 5, timeout=300)
    given = overrides(run, step + 2, FSDP2)
    complete(start_nodes(given, nproc=PER_NODE, environments=NODES), timeout=300)
    assert len(losses(run)) == step + 2
    assert read_exit(run)["reason"] == "completed"
