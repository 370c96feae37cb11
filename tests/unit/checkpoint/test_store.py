"""Checkpoints in one process: what is saved is what is loaded, what is pruned, and saves in the background."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from geneformer_pretrain.checkpoint import formats as checkpoint_format
from geneformer_pretrain.checkpoint.manifest import read_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from tests.checkpoints import FORMATS, assert_equal, assert_holds, names, save, save_and_wait, tensors_of, zeros

# What is saved is what is loaded


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("blocking", [True, False])
def test_round_trip(tmp_path: Path, format: str, blocking: bool) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=2)
    assert store.find_latest() is None
    save_and_wait(store, 5, format, blocking)
    assert_holds(store, 5)
    assert_holds(CheckpointStore(tmp_path / "run", keep_last_n=2), 5)


def test_files_are_what_torch_itself_reads(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1, "full")
    save(store, 2, "sharded")
    assert_equal(torch.load(tmp_path / "step_1" / "checkpoint.pt", weights_only=True), tensors_of(1))
    dcp_to_torch_save(tmp_path / "step_2", tmp_path / "converted.pt")
    assert_equal(torch.load(tmp_path / "converted.pt", weights_only=True), tensors_of(2))


def test_views_are_saved_without_what_is_behind_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    big = torch.arange(1_000_000.0)
    for step, format in enumerate(FORMATS):
        store.save(step, {"view": big[10:14], "turned": torch.arange(6).view(2, 3).T}, {}, format)
        files = read_manifest(tmp_path / f"step_{step}")["files"]
        assert sum(file["size"] for file in files.values()) < 10_000
        targets = {"view": torch.zeros(4), "turned": torch.zeros(3, 2, dtype=torch.int64)}
        store.load(tmp_path / f"step_{step}", targets)
        assert_equal(targets, {"view": big[10:14], "turned": torch.arange(6).view(2, 3).T})


def test_load_fills_targets_in_place_even_parameters_and_views(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    for step, format in enumerate(FORMATS):
        store.save(step, {"p": torch.arange(4.0), "v": torch.ones(3)}, {}, format)
        parameter, behind = torch.nn.Parameter(torch.zeros(4)), torch.zeros(3, 2)
        store.load(tmp_path / f"step_{step}", {"p": parameter, "v": behind[:, 1]})
        assert parameter.tolist() == [0, 1, 2, 3]
        assert behind.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("format", FORMATS)
def test_optional_names_may_be_missing_on_either_side(tmp_path: Path, format: str) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    store.save(1, {"p": torch.ones(2), "fp8.both": torch.ones(3), "fp8.saved": torch.ones(1)}, {}, format)
    targets = {"p": torch.zeros(2), "fp8.both": torch.zeros(3), "fp8.new": torch.zeros(1)}
    store.load(tmp_path / "step_1", targets, optional="fp8.")
    assert_equal(targets, {"p": torch.ones(2), "fp8.both": torch.ones(3), "fp8.new": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"fp8\.new is missing"):
        store.load(tmp_path / "step_1", targets)


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path, format: str) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1, format)
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
    assert all(not tensor.any() for tensor in targets.values())


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep_last_n=0)
    store = CheckpointStore(tmp_path, keep_last_n=1)
    with pytest.raises(ValueError, match=r"'pickle'.*'full', 'sharded'"):
        store.save(1, {}, {}, "pickle")
    with pytest.raises(CheckpointSaveError, match="JSON"):
        store.save(1, {}, {"no": object()}, "full")


# Pruning


def test_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    for step in (8, 9, 10, 11):
        save(store, step, FORMATS[step % 2])
    assert names(tmp_path) == ["step_10", "step_11"]


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
    assert (tmp_path / "kept/checkpoint.pt").is_file()
    (tmp_path / "run/step_3.trash").symlink_to(tmp_path / "kept")
    assert_holds(CheckpointStore(tmp_path / "run", keep_last_n=1), 2)
    assert names(tmp_path / "run") == ["step_2"]
    assert (tmp_path / "kept/checkpoint.pt").is_file()


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
    proceed, running = threading.Event(), []
    write = checkpoint_format.FullFormat.write

    def slow(*args: object) -> list[str]:
        running.append(1)
        assert len(running) == 1, "two saves in flight"
        assert proceed.wait(10)
        running.pop()
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_format.FullFormat, "write", slow)
    live = tensors_of(1)
    store.save(1, live, {"position": 1}, "full", blocking=False)
    for name, tensor in tensors_of(2).items():
        live[name].copy_(tensor)
    assert not (tmp_path / "step_1").exists()
    threading.Timer(0.1, proceed.set).start()
    store.save(2, live, {"position": 2}, "full", blocking=False)
    assert (tmp_path / "step_1").exists(), "the second save did not wait for the first"
    for name, tensor in tensors_of(3).items():
        live[name].copy_(tensor)
    assert_holds(store, 2)
    shutil.rmtree(tmp_path / "step_2")
    assert_holds(store, 1)


def test_host_buffers_are_used_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=1)
    addresses = []
    for step in (1, 2):
        save(store, step, "sharded", blocking=False)
        addresses.append({buffer.data_ptr() for buffer in store._host._buffers.values()})
    store.wait()
    assert len(addresses[0]) == len(tensors_of(0))
    assert addresses[0] == addresses[1]
    save(store, 3)
    assert not store._host._buffers, "a blocking save from host memory needs no copies"
