"""Small states to save in checkpoints, and what must be there when they are read again."""

from pathlib import Path

import torch

from geneformer_pretrain.checkpoint.manifest import read_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore

FORMATS = ("full", "sharded")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Tensors of several shapes and types, different for each step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(6, 5, generator=generator),
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(float(step)),
        "rng.cpu": torch.randint(0, 256, (16,), generator=generator, dtype=torch.uint8),
        "count": torch.tensor([step]),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def assert_holds(store: CheckpointStore, step: int) -> None:
    path = store.find_latest()
    assert path is not None
    assert path.name == f"step_{step}"
    assert read_manifest(path)["state"] == {"position": step}
    targets = zeros()
    store.load(path, targets)
    assert_equal(targets, tensors_of(step))


def save(store: CheckpointStore, step: int, format: str = "full", blocking: bool = True) -> None:
    store.save(step, tensors_of(step), {"position": step}, format, blocking=blocking)


def save_and_wait(store: CheckpointStore, step: int, format: str, blocking: bool) -> None:
    save(store, step, format, blocking)
    store.wait()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
