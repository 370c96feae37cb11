"""Which attention kernel a run gets, on machines that are only pretended here."""

import pytest
import torch

from geneformer_pretrain import attention
from geneformer_pretrain.config import ConfigError, load_config
from modeling_bert_te import FlashAttention


class Kernels:
    """Stands for TritonAttention, which needs Triton."""


@pytest.fixture
def choose(monkeypatch):
    def choose(kernel, capability=(9, 0), dtype=torch.bfloat16, heads=4, device="cuda"):
        monkeypatch.setattr(attention, "TritonAttention", Kernels)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        overrides = [f"model.attention_kernel={kernel}", f"model.num_attention_heads={heads}"]
        return type(attention.choose_attention(load_config("10m", overrides), torch.device(device), dtype))

    return choose


def test_auto_takes_triton_only_where_it_was_tuned(choose):
    assert choose("auto") is Kernels
    assert choose("auto", capability=(8, 0)) is FlashAttention
    assert choose("auto", capability=(10, 0)) is FlashAttention
    assert choose("auto", heads=2) is FlashAttention  # heads of 128
    assert choose("auto", dtype=torch.float32) is FlashAttention
    assert choose("auto", device="cpu") is FlashAttention


def test_what_is_asked_for_is_taken(choose):
    assert choose("torch") is FlashAttention
    assert choose("triton", capability=(8, 0)) is Kernels
    assert choose("triton", heads=2) is Kernels


@pytest.mark.parametrize(
    ("machine", "obstacle"),
    [
        ({"device": "cpu"}, "a GPU"),
        ({"dtype": torch.float32}, "training.compute_dtype=bfloat16"),
        ({"capability": (7, 5)}, "compute capability 8.0"),
        ({"heads": 1}, "head sizes 16, 32, 64 and 128, not 256"),
    ],
)
def test_what_cannot_run_is_refused(choose, machine, obstacle):
    with pytest.raises(
        ConfigError, match=f"model.attention_kernel=triton .*{obstacle}.*set model.attention_kernel=torch"
    ):
        choose("triton", **machine)
