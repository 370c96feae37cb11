"""What needs two GPUs."""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def test_gradients_summed_after_a_step_are_those_that_ddp_sums_within(run_torchrun, tmp_path, monkeypatch):
    """Dropout too is the same: it would change losses by 2e-5 and norms by 2e-3."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    common = [
        "--config-name=10m",
        "data.path=sample_data/cells.parquet",
        f"data.cache_dir={tmp_path}/cache",
        "model.num_hidden_layers=2",
        "model.micro_batch_size=8",
        "model.hidden_dropout_prob=0.1",
        "training.gradient_accumulation_steps=2",
        "training.num_train_steps=6",
        "training.warmup_steps=0",
        "training.lr_schedule=constant",
        "training.deterministic=true",
        "training.wandb_init_args=null",
    ]
    found = []
    for graphs in ("true", "false"):
        folder = tmp_path / graphs
        given = [*common, f"training.cuda_graphs={graphs}", f"training.checkpoint_dir={folder}"]
        run_torchrun(given, nproc=2, timeout=300)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append(records)
    assert len(found[0]) == len(found[1]) == 6
    for graphs, wrapped in zip(*found, strict=True):
        assert graphs["loss"] == pytest.approx(wrapped["loss"], rel=1e-6)
        assert graphs["grad_norm"] == pytest.approx(wrapped["grad_norm"], rel=1e-4)
