"""nvFSDP on the GPUs there are: megatron-fsdp's experimental interface as the engine uses it."""

import functools
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.engines import _nvfsdp
from geneformer_pretrain.distributed.world import distributed_world
from geneformer_pretrain.training.trainer import Trainer
from tests.gpu.test_engines_gpu import COMMON, FP8, FSDP2, NVFSDP, TE
from tests.gpu.test_model_gpu import gradients, our_model, pack, relative_error, stock_model
from tests.tiny import RunWorkers, read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
parameter_group = pytest.importorskip("megatron_fsdp.experimental.parameter_group")
dbuffer = pytest.importorskip("megatron_fsdp.experimental.dbuffer")

KEPT, AGAIN = "training.reshard_after_forward=false", "training.reshard_after_forward=true"


@pytest.mark.parametrize("reshards", [True, False])
def test_gradients_of_replicas_last_until_they_are_reduced(monkeypatch, reshards):
    """On a slow network, the backward has the time to reuse memory that is given back too early."""
    from geneformer_pretrain.distributed.nvfsdp import make_sharding

    stock = stock_model()
    packed, _ = pack([1024, 900, 1, 700, 30], seed=5)
    alone = our_model(stock, compile_blocks=False)
    alone(**packed).loss.backward()
    expected = gradients(alone)
    backward_stream = torch.cuda.current_stream()
    allreduce, reduce = dbuffer.DBuffer.allreduce, parameter_group.FsdpParameterGroup.reduce_partial_gradients

    def allreduce_late(*args, **kwargs):
        torch.cuda._sleep(20_000_000)  # cycles, 10 ms, of the stream that reduces
        return allreduce(*args, **kwargs)

    def reduce_and_reuse(group, *args):
        size = group.main_grad.local_buffer.numel()
        reduce(group, *args)
        with torch.cuda.stream(backward_stream):
            torch.full((size,), float("nan"), device="cuda")

    monkeypatch.setattr(dbuffer.DBuffer, "allreduce", allreduce_late)
    monkeypatch.setattr(parameter_group.FsdpParameterGroup, "reduce_partial_gradients", reduce_and_reuse)
    with distributed_world() as world:
        mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("replicate", "shard"))
        shard = make_sharding(mesh, torch.bfloat16, reshards)
        model = our_model(stock, compile_blocks=False)
        for layer in model.bert.encoder.layer:
            shard(layer)
        engine = _nvfsdp(model, shard, world)
        engine.require_pushed()
        for micro_batches in (1, 2, 1):
            for number in range(micro_batches):
                with engine.accumulation_context(number == micro_batches - 1):
                    loss, *_ = engine.forward_module(**packed, return_dict=False)
                    loss.backward()
            found = {name: engine.gather_full(p.grad) / micro_batches for name, p in model.named_parameters()}
            model.zero_grad()
            assert found.keys() == expected.keys()
            largest = max(gradient.norm() for gradient in expected.values())
            for name, gradient in found.items():
                assert gradient.dtype == torch.float32
                if expected[name].norm() > 1e-4 * largest:  # of key biases, only rounding is left
                    assert relative_error(gradient, expected[name]) < 0.01, name


def train(rank: int, size: int, runs: list[list[str]]) -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        importlib.import_module("transformer_engine.pytorch")  # before another cuDNN than its own is loaded
    with distributed_world() as world:
        for given in runs:
            torch._dynamo.reset()
            assert Trainer(load_config("10m", given), world).fit()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layers", [[], [TE], FP8], ids=["pytorch", "te-bf16", "te-fp8"])
def test_losses_are_those_of_fsdp2(tmp_path: Path, run_workers: RunWorkers, layers: list[str]) -> None:
    """Both compute with main weights in BF16 and sum gradients in FP32. Under FSDP2, FP8 weights are made twice."""
    if layers:
        pytest.importorskip("transformer_engine.pytorch")
    steps = "training.num_train_steps=8"
    common = [
        *COMMON,
        *layers,
        f"data.cache_dir={tmp_path}/cache",
        "training.gradient_accumulation_steps=2",
        "training.validate_every_n_steps=4",
        "training.save_every_n_steps=4",
    ]
    engines = {"fsdp2": [FSDP2, KEPT], "again": [NVFSDP, AGAIN], "kept": [NVFSDP, KEPT]}
    runs = [[*common, *engine, steps, f"training.checkpoint_dir={tmp_path / n}"] for n, engine in engines.items()]
    # From FSDP2's checkpoint of step 4.
    into = f"training.checkpoint_dir={tmp_path / 'resumed'}"
    runs += [[*common, FSDP2, "training.num_train_steps=4", into], [*common, NVFSDP, KEPT, steps, into]]
    size = max(torch.cuda.device_count(), 1)
    functools.partial(run_workers, initialise=False, timeout=600)(train, size, runs)

    expected = read_metrics(tmp_path / "fsdp2")
    assert len(expected) == 8
    for name in ("again", "kept", "resumed"):
        for found, wanted in zip(read_metrics(tmp_path / name), expected, strict=True):
            for key, tolerance in (("loss", 1e-4), ("grad_norm", 5e-3), ("validation_loss", 1e-4)):
                if key in wanted:
                    rel = 50 * tolerance if layers is FP8 else tolerance
                    assert found[key] == pytest.approx(wanted[key], rel=rel), (name, key, wanted["step"])
