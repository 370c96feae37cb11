"""Megatron-FSDP's experimental interface as the engine uses it."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from geneformer_pretrain.distributed.engines import _nvfsdp, nvfsdp_sharding
from geneformer_pretrain.distributed.world import distributed_world
from tests.gpu.test_model_gpu import gradients, our_model, pack, relative_error, stock_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
parameter_group = pytest.importorskip("megatron_fsdp.experimental.parameter_group")
dbuffer = pytest.importorskip("megatron_fsdp.experimental.dbuffer")


def test_gradients_of_replicas_last_until_they_are_reduced(monkeypatch):
    """On a slow network, the backward has the time to reuse memory that is given back too early."""
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
        shard = nvfsdp_sharding(init_device_mesh("cuda", (1, 1), mesh_dim_names=("replicate", "shard")))
        model = our_model(stock, compile_blocks=False)
        for layer in model.bert.encoder.layer:
            shard(layer)
        engine = _nvfsdp(model, shard, world)
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
                if expected[name].norm() > 1e-4 * largest:  # of key biases, only rounding is left
                    assert relative_error(gradient, expected[name]) < 0.01, name
