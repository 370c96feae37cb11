"""Plans against the real packer, and their engines, disks and saves beside one another."""

from dataclasses import replace

import numpy as np
import pytest

from geneformer_pretrain.config.compose import choices, load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.packing import BatchShape, pack_cells, permutation
from geneformer_pretrain.model.memory import num_parameters
from geneformer_pretrain.planner.estimate import step_time
from geneformer_pretrain.planner.lengths import CellLengths, genecorpus
from geneformer_pretrain.planner.measured import card
from geneformer_pretrain.planner.plan import make_plan
from geneformer_pretrain.planner.saving import save_interval, saving
from geneformer_pretrain.planner.speed import Cluster
from tests.conftest import ROOT
from tests.unit.planner.conftest import MODELS, plan, training


def test_epoch_agrees_with_the_packer(configs: dict[str, Config]) -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(np.log(255), 1.41, 60_000)), 16, 3000).astype(np.int32)
    config = configs["106m"]
    shape = BatchShape.create(lengths, micro_batch_size=32, seq_length=2048, mlm_probability=0.15)
    packs = pack_cells(permutation(len(lengths), 0, 0), lengths, shape).num_packs
    given = CellLengths(lengths.astype(np.int64), len(lengths), int(lengths.sum()), "test")
    found = make_plan(training(config, gradient_accumulation_steps=2), Cluster("h100", card("h100"), 4), given)
    assert found.steps_per_epoch == pytest.approx(packs / 8, rel=0.005)
    assert found.tokens == pytest.approx(np.minimum(lengths, 2048).sum(), rel=1e-9)
    assert found.cells_per_step * found.steps_per_epoch == pytest.approx(60_000)


