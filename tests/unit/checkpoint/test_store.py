"""Checkpoints in one process: what is saved is what is loaded, what is pruned, and saves in the background."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geneformer_pretrain import __version__
from geneformer_pretrain.checkpoint import store as checkpoint
from geneformer_pretrain.checkpoint.manifest import read_manifest, write_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from tests.checkpoints import (
    FILE,
    assert_equal,
    assert_holds,
    names,
    read_checkpoint,
    save,
    save_and_wait,
    tensors_of,
    untouched,
    zeros,
)

OLD = Path(__file__).parents[2] / "data/checkpoints_0_1/ddp"

# What is saved is what is loaded


@pytest.mark.parametrize("blocking", [True, False])
def test_round_trip(tmp_path: Path, blocking: bool) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=2)
    assert store.find_latest() is None
    save_and_wait(store, 5, blocking)
    assert_holds(store, 5)
    assert_holds(CheckpointStore(tmp_path / "run", keep_last_n=2), 5)


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff")
    save(CheckpointStore(folder, keep_last_n=2), 5)
    assert_holds(CheckpointStore(folder, keep_last_n=2), 5)
    shutil.copytree(OLD, folder / "old")
    assert_equal(read_checkpoint(folder / "old/step_3"), read_checkpoint(OLD / "step_3"))


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep_last_n=2), 1)
    assert names(tmp_path / "step_1") == ["manifest.json", FILE]
    assert_equal(load_file(tmp_path / "step_1" / FILE), tensors_of(1))


def test_views_are_saved_without_the_rest_of_their_memory(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    big = torch.arange(1_000_000.0)
    views = {"view": big[10:14], "next": big[14:20], "turned": torch.arange(6).view(2, 3).T}
    for step, blocking in enumerate((True, False)):
        store.save(step, views, {}, blocking=blocking)
        store.wait()
        files = read_manifest(tmp_path / f"step_{step}")["files"]
        assert sum(file["size"] for file in files.values()) < 10_000
        targets = {name: torch.zeros(view.shape, dtype=view.dtype) for name, view in views.items()}
        store.load(tmp_path / f"step_{step}", targets)
        assert_equal(targets, views)


def test_load_fills_targets_in_place_even_parameters_and_views(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    store.save(1, {"p": torch.arange(4.0), "v": torch.ones(3)}, {})
    parameter, behind = torch.nn.Parameter(torch.zeros(4)), torch.zeros(3, 2)
    store.load(tmp_path / "step_1", {"p": parameter, "v": behind[:, 1]})
    assert parameter.tolist() == [0, 1, 2, 3]
    assert behind.tolist() == [[0, 1]] * 3


def test_optional_names_may_be_missing_on_either_side(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    store.save(1, {"p": torch.ones(2), "fp8.both": torch.ones(3), "fp8.saved": torch.ones(1)}, {})
    targets = {"p": torch.zeros(2), "fp8.both": torch.zeros(3), "fp8.new": torch.zeros(1)}
    store.load(tmp_path / "step_1", targets, optional="fp8.")
    assert_equal(targets, {"p": torch.ones(2), "fp8.both": torch.ones(3), "fp8.new": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"fp8\.new is missing"):
        store.load(tmp_path / "step_1", targets)


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    targets = zeros()
    targets["model.weight"] = torch.zeros(5, 6)
    targets["model.half"] = torch.zeros(7)
    targets["new"] = torch.zeros(1)
    del targets["count"]
    with pytest.raises(CheckpointError) as caught:
        store.load(tmp_path / "step_1", targets)
    for text in (
        "model.weight is float32[6, 5] in the checkpoint, float32[5, 6] here",
        "model.half is bfloat16[7] in the checkpoint, float32[7] here",
        "new is missing from the checkpoint",
        "count is in the checkpoint only",
    ):
        assert text in str(caught.value)
    assert untouched(targets)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep_last_n=0)
    store = CheckpointStore(tmp_path, keep_last_n=1)
    with pytest.raises(CheckpointSaveError, match="JSON"):
        store.save(1, {}, {"no": object()})


# Versions of the format


def test_a_checkpoint_of_a_newer_release_is_refused_in_words_and_nothing_older_is_not_empty(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    save(store, 1)
    save(store, 2)
    manifest = read_manifest(tmp_path / "step_2")
    write_manifest(tmp_path / "step_2", {**manifest, "format_version": 3, "release": "9.8"})
    for opened in (store, CheckpointStore(tmp_path, keep_last_n=3)):
        with pytest.raises(
            CheckpointError, match=r"step_2 was written by a newer release \(9\.8, checkpoint format 3\)"
        ):
            opened.find_latest()
        with pytest.raises(CheckpointError, match="written by a newer release"):
            opened.load(tmp_path / "step_2", zeros())


def test_manifests_name_format_and_release(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep_last_n=1), 1)
    manifest = read_manifest(tmp_path / "step_1")
    assert (manifest["format_version"], manifest["release"]) == (2, __version__)


# Pruning


def test_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    for step in (8, 9, 10, 11):
        save(store, step)
    assert names(tmp_path) == ["step_10", "step_11"]


def test_protected_steps_are_kept_beside_the_newest_until_they_are_no_longer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    for step in (1, 2, 3, 4, 5):
        save(store, step, protected=(2,))
    assert names(tmp_path) == ["step_2", "step_4", "step_5"]
    save(store, 6, protected=(5, 99))
    assert names(tmp_path) == ["step_5", "step_6"]
    assert_holds(CheckpointStore(tmp_path, keep_last_n=1), 6)
    assert names(tmp_path) == ["step_5", "step_6"]


def test_folders_that_cannot_be_deleted_do_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    store = CheckpointStore(tmp_path, keep_last_n=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for step in (1, 2, 3):
            save(store, step)
        assert "Device or resource busy" in caplog.text
        assert caplog.text.count(f"could not delete {tmp_path}/step_1.trash") == 1  # not at each save
        store = CheckpointStore(tmp_path, keep_last_n=1)
        assert_holds(store, 3)
        assert names(tmp_path) == ["step_1.trash", "step_2.trash", "step_3"]
    save(store, 4)
    assert names(tmp_path) == ["step_4"]


def test_only_leftovers_of_our_own_are_removed(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep_last_n=2), 1)
    for name in ("step_2.tmp", "step_3.trash", "step_1.replaced", "step_x.tmp", "my.tmp", "final_model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    store = CheckpointStore(tmp_path, keep_last_n=2)
    assert names(tmp_path) == ["final_model", "my.tmp", "step_1", "step_x.tmp"]
    assert_holds(store, 1)


def test_links_to_checkpoints_are_pruned_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=1)
    save(store, 1)
    (tmp_path / "run/step_1").rename(tmp_path / "kept")
    (tmp_path / "run/step_1").symlink_to(tmp_path / "kept")
    save(store, 2)
    assert names(tmp_path / "run") == ["step_2"]
    assert (tmp_path / "kept" / FILE).is_file()
    (tmp_path / "run/step_3.trash").symlink_to(tmp_path / "kept")
    assert_holds(CheckpointStore(tmp_path / "run", keep_last_n=1), 2)
    assert names(tmp_path / "run") == ["step_2"]
    assert (tmp_path / "kept" / FILE).is_file()


def test_a_link_that_leads_nowhere_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    save(store, 1)
    (tmp_path / "step_2").symlink_to(tmp_path / "not mounted")
    store = CheckpointStore(tmp_path, keep_last_n=3)
    assert_holds(store, 1)
    assert "step_2 is damaged and will not be used" in caplog.text
    save(store, 2)
    assert not (tmp_path / "step_2").is_symlink()
    assert_holds(CheckpointStore(tmp_path, keep_last_n=3), 2)
    assert names(tmp_path) == ["step_1", "step_2"]


# Saving in the background


def test_training_may_go_on_while_a_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    proceed = threading.Event()
    write = checkpoint.write_tensors

    def slow(*args: Any) -> list[str]:
        assert proceed.wait(10)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    live = tensors_of(1)
    store.save(1, live, {"position": 1}, blocking=False)
    for name, tensor in tensors_of(2).items():
        live[name].copy_(tensor)
    assert not (tmp_path / "step_1").exists()
    with pytest.raises(RuntimeError, match="wait for it first"):
        store.save(2, live, {"position": 2}, blocking=False)
    proceed.set()
    store.wait()
    store.save(2, live, {"position": 2}, blocking=False)
    for name, tensor in tensors_of(3).items():
        live[name].copy_(tensor)
    assert_holds(store, 2)
    shutil.rmtree(tmp_path / "step_2")
    assert_holds(store, 1)
