"""Results of finished steps: counters, records and requests, from totals that are given."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from geneformer_pretrain.checkpoint.state import Progress
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.batch import BatchMetadata
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.planner import measured
from geneformer_pretrain.planner.measured import card, card_of_device
from geneformer_pretrain.training.results import StepResults, run_utilization
from geneformer_pretrain.training.step import PendingStep
from tests.unit.run.test_metrics import RESOLVED

WORLD = World(0, 0, 1, torch.device("cpu"))


class Metrics:
    """Keeps what it is given."""

    def __init__(self):
        self.records, self.bar = [], []

    def write(self, record):
        self.records.append(record)

    def advance(self, step, loss, rate, tokens, seconds):
        self.bar.append((step, loss, tokens, seconds))


@pytest.fixture
def results():
    config = load_config("10m", ["training.max_skipped_steps=3", "training.num_train_steps=100"])
    made = StepResults(config, WORLD, Progress(packs_per_step=1), Metrics(), 128, 1e-3, lambda phase: None)
    made.clock = 0.0
    return made


def collect(
    results, step, *, loss=6.0, masked=3.0, tokens=64.0, stop=0.0, save=0.0, norm=1.0, finished=None, history=()
):
    totals = torch.tensor([loss, masked, tokens, 2.0, stop, save, norm, *history], dtype=torch.float64)
    batch = BatchMetadata(step, 1, np.array([4, 5]), int(tokens), int(masked))
    results.pending = PendingStep(step, 1e-3, totals, None, float(step) if finished is None else finished, [batch], 0.0)
    results.collect()


def test_a_record_holds_means_rates_and_counts(results):
    collect(results, 1)
    (record,) = results.metrics.records
    assert record["loss"] == 2.0
    assert record["tokens_per_second"] == 64.0
    assert record["packing_fill"] == 0.5
    assert record["mfu"] == pytest.approx(0.064)
    assert "outlier_steps" not in record
    assert (record["cells"], record["masked_tokens"], record["epoch"]) == (2, 3, 1)
    assert record["includes_start"]
    assert (results.progress.tokens, results.progress.cells) == (64, 2)
    collect(results, 2)
    assert "includes_start" not in results.metrics.records[1]
    assert results.progress.tokens == 128


def test_pauses_are_no_part_of_a_step(results):
    collect(results, 1, finished=1.0)
    results.pause("save_seconds", 3.0)
    collect(results, 2, finished=5.0)
    record = results.metrics.records[1]
    assert (record["seconds"], record["step_seconds"], record["save_seconds"]) == (4.0, 1.0, 3.0)
    assert results.metrics.bar[1] == (2, 2.0, 64.0, 1.0)
    collect(results, 3, finished=6.0)
    assert "save_seconds" not in results.metrics.records[2]


def test_requests_of_any_rank_are_kept(results):
    collect(results, 1, save=2.0)
    assert results.save_requested
    assert not results.stop_requested
    collect(results, 2, stop=1.0)
    assert results.stop_requested


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(results):
    collect(results, 1, norm=math.inf)
    collect(results, 2, norm=math.nan)
    collect(results, 3)
    collect(results, 4, norm=math.inf)
    assert results.progress.skipped_steps == 3
    collect(results, 5, norm=math.inf)
    with pytest.raises(TrainingError, match=r"3 updates in a row .* at step 6.*\[\(6, \[4, 5\]\)\]"):
        collect(results, 6, norm=math.inf)


def test_outlier_steps_are_counted_apart(results, caplog):
    """They do not end a run; the first of several in a row is logged, with the usual norm."""
    states = [(100, 0.0, 0.01, 0), (101, 0.1, 0.1, 1), (102, 0.2, 0.2, 2), (102, 0.2, 0.2, 2), (103, 0.3, 0.2, 0)]
    norms = [1.0, 40.0, 50.0, math.nan, 1.2]
    for step, (state, norm) in enumerate(zip(states, norms, strict=True), 1):
        collect(results, step, norm=norm, history=state)
        assert results.progress.norm_history == list(state)
    assert [record["outlier_steps"] for record in results.metrics.records] == [0, 1, 2, 2, 2]
    assert [record["skipped_steps"] for record in results.metrics.records] == [0, 0, 0, 1, 1]
    assert caplog.messages == [
        "step 2 is skipped: its gradient norm is 40, and 1.11 of late",
        "step 4 is skipped: its gradients are not finite",
    ]
    collect(results, 6, norm=0.0, history=(103, 0.3, 0.2, 1))  # a norm of zero leaves the state as it was
    assert results.progress.outlier_steps == 2


def test_utilization_is_the_work_of_a_token_against_the_peak_of_all_gpus():
    config = load_config("106m")
    device = replace(RESOLVED, device="NVIDIA H200", world_size=4)
    lengths = np.array([500, 1000, 3000], np.int32)
    kept = np.minimum(lengths, 2048)
    h, f, layers = 768, 3072, 12
    attended = (kept**2).sum() / kept.sum()
    forward = layers * (2 * (4 * h * h + 2 * h * f) + 4 * h * attended) + 2 * 0.15 * (h * h + h * 25_426)
    found = run_utilization(config, device, lengths)
    assert found == pytest.approx(3 * forward / (4 * 989e12))
    assert run_utilization(config, replace(device, device="NVIDIA GeForce GTX 1080"), lengths) is None
    assert run_utilization(config, RESOLVED, lengths) is None


def test_every_device_is_a_card_that_is_known():
    for name in measured._data()["devices"]:
        assert card_of_device(name).bf16_tflops > 0
    assert {card_of_device(name).name for name in measured._data()["devices"]} == {
        card(name).name for name in measured._data()["cards"]
    }


def test_a_step_without_masked_tokens_is_said_once(results, capsys):
    collect(results, 1, masked=0.0)
    collect(results, 2, masked=0.0)
    assert capsys.readouterr().out.count("is masked: there is nothing to learn") == 1
    assert math.isnan(results.metrics.records[0]["loss"])


def test_ranks_without_metrics_only_count():
    config = load_config("10m")
    quiet = StepResults(config, WORLD, Progress(packs_per_step=1), None, 128, None, lambda phase: None)
    collect(quiet, 1)
    assert quiet.progress.tokens == 64
