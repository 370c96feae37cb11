"""The training loop on a GPU: no synchronisation, no recompilation, bitwise repeatable when asked to be."""

import gc
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.batch import build_batches
from geneformer_pretrain.distributed.world import distributed_world
from geneformer_pretrain.training import outliers
from geneformer_pretrain.training import step as step_module
from geneformer_pretrain.training.trainer import Trainer
from geneformer_pretrain.training.validation import score
from tests.checkpoints import read_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture
def overrides(tmp_path):
    rng = np.random.default_rng(0)
    cells = [rng.permutation(np.arange(2, 25426))[:n].tolist() for n in rng.integers(5, 400, 300)]
    pq.write_table(pa.table({"input_ids": cells}), tmp_path / "cells.parquet")
    return [
        f"data.path={tmp_path}/cells.parquet",
        f"data.cache_dir={tmp_path}/cache",
        f"training.checkpoint_dir={tmp_path}/run",
        "training.wandb_init_args=null",
        "training.lr_schedule=constant",
        "model.seq_length=256",
        "model.micro_batch_size=16",
        "model.num_hidden_layers=2",
        "training.gradient_accumulation_steps=2",
    ]


ENGINES = {
    "graphs": "training.cuda_graphs=true",
    "ddp": "training.cuda_graphs=false",
    "fsdp2": "training.use_fsdp2=true",
}
PRECISIONS = {"bf16": "training.use_fp8=false", "fp8": "training.use_fp8=true"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_neither_synchronise_nor_recompile(overrides, engine, precision):
    """Nor do they where outliers are looked for."""
    torch._dynamo.reset()
    given = [*overrides, ENGINES[engine], PRECISIONS[precision], "training.skip_outlier_steps=6"]
    with distributed_world() as world:
        trainer = Trainer(load_config("10m", given), world)
        with trainer.loader() as loader:
            for step in range(3):
                trainer.step.run(loader, step)
            torch.cuda.synchronize()
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    for step in range(3, 23):
                        trainer.step.run(loader, step)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ENGINES)
def test_validation_does_not_synchronise_between_micro_batches(overrides, tmp_path, engine):
    torch._dynamo.reset()
    given = [f"data.validation_path={tmp_path}/cells.parquet", "data.validation_cells=200", ENGINES[engine]]
    with distributed_world() as world:
        trainer = Trainer(load_config("10m", [*overrides, *given]), world)
        found = [trainer.validate(), trainer.validate()]
        assert found[0] == found[1]
        validation = trainer.validation
        trainer.step.engine.model.eval()
        with torch.no_grad():
            torch.cuda.set_sync_debug_mode("error")
            try:
                scores = [
                    score(trainer.step, batch)[0]
                    for batch in build_batches(validation.builder, validation.stream, range(validation.num_packs))
                ]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        loss_sum, _, masked = torch.cat(scores).sum(0).tolist()
        assert found[0]["validation_masked_tokens"] == masked > 1000
        assert found[0]["validation_loss"] == pytest.approx(loss_sum / masked, rel=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_outlier_is_skipped_on_the_device(overrides, tmp_path, engine, monkeypatch):
    """The gradients of step 8 are a thousand times too large; checkpoints around it are the same."""
    calls, original = itertools.count(1), step_module.clip_and_step

    def clip_and_step(optimizer, scale, *more):
        return original(optimizer, scale * (1000.0 if next(calls) == 8 else 1.0), *more)

    monkeypatch.setattr(outliers, "HISTORY", 5)
    monkeypatch.setattr(step_module, "clip_and_step", clip_and_step)
    settings = ["training.skip_outlier_steps=6", "training.save_every_n_steps=1", "training.keep_last_n=9"]
    fit([*overrides, *settings, ENGINES[engine]], 9)
    assert [record["outlier_steps"] for record in records(tmp_path / "run")] == [0] * 7 + [1, 1]
    before, after, later = (read_checkpoint(tmp_path / f"run/step_{step}") for step in (7, 8, 9))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in later)


def fit(overrides, steps):
    torch._dynamo.reset()
    with distributed_world() as world:
        config = load_config("10m", [*overrides, f"training.num_train_steps={steps}"])
        assert Trainer(config, world).fit()


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in records(folder)]


@pytest.mark.parametrize(("kernel", "precision"), [("torch", "bf16"), ("triton", "bf16"), ("triton", "fp8")])
def test_deterministic_runs_and_resumptions_are_bitwise_equal(overrides, tmp_path, kernel, precision, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    common = [*overrides, "training.deterministic=true"]
    common += [f"model.attention_kernel={kernel}", f"model.fused_kernels={kernel}", PRECISIONS[precision]]
    try:
        fit([*common, f"training.checkpoint_dir={tmp_path}/a"], 8)
        fit([*common, f"training.checkpoint_dir={tmp_path}/b"], 5)
        fit([*common, f"training.checkpoint_dir={tmp_path}/b"], 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "final_model" / "model.safetensors") for name in "ab")
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graphs_change_no_bit(overrides, tmp_path, monkeypatch, precision):
    """With dropout, several micro-batches a step, and validation in between."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dropout = ["model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
    held_out = [f"data.validation_path={tmp_path}/cells.parquet", "training.validate_every_n_steps=3"]
    common = [*overrides, *dropout, *held_out, "training.gradient_accumulation_steps=3", "data.validation_packs=2"]
    common += [PRECISIONS[precision]]
    try:
        for graphs in ("true", "false"):
            folder = f"training.checkpoint_dir={tmp_path}/{graphs}"
            fit([*common, folder, f"training.cuda_graphs={graphs}", "training.deterministic=true"], 7)
    finally:
        torch.use_deterministic_algorithms(False)
    for key in ("loss", "grad_norm", "masked_tokens", "validation_loss"):
        values = [[r.get(key) for r in records(tmp_path / graphs)] for graphs in ("true", "false")]
        assert values[0] == values[1], key


TE = ["model.use_te_layers=true"]
LAYERS = {"torch": [], "fp8": ["training.use_fp8=true"], "te": TE, "te-fp8": [*TE, "training.use_fp8=true"]}


@pytest.mark.parametrize("layers", LAYERS)
def test_recomputing_changes_memory_and_nothing_else(overrides, tmp_path, layers):
    if layers.startswith("te"):
        pytest.importorskip("transformer_engine.pytorch")
    dropout = ["model.hidden_dropout_prob=0.3", "model.attention_probs_dropout_prob=0.3"]
    common = [*overrides, *LAYERS[layers], *dropout, "model.num_hidden_layers=6", "model.micro_batch_size=64"]
    peaks = []
    for every in (0, 1):
        gc.collect()  # Runs before this one may have left tensors behind.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        folder = tmp_path / str(every)
        fit([*common, f"training.recompute_every_n_layers={every}", f"training.checkpoint_dir={folder}"], 5)
        peaks.append(records(folder)[-1]["peak_memory_gib"])
    # Other dropout in the second forward would change gradients, by more than rounding does.
    kept, recomputed = (records(tmp_path / every) for every in "01")
    for key, tolerance in (("loss", 1e-3), ("grad_norm", 0.02)):
        assert [r[key] for r in recomputed] == pytest.approx([r[key] for r in kept], rel=tolerance), key
    assert peaks[1] < 0.8 * peaks[0]
