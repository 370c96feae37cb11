"""A published model as the start of every engine: before the first step, its loss is the stock model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.engines import make_engine, sharding
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.model.build import build_model
from geneformer_pretrain.model.init_from import BIAS, WORDS, load_published
from geneformer_pretrain.model.resolve import resolve_on_all_ranks
from tests.tiny import RunWorkers, overrides

ENGINES = {
    "ddp": "training.use_fsdp2=false",
    "fsdp2": "training.use_fsdp2=true",
    "nvfsdp": "training.use_nvfsdp=true",
}


def cells() -> dict[str, Tensor]:
    """Padded cells of several lengths, 15% of whose tokens are masked."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 101, (6, 30), generator=generator)
    lengths = torch.randint(5, 31, (6, 1), generator=generator)
    valid = torch.arange(30) < lengths
    masked = (torch.rand(ids.shape, generator=generator) < 0.15) & valid
    return {
        "input_ids": torch.where(masked, 1, ids) * valid,
        "attention_mask": valid.long(),
        "labels": torch.where(masked, ids, -100),
    }


def losses(world: World, engines: list[str], given: list[str], published: Path) -> dict[str, Any]:
    """Loss after the start, by engine; and the rows of a matched vocabulary, whole."""
    found: dict[str, Any] = {}
    batch = {name: tensor.to(world.device) for name, tensor in cells().items()}
    for name in engines:
        config = load_config(overrides=[*given, ENGINES[name]])
        resolved = resolve_on_all_ranks(config, world, Ranks())
        shard = sharding(config, world, resolved, torch.float32)
        model = build_model(config, resolved, world.device, torch.float32, shard)
        engine = make_engine(model, shard, config, world, resolved)
        tensors = {key: parameter.detach() for key, parameter in model.canonical_parameters()}
        engine.prepare_for_checkpoint(tensors)
        load_published(tensors, config.model.architecture(), published, seed=0)
        engine.model.eval()
        with torch.no_grad():
            found[name] = float(engine.forward_module(**batch).loss)
        engine.reshard()
        rows = np.where(np.arange(101) % 3 == 0, -1, np.arange(101)[::-1])
        load_published(tensors, config.model.architecture(), published, rows=rows, seed=0)
        for key in (WORDS, BIAS):
            found[f"{key} {name}"] = engine.gather_full(tensors[key]).cpu().numpy().tobytes()
    return found


def assert_starts_equal(found: dict[str, Any], engines: list[str], expected: float) -> None:
    for name in engines:
        assert found[name] == pytest.approx(expected, rel=1e-5)
        for key in (WORDS, BIAS):
            assert found[f"{key} {name}"] == found[f"{key} {engines[0]}"], "new rows depend on the engine"


def save_stock_model(folder: Path, given: list[str]) -> float:
    """Save a stock model, none of whose parameters has its initial value; return its loss on the cells."""
    config = load_config(overrides=given)
    torch.manual_seed(1)
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**config.model.architecture())).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        stock.save_pretrained(folder)
        return float(stock(**cells()).loss)


def on_cpu(rank: int, size: int, *arguments: Any) -> dict[str, Any]:
    return losses(World(rank, rank, size, torch.device("cpu")), *arguments)


def test_loss_equals_the_stock_models_on_every_engine(tmp_path: Path, run_workers: RunWorkers) -> None:
    given, engines = overrides(tmp_path), ["ddp", "fsdp2"]
    expected = save_stock_model(tmp_path / "published", given)
    for found in run_workers(on_cpu, 2, engines, given, tmp_path / "published"):
        assert_starts_equal(found, engines, expected)
