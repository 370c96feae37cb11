"""Checkpoints that release 0.1 wrote, of both kinds: read, and gone on from with the losses that it got itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from geneformer_pretrain.checkpoint.manifest import find_damage
from geneformer_pretrain.training.main import run as run_training
from tests.checkpoints import assert_equal, read_checkpoint
from tests.tiny import (
    RunWorkers,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    read_metrics,
    tiny_config,
)

pytestmark = pytest.mark.process

OLD = Path(__file__).parents[2] / "data/checkpoints_0_1"
"""Step 3 of a run on 2 ranks with DDP and of one with FSDP2, made at revision 3e1bc64 with torch 2.13 on a CPU."""


def test_every_tensor_is_what_torch_itself_reads(tmp_path: Path) -> None:
    assert_equal(read_checkpoint(OLD / "ddp/step_3"), torch.load(OLD / "ddp/step_3/checkpoint.pt", weights_only=True))
    dcp_to_torch_save(OLD / "fsdp2/step_3", tmp_path / "converted.pt")
    expected = torch.load(tmp_path / "converted.pt", weights_only=True)
    assert len(expected) > 70
    assert_equal(read_checkpoint(OLD / "fsdp2/step_3"), expected)


def go_on(rank: int, size: int, config: Any) -> None:
    assert run_training(config) == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_resumes_with_the_losses_of_release_0_1(tmp_path: Path, run_workers: RunWorkers, engine: str) -> None:
    golden = json.loads((OLD / "golden.json").read_text())
    run = tmp_path / "run"
    shutil.copytree(OLD / engine, run)
    shutil.copyfile(OLD / "cells.parquet", tmp_path / "cells.parquet")
    config = tiny_config(tmp_path, *golden["overrides"], f"training.use_fsdp2={engine == 'fsdp2'}")
    run_workers(go_on, 2, config, initialise=False)
    records = read_metrics(run)
    assert [record["step"] for record in records] == [4, 5, 6]
    for record, expected in zip(records, golden[engine], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert not find_damage(run / "step_3")
    assert json.loads((run / "step_6/manifest.json").read_text())["format_version"] == 2
