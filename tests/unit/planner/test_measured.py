"""The model of time and the estimate of memory against every measured run."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.model.memory import num_parameters, peak_memory
from geneformer_pretrain.planner.estimate import StepTime, attended_by, modelled_measurement, step_time
from geneformer_pretrain.planner.fitting import GIB
from geneformer_pretrain.planner.lengths import simulated
from geneformer_pretrain.planner.measured import Measurement, card, measured_like, measurements
from geneformer_pretrain.planner.rates import FITTED, Rates
from geneformer_pretrain.planner.speed import Cluster, compute_seconds, replays_graphs
from tests.conftest import ROOT
from tests.unit.planner.conftest import model, plan, training

TIMED = [row for row in measurements() if row.step_ms is not None and not row.outdated]
NEWEST = next(row for row in reversed(TIMED) if row.lengths == "lognormal")
WEIGHED = [row for row in measurements() if row.memory_gib is not None]


def label(row: Measurement) -> str:
    return f"{row.model}-{row.gpus}x{row.gpu}-{row.engine}-{'fp8' if row.use_fp8 else 'bf16'}-{row.micro_batch_size}"


def milliseconds(row: Measurement) -> float:
    assert row.step_ms is not None
    return row.step_ms


@pytest.mark.parametrize("row", TIMED, ids=label)
def test_time_is_within_five_percent_of_each_measured_run(configs: dict[str, Config], row: Measurement) -> None:
    """By the model alone; what users see is corrected by the nearest run besides."""
    assert 1e3 * modelled_measurement(row, configs["10m"]) == pytest.approx(milliseconds(row), rel=0.05)


def repeats(row: Measurement) -> Measurement:
    """Return what two runs of the same kind have in common; the two kinds of lengths count as one."""
    return replace(row, date="", step_ms=None, memory_gib=None, source="", lengths="lognormal")


@pytest.mark.parametrize("row", TIMED, ids=label)
def test_time_from_the_other_runs_is_within_five_percent(configs: dict[str, Config], row: Measurement) -> None:
    """As `plan` would give it had this run and its repetitions never been made."""
    config = row.applied_to(configs["10m"])
    others = [other for other in measured_like(config, row.gpu) if repeats(other) != repeats(row)]
    cluster = Cluster(row.gpu, card(row.gpu), row.gpus)
    parameters = num_parameters(config.model)
    found = step_time(config, cluster, parameters, attended_by(row), reshards=row.reshard_after_forward, rows=others)
    assert not found.is_measured
    assert 1e3 * found.seconds == pytest.approx(milliseconds(row), rel=0.05)


FREE = (
    *("matrix_bf16", "matrix_fp8", "attention_hopper", "passes_width", "passes_inner", "passes_fp8_width"),
    *("passes_fp8_inner", "step_seconds", "sharded_layer_seconds", "link_share", "slowing"),
)
BEFORE = Rates(0.6, 0.6, 0.3, 0.3, 10, 4, 20, 10, link_share=0.3, slowing=0.3)
"""Round guesses that the fit starts from, and is held to weakly."""


def fitted_to(rows: list[Measurement], config: Config) -> Rates:
    """Return the rates that explain measured runs best, by least squares over logarithms."""

    def rates(logarithms: np.ndarray) -> Rates:
        values = {name: getattr(BEFORE, name) * float(np.exp(x)) for name, x in zip(FREE, logarithms, strict=True)}
        return replace(BEFORE, **values)

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        found = [1e3 * modelled_measurement(row, config, rates(logarithms)) / milliseconds(row) for row in rows]
        return np.concatenate([np.log(found), 0.03 * logarithms])

    return rates(least_squares(residuals, np.zeros(len(FREE))).x)


@pytest.mark.parametrize(("model", "largest"), [("10m", 0.06), ("106m", 0.06), ("4b", 0.12)])
def test_a_model_that_was_never_measured_is_within_some_percent(
    configs: dict[str, Config], model: str, largest: float
) -> None:
    """The rates are fitted to the runs of the other models alone: 4b lies far outside of these."""
    rows = [row for row in TIMED if not row.use_fp8 or row.use_te_layers]  # FP8 of PyTorch layers: one model or two
    rates = fitted_to([row for row in rows if row.model != model], configs["10m"])
    for row in rows:
        if row.model == model:
            found = 1e3 * modelled_measurement(row, configs["10m"], rates)
            assert found == pytest.approx(milliseconds(row), rel=largest)


def test_rates_are_near_those_fitted_to_all_runs(configs: dict[str, Config]) -> None:
    """What is shipped explains the runs about as well as the best fit."""
    best = fitted_to(TIMED, configs["10m"])

    def error(rates: Rates) -> float:
        found = [1e3 * modelled_measurement(row, configs["10m"], rates) / milliseconds(row) for row in TIMED]
        return float(np.abs(np.log(found)).mean())

    assert error(FITTED) < error(best) + 0.01


@pytest.mark.parametrize("row", WEIGHED, ids=label)
def test_memory_is_within_eight_percent_of_each_measured_run(configs: dict[str, Config], row: Measurement) -> None:
    config = row.applied_to(configs["10m"])
    graphs = row.engine == "ddp" and row.model != "4b" and not row.use_te_layers
    parameters = num_parameters(config.model)
    peak = peak_memory(config, row.gpus, parameters, 2, graphs, row.reshard_after_forward).total / GIB
    assert peak == pytest.approx(row.memory_gib, rel=0.08)


def test_estimates_in_the_documentation_are_todays() -> None:
    """The columns `estimate` of docs/performance.md's table of memory."""
    section = (ROOT / "docs/performance.md").read_text().partition("## Memory")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\| (two GPUs: )?\d", line)]
    assert len(rows) >= 10
    for what, _, estimate, _, recomputed in rows:
        found = re.fullmatch(r"(two GPUs: )?(10m|106m|4b), (.*?)([\d,]+)( \(as shipped\))?", what)
        assert found, what
        two, name, kind, tokens, _ = found.groups()
        te, fp8, fsdp2 = "Transformer Engine" in kind, "FP8" in kind, "FSDP2" in kind
        config = load_config(
            name,
            [
                *(f"model.use_te_layers={te}", f"training.use_fp8={fp8}", f"training.use_fsdp2={fsdp2}"),
                f"model.micro_batch_size={int(tokens.replace(',', '')) // 2048}",
            ],
        )
        for every, text in ((0, estimate), (2, recomputed)):
            tried = training(config, recompute_every_n_layers=every)
            gpus = 2 if two else 1
            gpu = "h100" if fp8 and two else "h200"
            peak = plan(tried, gpu=gpu, gpus=gpus).configured.memory.total / GIB
            assert peak == pytest.approx(float(text), abs=0.06), (what, every)


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
    assert step("106m", "h200", 2, training(configs["106m"], gradient_accumulation_steps=2))[1] is False
    smaller = replace(configs["106m"], model=replace(configs["106m"].model, micro_batch_size=8))
    assert step("106m", "h200", 2, smaller)[1] is False
    assert step("4b", "h200", 4, training(configs["4b"], use_fsdp2=True)) == (pytest.approx(502.0, rel=1e-3), True)
    assert step("106m", "h200", 8)[1] is False
    longer = replace(configs["106m"].model, max_position_embeddings=4096, seq_length=4096, micro_batch_size=16)
    assert step("106m", "h200", 2, replace(configs["106m"], model=longer))[1] is False
    other_kernels = replace(configs["106m"].model, attention_kernel=Kernel.torch)
    assert step("106m", "h200", 2, replace(configs["106m"], model=other_kernels))[1] is False
    other_cells = step_time(
        configs["106m"], Cluster("h200", card("h200"), 1), num_parameters(configs["106m"].model), 600, reshards=False
    )
    assert not other_cells.is_measured
    on_a100, is_measured = step("106m", "a100", 1)
    assert not is_measured
    assert 200 < on_a100 < 400  # a third of the matrix rate, half of the bandwidth


