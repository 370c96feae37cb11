"""Choice of kernels, on machines that are only pretended here."""

import sys
from types import SimpleNamespace

import pytest
import torch

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.kernels import select as kernels
from modeling_bert_te import FlashAttention


class Kernels:
    """Stands for what needs Triton."""


CHOICES = {
    "model.attention_kernel": (kernels.use_triton_attention, kernels.attention),
    "model.fused_kernels": (kernels.use_triton_fused, kernels.fused_kernels),
}


@pytest.fixture
def choose(monkeypatch):
    def choose(kernel, key="model.attention_kernel", capability=(9, 0), dtype=torch.bfloat16, device="cuda", **model):
        pretended = SimpleNamespace(TritonAttention=Kernels, TritonFused=Kernels)
        monkeypatch.setitem(sys.modules, "geneformer_pretrain.kernels.adapters", pretended)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        overrides = [f"{key}={kernel}", *(f"model.{name}={value}" for name, value in model.items())]
        decide, make = CHOICES[key]
        use_triton = decide(load_config("10m", overrides).model, torch.device(device), dtype)
        return type(make(Kernel.triton if use_triton else Kernel.torch))

    return choose


def test_auto_means_triton_only_where_it_was_tuned(choose):
    assert choose("auto") is Kernels
    assert choose("auto", capability=(8, 0)) is FlashAttention
    assert choose("auto", capability=(10, 0)) is FlashAttention
    assert choose("auto", num_attention_heads=2) is FlashAttention  # heads of 128
    assert choose("auto", dtype=torch.float32) is FlashAttention
    assert choose("auto", device="cpu") is FlashAttention
    assert choose("auto", micro_batch_size=1365) is Kernels  # x 2048 tokens x 3 x 256 < 2**31
    assert choose("auto", micro_batch_size=1366) is FlashAttention


def test_auto_means_the_fused_kernels_on_hopper(choose):
    key = "model.fused_kernels"
    assert choose("auto", key) is Kernels
    assert choose("torch", key) is type(None)
    assert choose("auto", key, capability=(8, 0)) is type(None)
    assert choose("auto", key, dtype=torch.float32) is type(None)
    assert choose("auto", key, device="cpu") is type(None)
    assert choose("auto", key, hidden_size=8192, num_attention_heads=128) is type(None)
    assert choose("auto", key, vocab_size=100_000) is type(None)
    assert choose("auto", key, intermediate_size=516) is type(None)


def test_an_explicit_choice_is_kept(choose):
    assert choose("torch") is FlashAttention
    assert choose("triton", capability=(10, 0)) is Kernels
    assert choose("triton", num_attention_heads=2) is Kernels


@pytest.mark.parametrize(
    ("key", "machine", "reason"),
    [
        ("model.attention_kernel", {"device": "cpu"}, "a GPU"),
        ("model.attention_kernel", {"dtype": torch.float32}, "training.compute_dtype=bfloat16"),
        ("model.attention_kernel", {"capability": (8, 0)}, "compute capability 9.0"),
        ("model.attention_kernel", {"num_attention_heads": 1}, "head sizes 16, 32, 64 and 128, not 256"),
        ("model.attention_kernel", {"micro_batch_size": 2000}, "up to 2,796,202 tokens, not 4,096,000"),
        ("model.fused_kernels", {"micro_batch_size": 5000}, "up to 8,388,607 tokens, not 10,240,000"),
        ("model.fused_kernels", {"device": "cpu"}, "a GPU"),
        ("model.fused_kernels", {"capability": (8, 0)}, "compute capability 9.0"),
        ("model.fused_kernels", {"capability": (12, 0)}, "compute capability 9 or 10"),
        ("model.fused_kernels", {"hidden_size": 8192}, "model.hidden_size up to 4,096, not 8,192"),
        ("model.fused_kernels", {"vocab_size": 100_000}, "model.vocab_size up to 65,536, not 100,000"),
        ("model.fused_kernels", {"intermediate_size": 516}, "multiples of 8 as model.intermediate_size, not 516"),
    ],
)
def test_kernels_that_cannot_run_are_refused(choose, key, machine, reason):
    with pytest.raises(ConfigError, match=f"{key}=triton .*{reason}.*set {key}=torch"):
        choose("triton", key, **machine)


HEADS_OF_20 = {"hidden_size": 80, "num_attention_heads": 4}
HEADS_OF_264 = {"hidden_size": 1056, "num_attention_heads": 4}


@pytest.mark.parametrize(("model", "size"), [(HEADS_OF_20, 20), (HEADS_OF_264, 264)])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_head_sizes_that_flash_attention_refuses_are_found_at_the_start(choose, model, size, kernel):
    with pytest.raises(ConfigError, match=f"make heads of size {size}; .* needs multiples of 8 up to 256"):
        choose(kernel, **model)
    assert choose(kernel, dtype=torch.float32, **model) is FlashAttention
    assert choose(kernel, device="cpu", **model) is FlashAttention


def test_head_sizes_up_to_256_run(choose):
    assert choose("torch", hidden_size=1024, num_attention_heads=4) is FlashAttention
    assert choose("auto", hidden_size=96, num_attention_heads=4) is FlashAttention


@pytest.mark.parametrize(
    ("kernel", "capability", "width", "reason"),
    [
        ("auto", (9, 0), 512, None),
        ("auto", (10, 0), 512, None),
        ("triton", (9, 0), 512, None),
        ("torch", (9, 0), 512, "needs model.fused_kernels=auto or triton"),
        ("auto", (8, 9), 512, "needs compute capability 9.0"),
        ("auto", (9, 0), 520, "supports multiples of 16 as model.intermediate_size, not 520"),
    ],
)
def test_fp8_of_pytorch_layers_uses_the_fused_kernels_or_says_why_not(monkeypatch, kernel, capability, width, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = load_config("10m", [f"model.fused_kernels={kernel}", f"model.intermediate_size={width}"]).model
    if reason is None:
        assert kernels.use_triton_fused(model, torch.device("cuda"), torch.bfloat16, fp8=True)
    else:
        with pytest.raises(ConfigError, match=rf"use_fp8=true with PyTorch layers {reason}.*model\.use_te_layers=true"):
            kernels.use_triton_fused(model, torch.device("cuda"), torch.bfloat16, fp8=True)


def test_fp8_of_pytorch_layers_limits_the_tokens_to_three_widths(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fits, too_large = (load_config("10m", [f"model.micro_batch_size={cells}"]).model for cells in (1365, 1366))
    assert kernels.use_triton_fused(too_large, torch.device("cuda"), torch.bfloat16)
    assert kernels.use_triton_fused(fits, torch.device("cuda"), torch.bfloat16, fp8=True)
    with pytest.raises(ConfigError, match="supports micro-batches up to 2,796,202 tokens, not 2,797,568"):
        kernels.use_triton_fused(too_large, torch.device("cuda"), torch.bfloat16, fp8=True)
