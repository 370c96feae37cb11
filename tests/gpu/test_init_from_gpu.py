"""A published model as the start of every engine on the GPUs there are, nvFSDP's uneven shards included."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from geneformer_pretrain.distributed.world import distributed_world
from tests.distributed.test_init_from import ENGINES, assert_starts_equal, losses, save_stock_model
from tests.tiny import RunWorkers, overrides

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def on_gpus(rank: int, size: int, *arguments: Any) -> dict[str, Any]:
    with distributed_world() as world:
        return losses(world, *arguments)


def test_loss_equals_the_stock_models_on_every_engine(tmp_path: Path, run_workers: RunWorkers) -> None:
    engines = [name for name in ENGINES if name != "nvfsdp" or importlib.util.find_spec("megatron_fsdp")]
    given = overrides(tmp_path, "training.compute_dtype=float32")
    expected = save_stock_model(tmp_path / "published", given)
    arguments = engines, given, tmp_path / "published"
    for found in run_workers(on_gpus, max(torch.cuda.device_count(), 1), *arguments, initialise=False, timeout=300):
        assert_starts_equal(found, engines, expected)