def test_what_was_not_measured_is_not_called_so(configs: dict[str, Config]) -> None:
    """Runs between nodes, FSDP2 on one GPU, and kernels or graphs that the measured runs did not have."""

    def step(config: Config, gpus: int = 1, gpus_per_node: int = 8) -> StepTime:
        cluster = Cluster("h200", card("h200"), gpus, gpus_per_node, 1)
        parameters = num_parameters(config.model)
        return step_time(config, cluster, parameters, attended_by(NEWEST), reshards=False)

    assert step(configs["106m"], 4).is_measured
    assert not step(configs["106m"], 4, 2).is_measured
    assert step(configs["106m"], 4, 2).seconds > step(configs["106m"], 4).seconds
    with_graphs = step(configs["10m"])
    assert with_graphs.is_measured
    assert not step(training(configs["10m"], use_fsdp2=True)).is_measured
    without = step(training(configs["10m"], cuda_graphs=False))
    assert not without.is_measured
    assert without.seconds - with_graphs.seconds > 2e-3  # 24.4 to 27.6 ms were measured
    torch_kernels = step(model(configs["10m"], attention_kernel=Kernel.torch))
    assert torch_kernels.seconds == with_graphs.seconds
    assert torch_kernels.basis.endswith("is not modelled")


def test_a_model_of_the_same_layers_is_estimated_by_its_own_shape(configs: dict[str, Config]) -> None:
    """v2_104m has 106m's layers and as many tokens a micro-batch, and twice the cells' lengths.

    By its FLOPs, with attention at a third of the rate of matrix products, it takes about 1.3 times as long.
    """
    attended = 2234
    cluster = Cluster("h200", card("h200"), 1)
    v2 = step_time(configs["v2_104m"], cluster, num_parameters(configs["v2_104m"].model), attended, reshards=False)
    v1 = step_time(configs["106m"], cluster, num_parameters(configs["106m"].model), 1193, reshards=False)
    of_attention = 3 * 12 * 4 * 768 * (attended - 1193) * 65_536 / (0.23 * 989e12)
    assert configs["v2_104m"].model.token_budget == configs["106m"].model.token_budget
    assert v2.seconds - v1.seconds == pytest.approx(of_attention, rel=0.1)
    assert not v2.is_measured
    assert "106m" in v2.basis


def test_small_models_wait_for_the_host_without_graphs(configs: dict[str, Config]) -> None:
    """10m on one H200: launches take 24.4 to 27.6 ms, 6.3 ms with graphs (docs/log/performance-2026-11.md)."""
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
    tiny = replace(configs["10m"], model=replace(configs["10m"].model, micro_batch_size=1))
    assert compute_seconds(tiny, card("h200"), 1252, graphs=True) == pytest.approx(6.3e-3, rel=0.06)
