"""Every `auto` on machines that are only pretended here, and ranks that decide differently."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.training import ComputeDtype
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model.resolve import resolve, resolve_on_all_ranks

CPU = World(0, 0, 1, torch.device("cpu"))
GPU = World(0, 0, 1, torch.device("cuda"))


@pytest.fixture
def gpu(monkeypatch):
    def pretend(capability, gib=80):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return pretend


def test_on_a_cpu():
    found = resolve(load_config("10m"), CPU)
    assert (found.compute_dtype, found.itemsize) == (ComputeDtype.float32, 4)
    assert not found.compile
    assert not found.cuda_graphs
    assert found.attention_kernel is found.fused_kernels is Kernel.torch
    assert (found.device, found.cuda, found.triton) == ("cpu", "none", "none")


def test_on_a_hopper_gpu(gpu):
    gpu((9, 0))
    found = resolve(load_config("10m"), GPU)
    assert (found.compute_dtype, found.itemsize) == (ComputeDtype.bfloat16, 2)
    assert found.compile
    assert found.cuda_graphs
    assert found.attention_kernel is found.fused_kernels is Kernel.triton
    assert found.device == "Some GPU"
    assert not resolve(load_config("10m", ["data.packing=false"]), GPU).compile


def test_a_gpu_without_bfloat16_gets_a_plain_answer(gpu):
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"Some GPU has no BF16 matrix units; set training\.compute_dtype=float32"):
        resolve(load_config("10m"), GPU)
    assert resolve(load_config("10m", ["training.compute_dtype=float32"]), GPU).compute_dtype is ComputeDtype.float32


def decide_as(monkeypatch, *choices):
    """Let ranks decide for these; this process is the last of them."""
    ranks = Ranks()
    ranks.size = len(choices)
    monkeypatch.setattr(ranks, "run_on_all_ranks", lambda action, error: list(choices))
    monkeypatch.setattr(ranks, "gather", lambda values: [replace(c, device="").values() for c in choices])
    world = World(len(choices) - 1, 0, len(choices), torch.device("cpu"))
    return resolve_on_all_ranks(load_config("10m"), world, ranks)


def make(**changes) -> Resolved:
    return replace(resolve(load_config("10m"), CPU), **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_kernel", Kernel.triton),
        ("fused_kernels", Kernel.triton),
        ("compute_dtype", ComputeDtype.bfloat16),
        ("cuda_graphs", True),
    ],
)
def test_ranks_that_decide_differently_are_refused(monkeypatch, name, value):
    """Kernels and dtype decide the stream of dropout."""
    with pytest.raises(ConfigError, match=f"{name} is .* on rank 0, .* on rank 1"):
        decide_as(monkeypatch, make(), make(**{name: value}))


def test_different_gpus_are_logged_and_may_train_together(monkeypatch, caplog):
    monkeypatch.setattr(World, "is_main", True)
    found = decide_as(monkeypatch, make(device="NVIDIA H100"), make(device="NVIDIA H200"))
    assert found.device == "NVIDIA H200"
    assert "the ranks have different GPUs: NVIDIA H100, NVIDIA H200" in caplog.text


def test_the_smallest_gpu_decides_about_resharding(monkeypatch):
    ranks = (make(reshard_after_forward=True), make(reshard_after_forward=False))
    monkeypatch.setattr(Ranks, "require_equal", lambda *_: None)
    assert decide_as(monkeypatch, *ranks).reshard_after_forward
