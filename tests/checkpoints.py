"""Small states to save in checkpoints, what must be there when they are read again, and forged manifests."""

from pathlib import Path

import torch

from geneformer_pretrain.checkpoint.formats import open_tensors
from geneformer_pretrain.checkpoint.manifest import file_checksum, read_manifest, write_manifest
from geneformer_pretrain.checkpoint.shards import Shards
from geneformer_pretrain.checkpoint.store import CheckpointStore

FILE = "rank_0.safetensors"
"""File of tensors in a checkpoint of one process."""


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Tensors of several shapes and types, different for each step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(6, 5, generator=generator),
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "fp8.scale": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "optimizer.step": torch.tensor(float(step)),
        "rng.cpu": torch.randint(0, 256, (16,), generator=generator, dtype=torch.uint8),
        "count": torch.tensor([step]),
        "empty": torch.zeros(0, 3),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        torch.testing.assert_close(got[name].double(), expected[name].double(), rtol=0, atol=0)


def untouched(targets: dict[str, torch.Tensor]) -> bool:
    """True if all tensors are still zero."""
    return not any(tensor.double().any() for tensor in targets.values())


def assert_holds(store: CheckpointStore, step: int) -> None:
    path = store.find_latest()
    assert path is not None
    assert path.name == f"step_{step}"
    assert read_manifest(path)["state"] == {"position": step}
    targets = zeros()
    store.load(path, targets)
    assert_equal(targets, tensors_of(step))


def save(store: CheckpointStore, step: int, *, blocking: bool = True, protected: tuple[int, ...] = ()) -> None:
    store.save(step, tensors_of(step), {"position": step}, protected=protected, blocking=blocking)


def save_and_wait(store: CheckpointStore, step: int, blocking: bool) -> None:
    save(store, step, blocking=blocking)
    store.wait()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    tensors = {}
    for name, stored in open_tensors(folder, read_manifest(folder)).items():
        tensors[name] = torch.zeros(stored.info.shape, dtype=stored.info.dtype)
        stored.copy_to(name, Shards.of(name, tensors[name]))
    return tensors


def forge_manifest(folder: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = read_manifest(folder)
    if manifest["format_version"] == 1:
        del manifest["format_version"]
    manifest["files"] = {name: file_checksum(folder / name) for name in manifest["files"]}
    write_manifest(folder, manifest)