def test_engines_side_by_side(configs: dict[str, Config]) -> None:
    config = training(configs["4b"], use_fsdp2=True, shard_group_size=4)
    found = plan(config, gpus=16, gpu="h100", price=2.0)
    assert [engine.engine for engine in found.engines] == [
        "FSDP2, groups of 4",
        "DDP",
        "FSDP2",
        "FSDP2, groups of 8",
    ]
    _, ddp, fsdp2, hybrid = found.engines
    assert [engine.is_configured for engine in found.engines] == [True, False, False, False]
    assert not ddp.fits
    assert fsdp2.fits
    assert fsdp2.memory.total < hybrid.memory.total < ddp.memory.total
    assert fsdp2.memory.optimizer == -(-found.num_parameters // 16) * 8
    assert fsdp2.largest_micro_batch >= hybrid.largest_micro_batch > ddp.largest_micro_batch
    for engine in found.engines:
        assert engine.gpu_hours_per_epoch == pytest.approx(16 * engine.hours_per_epoch)
        assert engine.cost_per_epoch == pytest.approx(2 * engine.gpu_hours_per_epoch)


def test_one_group_of_all_gpus_is_no_group(configs: dict[str, Config]) -> None:
    found = plan(training(configs["4b"], use_fsdp2=True, shard_group_size=2), gpus=2)
    assert [(engine.engine, engine.is_configured) for engine in found.engines] == [("DDP", False), ("FSDP2", True)]
    nvfsdp = plan(training(configs["4b"], use_nvfsdp=True), gpus=2).engines
    assert [engine.engine for engine in nvfsdp] == ["nvFSDP", "DDP", "FSDP2"]


@pytest.mark.parametrize("name", MODELS)
def test_largest_micro_batch_fits_and_the_next_does_not(configs: dict[str, Config], name: str) -> None:
    """By memory, or because attention's kernels count elements in 32 bits."""
    largest = plan(configs[name]).configured.largest_micro_batch
    at_most, more = (
        plan(replace(configs[name], model=replace(configs[name].model, micro_batch_size=size))).configured.fits
        for size in (largest, largest + 1)
    )
    elements = 3 * configs[name].model.hidden_size * configs[name].model.seq_length
    assert at_most
    assert not more or largest * elements < 2**31 <= (largest + 1) * elements


def test_slower_networks_cost_time(configs: dict[str, Config]) -> None:
    """Full sharding sends 2 + 4 bytes a parameter, groups of a node's GPUs 8: these gain once they accumulate."""
    config = training(configs["4b"], use_fsdp2=True, save_every_n_steps=2000)
    hours = []
    for network in (400.0, 100.0, 10.0):
        cluster = Cluster("h100", card("h100"), 64, 8, network)
        found = make_plan(config, cluster, genecorpus(2048))
        hours.append({engine.engine: engine.hours_per_epoch for engine in found.engines})
    assert hours[0]["FSDP2"] <= hours[1]["FSDP2"] < hours[2]["FSDP2"]
    assert hours[2]["FSDP2"] < hours[2]["FSDP2, groups of 8"]
    accumulating = make_plan(
        training(config, gradient_accumulation_steps=4), Cluster("h100", card("h100"), 64, 8, 10.0), genecorpus(2048)
    )
    _, fsdp2, hybrid = accumulating.engines
    assert hybrid.hours_per_epoch < 0.5 * fsdp2.hours_per_epoch


def test_disk_and_checkpoints(configs: dict[str, Config]) -> None:
    found = plan(configs["106m"])
    assert found.checkpoint_bytes == 12 * 106_775_122
    assert found.disk_bytes == (12 * 4 + 4) * 106_775_122  # three kept, one under way, the export


# --- saving -------------------------------------------------------------------------


def test_saving_stops_training_until_the_save_before_is_written(configs: dict[str, Config]) -> None:
    often = replace(configs["4b"].training, save_every_n_steps=50)
    rare = replace(often, save_every_n_steps=1200)
    parameters, step = 2_909_283_666, 0.503
    assert saving(often, parameters, 1, step).share > 0.5  # 65 s of writing every 25 s
    assert saving(rare, parameters, 1, step).share == pytest.approx(0.83 / 604, rel=0.02)
    measured = 7.62  # of 4b on one H200
    assert saving(rare, parameters, 1, step).first_stop_seconds == pytest.approx(measured, rel=0.05)
    assert saving(replace(rare, async_save=False), parameters, 1, step).stop_seconds == pytest.approx(65.5, rel=0.01)


def test_ranks_share_the_saving_with_every_engine(configs: dict[str, Config]) -> None:
    """As `Shards.to_save` shares it: replicas too copy their part only."""
    one = plan(configs["106m"]).configured.saving.first_stop_seconds
    for engine in plan(configs["106m"], gpus=4).engines:
        assert engine.saving.first_stop_seconds == pytest.approx(one / 4)
        assert engine.saving.host_bytes == 3 * 106_775_122


def test_save_interval_is_the_shorter_of_steps_and_minutes(configs: dict[str, Config]) -> None:
    class Both:
        save_every_n_steps: int | None = 100
        save_every_minutes = 15.0

    class Minutes(Both):
        save_every_n_steps = None

    class Steps(Both):
        save_every_minutes = 0.0

    assert [save_interval(kind(), 2.0) for kind in (Both, Minutes, Steps)] == [200, 900, 200]  # type: ignore[arg-type]
    assert save_interval(Minutes(), 1000.0) == 1000  # type: ignore[arg-type]


@pytest.mark.parametrize("name", choices(ROOT / "hydra_config"))
def test_shipped_configurations_spend_at_most_a_percent_on_saving(name: str) -> None:
    """On the fastest card measured, one GPU; the quick check on the sample data is for CPUs: half a second a step."""
    config = load_config(name)
    parameters = num_parameters(config.model)
    seconds = 0.5
    if name != "l0_sanity":
        seconds = step_time(config, Cluster("h200", card("h200"), 1), parameters, 1250, reshards=False).seconds
    assert saving(config.training, parameters, 1, seconds).share <= 0.01
