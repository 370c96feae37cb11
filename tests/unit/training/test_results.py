"""Results of finished steps: counters, records and requests, from totals that are given."""

import math

import numpy as np
import pytest
import torch

from geneformer_pretrain.checkpoint.state import Progress
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.batch import BatchMetadata
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.training.results import StepResults
from geneformer_pretrain.training.step import PendingStep

WORLD = World(0, 0, 1, torch.device("cpu"))


class Metrics:
    """Keeps what it is given."""

    def __init__(self):
        self.records, self.bar = [], []

    def write(self, record):
        self.records.append(record)

    def advance(self, step, loss, rate, tokens_per_second):
        self.bar.append((step, loss))


@pytest.fixture
def results():
    config = load_config("10m", ["training.max_skipped_steps=3", "training.num_train_steps=100"])
    made = StepResults(config, WORLD, Progress(packs_per_step=1), Metrics(), 128, 1e-3, lambda phase: None)
    made.clock = 0.0
    return made


def collect(results, step, *, loss=6.0, masked=3.0, tokens=64.0, stop=0.0, save=0.0, norm=1.0, launched=None):
    totals = torch.tensor([loss, masked, tokens, 2.0, stop, save, norm], dtype=torch.float64)
    batch = BatchMetadata(step, 1, np.array([4, 5]), int(tokens), int(masked))
    results.pending = PendingStep(step, 1e-3, totals, None, float(step) if launched is None else launched, [batch], 0.0)
    results.collect()


def test_a_record_holds_means_rates_and_counts(results):
    collect(results, 1)
    (record,) = results.metrics.records
    assert record["loss"] == 2.0
    assert record["tokens_per_second"] == 64.0
    assert record["packing_fill"] == 0.5
    assert (record["cells"], record["masked_tokens"], record["epoch"]) == (2, 3, 1)
    assert record["includes_start"]
    assert (results.progress.tokens, results.progress.cells) == (64, 2)
    collect(results, 2)
    assert "includes_start" not in results.metrics.records[1]
    assert results.progress.tokens == 128


def test_pauses_are_no_part_of_a_step(results):
    collect(results, 1, launched=1.0)
    results.pause("save_seconds", 3.0)
    collect(results, 2, launched=5.0)
    record = results.metrics.records[1]
    assert (record["seconds"], record["step_seconds"], record["save_seconds"]) == (4.0, 1.0, 3.0)
    collect(results, 3, launched=6.0)
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
