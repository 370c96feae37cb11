"""Engines, precisions and layers on the GPUs there are: each goes on from the checkpoint of another, and exports."""

import functools
import importlib
import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.batch import build_batches
from geneformer_pretrain.distributed.world import distributed_world
from geneformer_pretrain.training.trainer import Trainer
from tests.tiny import RunWorkers, read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

STEPS = 4
COMMON = [
    "data.path=sample_data/cells.parquet",
    "data.validation_path=sample_data/cells.parquet",
    "data.validation_packs=2",
    "model.num_hidden_layers=2",
    "model.micro_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.warmup_steps=0",
    "training.lr_schedule=constant",
    "training.learning_rate=3e-4",  # at 1e-3 rounding alone moves single steps by 0.1 after 40 of them
    "training.wandb_init_args=null",
    "training.hang_timeout_seconds=0",
]
FSDP2, NVFSDP, TE = "training.use_fsdp2=true", "training.use_nvfsdp=true", "model.use_te_layers=true"
KERNELS_FP8 = "training.use_fp8=true"
FP8 = [TE, KERNELS_FP8]
CURRENT, BLOCK = "training.fp8_recipe=current", "training.fp8_recipe=block"
LINKS = {
    "bf16": [[], [FSDP2], [NVFSDP], ["training.cuda_graphs=false"], [TE], [FSDP2, TE], [NVFSDP, TE]],
    "fp8": [
        *[
            [KERNELS_FP8],
            FP8,
            [FSDP2, KERNELS_FP8],
            [FSDP2, *FP8],
            [NVFSDP, *FP8],
            [NVFSDP, KERNELS_FP8],
            [*FP8, CURRENT],
            [FSDP2, *FP8, CURRENT],
        ],
        [NVFSDP, *FP8, CURRENT],
        *[[*FP8, BLOCK], [FSDP2, *FP8, BLOCK], [NVFSDP, *FP8, BLOCK]],
    ],
}
LINKS_OF_GROUPS = {
    "bf16": [[FSDP2], [NVFSDP], [FSDP2, TE]],
    "fp8": [[FSDP2, *FP8], [FSDP2, KERNELS_FP8], [NVFSDP, *FP8]],
}


def sizes() -> list[int]:
    """Numbers of ranks to run: with two GPUs also two on each, which NCCL takes for two nodes of two GPUs."""
    count = torch.cuda.device_count()
    return [count, 4] if count == 2 else [max(count, 1)]


def train(rank: int, size: int, folder: Path, links: list[list[str]], steps: int, given: list[str]) -> list[float]:
    """Train `steps` more with each link; return by how much its export's loss in stock BERT differs from its own."""
    if importlib.util.find_spec("transformer_engine") is not None:
        importlib.import_module("transformer_engine.pytorch")  # before another cuDNN than its own is loaded
    count = torch.cuda.device_count() or size
    os.environ["LOCAL_RANK"] = str(rank % count)
    if size > count:
        os.environ.update(NCCL_HOSTID=f"node{rank // count}", NCCL_SOCKET_IFNAME="lo")
    with distributed_world() as world:
        differences = []
        for link in links:
            torch._dynamo.reset()
            done = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
            end = f"training.num_train_steps={done + steps}"
            trainer = Trainer(load_config("10m", [*given, *link, f"training.checkpoint_dir={folder}", end]), world)
            assert trainer.fit()
            if rank == 0:
                validation_loss = read_metrics(folder)[-1]["validation_loss"]
                differences.append(stock_loss(trainer, folder / "final_model") - validation_loss)
        return differences


@torch.no_grad()
def stock_loss(trainer: Trainer, export: Path) -> float:
    """Loss of an export in stock BERT and float32, cell by cell, on the packs of the trainer's validation."""
    stock = transformers.BertForMaskedLM.from_pretrained(export).to(trainer.world.device).eval()
    data = trainer.validation.data
    total, masked = 0.0, 0
    for batch in build_batches(data.builder(), data.stream(), range(2)):
        parts = batch.to(trainer.world.device).parts
        ids, index = parts.input_ids.long(), parts.masked_index[: batch.num_masked]
        labels = torch.full_like(ids, -100)
        labels[index] = parts.labels[: batch.num_masked].long()
        for start, end in itertools.pairwise(parts.cu_seqlens.unique().tolist()):
            if (labels[start:end] != -100).any():
                logits = stock(ids[None, start:end]).logits[0]
                total += F.cross_entropy(logits, labels[start:end], reduction="sum").item()
        masked += batch.num_masked
    return total / masked


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("size", sizes())
@pytest.mark.parametrize("precision", LINKS)
def test_each_goes_on_from_another(tmp_path: Path, run_workers: RunWorkers, precision: str, size: int) -> None:
    """The losses are those of DDP in BF16 without an interruption, but for rounding; dropout is the same."""
    if precision == "fp8":
        pytest.importorskip("transformer_engine.pytorch")
    links = list(LINKS[precision])
    if size > 1:
        groups = f"training.shard_group_size={size // 2}"
        links += [[*link, groups] for link in LINKS_OF_GROUPS[precision]]
    if importlib.util.find_spec("megatron_fsdp") is None:
        links = [link for link in links if NVFSDP not in link]
    given = [*COMMON, f"data.cache_dir={tmp_path}/cache"]
    ours, expected = tmp_path / "chain", tmp_path / "uninterrupted"
    run = functools.partial(run_workers, initialise=False, timeout=400)
    differences = run(train, size, ours, links, STEPS, given)[0]
    differences += run(train, 1, ours, links[1:2], STEPS, given)[0]
    run(train, size, expected, [[]], STEPS * (len(links) + 1), given)

    tolerance = 0.01 if precision == "bf16" else 0.02
    assert len(differences) == len(links) + 1
    assert differences == pytest.approx([0.0] * len(differences), abs=tolerance)
    losses, expected_losses = ([record["loss"] for record in read_metrics(folder)] for folder in (ours, expected))
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert losses[-1] < losses[0] - 0.5
