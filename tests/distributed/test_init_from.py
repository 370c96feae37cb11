"""A published model as the start of every engine: before the first step, its loss is the stock model's."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.engines import build_engine
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.model.init_from import load_published
from tests.tiny import RunWorkers, overrides

ENGINES = {"ddp": "training.use_fsdp2=false", "fsdp2": "training.use_fsdp2=true"}


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


def losses(rank: int, size: int, given: list[str], published: Path) -> dict[str, float]:
    """Loss after the start, by engine; and rows of a matched vocabulary, gathered."""
    found = {}
    for name, engine_key in ENGINES.items():
        config = load_config(overrides=[*given, engine_key])
        engine = build_engine(config, World(rank, rank, size, torch.device("cpu")), torch.float32, False)
        tensors = dict(engine.model.canonical_parameters())
        engine.describe_shards(tensors)
        load_published(tensors, config.model.architecture(), published, seed=0)
        engine.model.eval()
        with torch.no_grad():
            found[name] = float(engine.forward_module(**cells()).loss)
        engine.reshard()
        rows = np.where(np.arange(101) % 3 == 0, -1, np.arange(101)[::-1])
        load_published(tensors, config.model.architecture(), published, rows=rows, seed=0)
        for key in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            whole = engine.gather_full(tensors[key].detach())
            assert isinstance(tensors[key], DTensor) is (name == "fsdp2")
            found[f"{key} {name}"] = whole.double().numpy().tobytes()  # type: ignore[assignment]
    return found


def test_loss_equals_the_stock_models_on_every_engine(tmp_path: Path, run_workers: RunWorkers) -> None:
    given = overrides(tmp_path)
    config = load_config(overrides=given)
    torch.manual_seed(1)
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**config.model.architecture())).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        expected = float(stock(**cells()).loss)
    stock.save_pretrained(tmp_path / "published")
    for found in run_workers(losses, 2, given, tmp_path / "published"):
        assert found["ddp"] == pytest.approx(expected, rel=1e-5)
        assert found["fsdp2"] == pytest.approx(expected, rel=1e-5)
        for key in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
            assert found[f"{key} ddp"] == found[f"{key} fsdp2"], "new rows depend on the engine"
