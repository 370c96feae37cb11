"""The planner's arithmetic against the real model, the real packer and every measured run."""

import json
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_pretrain.cli import main
from geneformer_pretrain.config.compose import choices, load_config
from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.packing import BatchShape, pack_cells, permutation
from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.model.memory import num_parameters, peak_memory
from geneformer_pretrain.planner.arithmetic import flops_per_token, layer_shapes, root_shapes, size
from geneformer_pretrain.planner.lengths import CellLengths, genecorpus, of_corpus, of_tokens, simulated
from geneformer_pretrain.planner.measured import Measurement, card, measurements
from geneformer_pretrain.planner.plan import GIB, Plan, make_plan
from geneformer_pretrain.planner.saving import save_interval, saving
from geneformer_pretrain.planner.speed import Cluster, compute_seconds, modelled_measurement, replays_graphs, step_time
from modeling_bert_te import BertConfig, BertForMaskedLM

MODELS = ("10m", "106m", "4b")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {name: load_config(name) for name in MODELS}


def plan(config: Config, *, gpu: str = "h200", gpus: int = 1, **options: float) -> Plan:
    return make_plan(config, Cluster(gpu, card(gpu), gpus), genecorpus(2048), **options)


def training(config: Config, **values: object) -> Config:
    return replace(config, training=replace(config.training, **values))


# --- parameters and FLOPs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(configs: dict[str, Config], name: str) -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**configs[name].model.architecture()))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(configs[name].model) == count
    layers = configs[name].model.num_hidden_layers * size(layer_shapes(configs[name].model))
    assert size(root_shapes(configs[name].model)) + layers == count


