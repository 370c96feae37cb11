"""Checkpoints made to attack, and forged so that their manifest agrees: refused, and nothing in them is executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError
from tests.checkpoints import FILE, forge_manifest, read_checkpoint, save, tensors_of, untouched, zeros

OLD = Path(__file__).parents[2] / "data/checkpoints_0_1"


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.file),)


# Format 2


def entry(**changes: Any) -> dict[str, Any]:
    """Index of a checkpoint's tensors, with one entry changed."""
    index = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "pieces": {name: [0] * tensor.ndim},
        }
        for name, tensor in tensors_of(1).items()
    }
    index["model.weight"] |= changes
    return index


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (entry(pieces={}), r"0 of the 30 elements of model\.weight"),
        (entry(pieces={"model.weight": [1, 0]}), r"25 of the 30 elements of model\.weight"),
        (entry(pieces={"model.weight": [0, 0, 0]}), "zip"),
        (entry(pieces={"count": [0, 0]}), "zip"),
        (entry(pieces={"absent": [0, 0]}), "does not contain tensor absent"),
        (entry(shape=[60, 5]), r"model\.weight is float32\[60, 5\] in the checkpoint"),
        (entry(dtype="save"), "save is no element type"),
        (entry(dtype="bfloat16"), r"model\.weight is bfloat16\[6, 5\] in the checkpoint"),
        ([1], "no file of a checkpoint"),
        ({"model.weight": 7}, "no file of a checkpoint"),
    ],
)
def test_an_index_that_lies_is_refused_before_any_tensor_is_touched(tmp_path: Path, index: Any, reason: str) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    save_file(tensors_of(1), tmp_path / "step_1" / FILE, metadata={"tensors": json.dumps(index)})
    forge_manifest(tmp_path / "step_1")
    targets = zeros()
    assert store.find_latest() is not None
    with pytest.raises(CheckpointError, match=reason):
        store.load(tmp_path / "step_1", targets)
    assert untouched(targets)


def test_a_piece_of_another_type_than_its_index_says_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    tensors = tensors_of(1) | {"model.weight": torch.ones(6, 5, dtype=torch.int32)}
    save_file(tensors, tmp_path / "step_1" / FILE, metadata={"tensors": json.dumps(entry())})
    forge_manifest(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=r"a piece of model\.weight is int32\[6, 5\] in its file"):
        store.load(tmp_path / "step_1", zeros())


@pytest.mark.parametrize("content", [b"", b"x" * 100, pickle.dumps([1])])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    (tmp_path / "step_1" / FILE).write_bytes(content)
    forge_manifest(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=f"{FILE} is damaged or no safetensors file"):
        store.load(tmp_path / "step_1", zeros())


# Format 1: pickles


@pytest.fixture
def old(tmp_path: Path) -> SimpleNamespace:
    """A store with checkpoints of release 0.1, step_3 of one engine; and what loading them changes."""
    shutil.copytree(OLD / "ddp", tmp_path / "full")
    shutil.copytree(OLD / "fsdp2", tmp_path / "sharded")
    targets = {name: torch.zeros_like(value) for name, value in read_checkpoint(OLD / "ddp/step_3").items()}
    return SimpleNamespace(
        full=tmp_path / "full/step_3", sharded=tmp_path / "sharded/step_3", targets=targets, folder=tmp_path
    )


def refused(folder: Path, targets: dict[str, torch.Tensor], reason: str) -> None:
    forge_manifest(folder)
    store = CheckpointStore(folder.parent, keep_last_n=2)
    assert store.find_latest() == folder
    with pytest.raises(CheckpointError, match=reason):
        store.load(folder, targets)
    assert untouched(targets)


@pytest.mark.parametrize("hidden", [False, True])
def test_malicious_pickles_are_refused(old: SimpleNamespace, hidden: bool) -> None:
    bomb = Bomb(old.folder / "executed")
    full, metadata = old.full / "checkpoint.pt", old.sharded / ".metadata"
    torch.save({**torch.load(full), "more": bomb} if hidden else bomb, full)
    original = pickle.loads(metadata.read_bytes())
    original.planner_data = bomb
    metadata.write_bytes(pickle.dumps(original if hidden else bomb))
    refused(old.full, old.targets, r"checkpoint\.pt holds other things than tensors: refused to unpickle posix.mkdir$")
    refused(old.sharded, old.targets, r"refused to unpickle posix.mkdir")
    assert not bomb.file.exists()
    pickle.loads(pickle.dumps(bomb))
    assert bomb.file.exists(), "the bomb does not work, so this test shows nothing"


def test_malicious_tensor_data_in_a_sharded_checkpoint_is_refused(old: SimpleNamespace) -> None:
    bomb = Bomb(old.folder / "executed")
    shard, index = old.sharded / "__0_0.distcp", old.sharded / ".metadata"
    torch.save(bomb, shard)
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "__0_0.distcp", 0, shard.stat().st_size
    index.write_bytes(pickle.dumps(metadata))
    refused(old.sharded, old.targets, r"__0_0.distcp holds other things than tensors: refused to unpickle posix.mkdir")
    assert not bomb.file.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Metadata({"x": BytesStorageMetadata()}), "refused to unpickle .*BytesStorageMetadata"),
        ([1, 2], "no index of tensors"),
    ],
)
def test_metadata_of_anything_but_tensors_is_refused(old: SimpleNamespace, content: object, reason: str) -> None:
    (old.sharded / ".metadata").write_bytes(pickle.dumps(content))
    refused(old.sharded, old.targets, reason)


def test_a_checkpoint_with_a_piece_missing_is_refused(old: SimpleNamespace) -> None:
    file = old.sharded / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["model.bert.embeddings.word_embeddings.weight"].chunks.pop()
    file.write_bytes(pickle.dumps(metadata))
    refused(old.sharded, old.targets, r"816 of the 1616 elements of model\.bert\.embeddings\.word_embeddings\.weight")


def test_files_outside_of_the_folder_are_not_read(old: SimpleNamespace) -> None:
    file = old.sharded / ".metadata"
    (old.folder / "__0_0.distcp").write_bytes((old.sharded / "__0_0.distcp").read_bytes())
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../../elsewhere_{info.relative_path}"
    file.write_bytes(pickle.dumps(metadata))
    refused(old.sharded, old.targets, "FileNotFoundError: .*step_3/elsewhere_")
