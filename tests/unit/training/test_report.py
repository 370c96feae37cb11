"""What a run says of a GPU at its start."""

from types import SimpleNamespace

import pytest
import torch

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.model.resolve import resolve
from geneformer_pretrain.training.report import _on_gpu


@pytest.mark.parametrize(
    ("capability", "overrides", "is_said"),
    [
        ((9, 0), [], False),
        ((10, 0), [], True),
        ((10, 0), ["training.use_fp8=false"], False),
        ((10, 0), ["model.use_te_layers=true"], False),
    ],
)
def test_kernels_that_never_ran_on_a_gpu_are_said_to(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], overrides: list[str], is_said: bool
) -> None:
    gpu = SimpleNamespace(total_memory=180 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    config, device = load_config("4b", overrides), torch.device("cuda")
    run = SimpleNamespace(resolved=resolve(config, World(0, 0, 1, device)), config=config, device=device)
    said = "\n".join(_on_gpu(run))  # type: ignore[arg-type]
    assert "of 180.0 GiB a GPU" in said
    assert ("never ran on such a GPU: compare losses with training.use_fp8=false" in said) is is_said