@pytest.mark.parametrize(("name", "millions"), [("10m", 47.9), ("106m", 666), ("4b", 18_437)])
def test_flops_are_those_of_the_documentation(configs: dict[str, Config], name: str, millions: float) -> None:
    lengths = simulated("lognormal", 2048).quantiles()
    attended = (lengths.astype(float) ** 2).sum() / lengths.sum()
    assert flops_per_token(configs[name].model, 0.15, attended) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_flops_are_those_that_torch_counts(configs: dict[str, Config]) -> None:
    """Forward and backward of one cell; torch counts recomputation of none, and the embeddings as nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig as StockConfig
    from transformers import BertForMaskedLM as StockModel

    small = replace(
        configs["10m"].model,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    stock = StockModel(StockConfig(**small.architecture(), attn_implementation="eager"))
    cell = torch.arange(2, 50)[None]
    with FlopCounterMode(display=False) as counter:
        stock(cell).logits.sum().backward()
    assert cell.numel() * flops_per_token(small, 1.0, cell.numel()) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


# --- measured runs ----------------------------------------------------------------------------------------

TIMED = [row for row in measurements() if row.step_ms is not None and not row.outdated]
WEIGHED = [row for row in measurements() if row.memory_gib is not None]


def label(row: Measurement) -> str:
    return f"{row.model}-{row.gpus}x{row.gpu}-{row.engine}-{'fp8' if row.use_fp8 else 'bf16'}-{row.micro_batch_size}"


@pytest.mark.parametrize("row", TIMED, ids=label)
def test_time_is_within_ten_percent_of_each_measured_run(configs: dict[str, Config], row: Measurement) -> None:
    """By the model alone; what users see is corrected by the nearest run besides."""
    config = configs[row.model]
    seconds = modelled_measurement(row, config, card(row.gpu), num_parameters(config.model))
    assert 1e3 * seconds == pytest.approx(row.step_ms, rel=0.10)


@pytest.mark.parametrize("row", WEIGHED, ids=label)
def test_memory_is_within_eight_percent_of_each_measured_run(configs: dict[str, Config], row: Measurement) -> None:
    config = row.applied_to(configs[row.model])
    graphs = row.engine == "ddp" and row.model != "4b" and not row.use_te_layers
    parameters = num_parameters(config.model)
    peak = peak_memory(config, row.gpus, parameters, 2, graphs, row.reshard_after_forward).total / GIB
    assert peak == pytest.approx(row.memory_gib, rel=0.08)


def test_measurements_are_those_of_the_documentation() -> None:
    """Each row of docs/log/performance-2026-11-24.json, whose numbers are those of the notebook."""
    known = {(row.date, row.model, row.gpus, row.micro_batch_size): row for row in measurements() if row.gpu == "h200"}
    documented = [
        row for row in json.loads((ROOT / "docs/log/performance-2026-11-24.json").read_text()) if "seconds" in row
    ]
    assert documented
    for row in documented:
        micro_batch = row.get("micro_batch_size", {"10m": 64, "106m": 32}.get(row["model"]))
        ours = known[row["date"], row["model"], row["nproc"], micro_batch]
        assert ours.step_ms == pytest.approx(1e3 * row["seconds"], rel=1e-2)
        assert ours.memory_gib == pytest.approx(row["memory_gib"], rel=1e-2)


def test_measured_step_is_given_as_measured(configs: dict[str, Config]) -> None:
    """The newest run of the same engine, GPUs and micro-batch decides; others are marked as estimates."""
    lengths = simulated("lognormal", 2048).quantiles()
    attended = (lengths.astype(float) ** 2).sum() / lengths.sum()

    def step(name: str, gpu: str, gpus: int, config: Config | None = None) -> tuple[float, bool]:
        config = config or configs[name]
        cluster = Cluster(gpu, card(gpu), gpus)
        found = step_time(config, cluster, num_parameters(config.model), attended, reshards=False)
        return 1e3 * found.seconds, found.is_measured

    assert step("106m", "h200", 2) == (pytest.approx(105.2, rel=1e-6), True)
    assert step("4b", "h200", 4, training(configs["4b"], use_fsdp2=True)) == (pytest.approx(508.2, rel=1e-3), True)
    assert step("106m", "h200", 8)[1] is False
    longer = replace(configs["106m"].model, max_position_embeddings=4096, seq_length=4096, micro_batch_size=16)
    assert step("106m", "h200", 2, replace(configs["106m"], model=longer))[1] is False
    other_kernels = replace(configs["106m"].model, attention_kernel=Kernel.torch)
    assert step("106m", "h200", 2, replace(configs["106m"], model=other_kernels))[1] is False
    on_a100, is_measured = step("106m", "a100", 1)
    assert not is_measured
    assert 200 < on_a100 < 400  # a third of the matrix rate, half of the bandwidth


def test_small_models_wait_for_the_host_without_graphs(configs: dict[str, Config]) -> None:
    """10m on one H200: 24.4 to 27.6 ms of launches (docs/performance.md), 22.6 ms a step with graphs."""
    graphs, none, off = (
        replays_graphs(config, Cluster("h200", card("h200"), gpus))
        for config, gpus in (
            (configs["10m"], 8),
            (configs["10m"], 16),
            (training(configs["10m"], cuda_graphs=False), 1),
        )
    )
    assert (graphs, none, off) == (True, False, False)
    assert not replays_graphs(configs["4b"], Cluster("h200", card("h200"), 1))
    eager, replayed = (compute_seconds(configs["10m"], card("h200"), 1252, graphs=each) for each in (False, True))
    assert eager == pytest.approx(24e-3)
    assert replayed < 22.6e-3


# --- plans ------------------------------------------------------------------------------------------------


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
    (engine,) = plan(configs[name]).engines
    at_most, more = (
        plan(replace(configs[name], model=replace(configs[name].model, micro_batch_size=size))).engines[0].fits
        for size in (engine.largest_micro_batch, engine.largest_micro_batch + 1)
    )
    assert (at_most, more) == (True, False)


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


# --- saving -----------------------------------------------------------------------------------------------


def test_saving_stops_training_until_the_save_before_is_written(configs: dict[str, Config]) -> None:
    often = replace(configs["4b"].training, save_every_n_steps=50)
    rare = replace(often, save_every_n_steps=1200)
    parameters, step = 2_909_283_666, 0.503
    assert saving(often, parameters, 1, step).share > 0.5  # 65 s of writing every 25 s
    assert saving(rare, parameters, 1, step).share == pytest.approx(0.83 / 604, rel=0.02)
    assert saving(rare, parameters, 8, step).share < saving(rare, parameters, 1, step).share
    assert saving(replace(rare, async_save=False), parameters, 1, step).stop_seconds == pytest.approx(65.5, rel=0.01)


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


# --- lengths ----------------------------------------------------------------------------------------------


def test_lengths_of_each_kind_of_corpus(tmp_path: Path) -> None:
    cells = [[5, 6, 7], [8], [9, 10, 11, 12]]
    table = pa.table({"input_ids": pa.array(cells, pa.list_(pa.uint16())), "length": [3, 1, 4]})
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(table, folder / "part-0.parquet")
    pq.write_table(table.drop_columns("length"), folder / "part-1.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(tmp_path / "saved")
    for path, copies in (
        (folder, 2),
        (tmp_path / "**/part-*.parquet", 2),
        (folder / "part-1.parquet", 1),
        (tmp_path / "saved", 1),
    ):
        found = of_corpus(path)
        assert found.sample.tolist() == [3, 1, 4] * copies
        assert (found.cells, found.tokens) == (3 * copies, 8 * copies)
    cut = of_corpus(folder).cut(3)
    assert (cut.tokens, cut.attended) == (pytest.approx(14), pytest.approx(19 / 7))


def test_corpora_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no parquet file and no save_to_disk folder"):
        of_corpus(tmp_path / "none")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match=r"bad\.parquet: not readable as parquet"):
        of_corpus(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"cells": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="neither a column length nor input_ids"):
        of_corpus(tmp_path / "other.parquet")
    pq.write_table(pa.table({"length": pa.array([], pa.int32())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="no cells"):
        of_corpus(tmp_path / "empty.parquet")


def test_simulated_lengths_are_genecorpus_like() -> None:
    short, long = genecorpus(2048), genecorpus(4096)
    assert np.median(short.sample) == pytest.approx(255, rel=0.01)
    assert (short.sample == 2048).mean() == pytest.approx(0.07, abs=0.002)
    assert long.sample.mean() == pytest.approx(1440, rel=0.01)
    half = of_tokens(7_600_000_000, 2048)
    assert (half.cells, half.tokens) == (13_700_000, 7_600_000_000)


# --- the command ------------------------------------------------------------------------------------------


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ending:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(ending.value.code or 0), captured.out, captured.err


def test_plan_prints_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "plan.json"
    started = time.monotonic()
    code, out, _ = run_plan(
        capsys,
        *("--config-name", "106m", "--gpus", "8", "--gpu", "H100", "--price", "2.5", "--report", str(report)),
        "training.num_train_steps=5000",
    )
    assert time.monotonic() - started < 10
    assert code == 0
    values = json.loads(report.read_text())
    assert values["num_parameters"] == 106_775_122
    assert values["num_train_steps"] == 5000
    assert [engine["engine"] for engine in values["engines"]] == ["DDP", "FSDP2", "FSDP2, groups of 4"]
    memory = values["engines"][0]["memory"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    for text in ("106,775,122 parameters", "Genecorpus-30M", "activations", "~ estimated", "GPU-hours, cost"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 190


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "v100"], "--gpu v100: not among the GPUs that are known: h100, h200"),
        (["--gpus", "0"], "--gpus 0: it must be positive"),
        (["--gpus", "12"], "--gpus 12 is no multiple of --gpus-per-node 8"),
        (["--network", "0"], "--network 0.0: it must be positive"),
        (["--tokens", "0"], "--tokens 0.0: it must be at least 1"),
        (["--config-name", "4b", "--gpu", "a100"], "has no FP8: set training.use_fp8=false"),
        (["--gpus", "4", "training.use_fsdp2=true", "training.shard_group_size=3"], "does not divide the 4 GPUs"),
        (["data.packing=false"], "plan sizes packed runs"),
        (["training.compute_dtype=float32"], "plan sizes runs in BF16 and FP8"),
        (["training.sede=1"], "did you mean training.seed"),
        (["--corpus", "none.parquet"], "--corpus none.parquet: no parquet file"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    code, out, err = run_plan(capsys, *arguments)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert said in line


def test_what_does_not_fit_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_plan(capsys, "--config-name", "4b", "--gpu", "h100")
    assert "! one GPU does not fit: 86.5 GiB" in out
    assert "model.micro_batch_size=7 does" in out
    _, out, _ = run_plan(capsys, "--config-name", "4b", "--gpu", "rtx4090", "--gpus", "2", "training.use_fsdp2=true")
    assert "shard over more GPUs" in out


def test_unknown_gpu_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="h100"):
        card("tpu")
