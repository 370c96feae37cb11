"""Checkpoints made to attack, and forged so that their manifest agrees: refused, and nothing of them is executed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from geneformer_pretrain.checkpoint.manifest import describe, read_manifest, write_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError
from tests.checkpoints import save, tensors_of, zeros


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.file),)


def forge_manifest(folder: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = read_manifest(folder)
    manifest["files"] = {name: describe(folder / name) for name in manifest["files"]}
    write_manifest(folder, manifest)


@pytest.mark.parametrize("hidden", [False, True])
def test_malicious_pickles_are_refused(tmp_path: Path, hidden: bool) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=2)
    bomb = Bomb(tmp_path / "executed")
    save(store, 1, "full")
    save(store, 2, "sharded")
    full, metadata = tmp_path / "run/step_1/checkpoint.pt", tmp_path / "run/step_2/.metadata"
    torch.save({**tensors_of(1), "count": bomb} if hidden else bomb, full)
    original = pickle.loads(metadata.read_bytes())
    original.planner_data = bomb
    metadata.write_bytes(pickle.dumps(original if hidden else bomb))
    for step, reason in (
        (1, r"^ValueError: .*checkpoint\.pt holds other things than tensors: refused to unpickle posix.mkdir$"),
        (2, "refused to unpickle posix.mkdir"),
    ):
        folder = tmp_path / "run" / f"step_{step}"
        forge_manifest(folder)
        targets = zeros()
        assert store.find_latest() is not None
        with pytest.raises(CheckpointError, match=reason):
            store.load(folder, targets)
        assert all(not tensor.any() for tensor in targets.values())
    assert not bomb.file.exists()
    pickle.loads(pickle.dumps(bomb))
    assert bomb.file.exists(), "the bomb does not work, so this test shows nothing"


def test_malicious_tensor_data_in_a_sharded_checkpoint_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=2)
    bomb = Bomb(tmp_path / "executed")
    save(store, 1, "sharded")
    folder = tmp_path / "run" / "step_1"
    torch.save(bomb, folder / "__0_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    forge_manifest(folder)
    with pytest.raises(
        CheckpointError, match=r"^ValueError: .*step_1 holds other things than tensors: refused to unpickle posix.mkdir"
    ):
        store.load(folder, zeros())
    assert not bomb.file.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Metadata({"x": BytesStorageMetadata()}), "refused to unpickle .*BytesStorageMetadata"),
        ([1, 2], "holds a list"),
    ],
)
def test_metadata_of_anything_but_tensors_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1, "sharded")
    (tmp_path / "step_1" / ".metadata").write_bytes(pickle.dumps(content))
    forge_manifest(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=reason):
        store.load(tmp_path / "step_1", zeros())


def test_a_checkpoint_with_a_piece_missing_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1, "sharded")
    file = tmp_path / "step_1" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["model.weight"].chunks.clear()
    file.write_bytes(pickle.dumps(metadata))
    forge_manifest(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=r"0 of the 30 elements of model\.weight"):
        store.load(tmp_path / "step_1", zeros())
