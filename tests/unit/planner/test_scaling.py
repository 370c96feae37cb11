"""What docs/scaling.md says of 512 GPUs, on one CPU: torch's fake process group and the real packer."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.packing import BatchShape, pack_cells, permutation
from geneformer_pretrain.distributed.engines import make_engine, sharding
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.model.build import build_model
from geneformer_pretrain.model.memory import num_parameters
from geneformer_pretrain.model.resolve import resolve
from geneformer_pretrain.planner.arithmetic import sharding_traffic
from geneformer_pretrain.planner.lengths import of_tokens
from geneformer_pretrain.planner.measured import card
from geneformer_pretrain.planner.plan import EnginePlan, make_plan
from geneformer_pretrain.planner.speed import Cluster
from tests.conftest import ROOT

WORLD = 512


@pytest.fixture
def fake_world() -> Iterator[World]:
    """The first of 512 ranks, whose collectives move nothing."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield World(0, 0, WORLD, torch.device("cpu"), nodes=64)
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts collectives, and the elements of the larger of their two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_").removesuffix("_base")
            self.count[name] += 1
            sizes = [tensor.numel() for tensor in args if isinstance(tensor, torch.Tensor)]
            self.elements[name] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("reshards", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_traffic_of_fsdp2_is_what_the_planner_counts(
    fake_world: World, group: int | None, reshards: bool, micro_batches: int
) -> None:
    overrides = ["training.use_fsdp2=true", f"training.shard_group_size={group or 'null'}"]
    overrides.append(f"training.reshard_after_forward={reshards}")
    config = load_config("10m", [*overrides, "model.num_hidden_layers=2", "model.vocab_size=1000"])
    resolved = resolve(config, fake_world)
    shard = sharding(config, fake_world, resolved, torch.float32)
    model = build_model(config, resolved, fake_world.device, torch.float32, shard)
    engine = make_engine(model, shard, config, fake_world, resolved)
    tokens = torch.randint(2, 1000, (1, 16))
    with Collectives() as seen:
        for number in range(micro_batches):
            with engine.accumulation_context(number == micro_batches - 1):
                engine.forward_module(input_ids=tokens, labels=tokens).loss.backward()
    expected = sharding_traffic(config.model, group or WORLD, micro_batches=micro_batches, reshards=reshards)
    assert (seen.count["allgather"], seen.elements["allgather"]) == (expected.gathers, expected.gathered)
    assert (seen.count["reduce_scatter"], seen.elements["reduce_scatter"]) == (expected.scatters, expected.scattered)
    assert seen.count["allreduce"] == (3 if group else 0)  # replicas add their shards once a step
    owned = sum(parameter.to_local().numel() for parameter in engine.model.parameters())
    assert num_parameters(config.model) / (group or WORLD) <= owned <= 1.3 * expected.scattered / (group or WORLD)


@pytest.mark.parametrize(("name", "micro_batch", "most"), [("10m", 64, 1.03), ("106m", 32, 1.035), ("4b", 10, 1.06)])
def test_packs_of_512_ranks_cost_the_same(name: str, micro_batch: int, most: float) -> None:
    """All ranks wait for the one whose pack has most attention: the sum of squared lengths."""
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(np.log(255), 1.41, 1_000_000)), 16, 2048).astype(np.int32)
    shape = BatchShape.create(lengths, micro_batch_size=micro_batch, seq_length=2048, mlm_probability=0.15)
    plan = pack_cells(permutation(len(lengths), 0, 0), lengths, shape)
    costs = np.add.reduceat(lengths[plan.cells].astype(np.int64) ** 2, plan.pack_start[:-1])

    def waits(costs: np.ndarray) -> float:
        steps = len(costs) // WORLD
        by_step = costs[: steps * WORLD].reshape(steps, WORLD)
        return float((by_step.max(1) / by_step.mean(1)).mean())

    in_order = lengths[permutation(len(lengths), 0, 0)].astype(np.int64)
    of_pack = np.cumsum(in_order) // shape.token_budget
    assert waits(costs) < most
    assert waits(np.bincount(of_pack, weights=in_order**2)) > 1.15  # cells put into packs as they come


@pytest.mark.parametrize(("column", "name"), [(0, "10m"), (1, "106m"), (2, "4b")])
def test_the_table_of_512_gpus_is_the_planners(column: int, name: str) -> None:
    """Rows of docs/scaling.md."""
    section = (ROOT / "docs/scaling.md").read_text().partition("## 100 million cells on 512 GPUs")[2]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    table = {cells[0].strip(): cells[1 + column].strip() for cells in rows}
    config = load_config(name, ["training.use_fsdp2=true"] if name == "4b" else [])

    def planned(network: float) -> EnginePlan:
        found = make_plan(config, Cluster("h100", card("h100"), WORLD, 8, network), of_tokens(55_500_000_000, 2048))
        assert found.cells == pytest.approx(100e6, rel=1e-3)
        assert f"{found.tokens_per_step / 1e6:.1f} million" == table["tokens a step"]
        return found.configured

    fast, slow = planned(400), planned(100)
    assert f"{1e3 * fast.step.seconds:.1f} ms" == table["step, estimated by `plan`"]
    assert f"{1e3 * slow.step.seconds:.1f} ms" == table["the same at 100 Gb/s a GPU"]
    assert fast.gpu_hours_per_epoch == pytest.approx(float(table["GPU-hours an epoch"]), rel=0.03)


def test_a_plan_takes_a_number_a_cell() -> None:
    """Beside 4 bytes a cell for the lengths: 400 MB and 400 MB for 100 million cells on each node."""
    lengths = np.full(300_000, 500, np.int32)
    shape = BatchShape.create(lengths, micro_batch_size=32, seq_length=2048, mlm_probability=0.15)
    plan = pack_cells(permutation(len(lengths), 0, 0), lengths, shape)
    assert (plan.cells.nbytes + plan.pack_start.nbytes) / len(lengths) == pytest.approx(4, rel=0.05)
