"""Checkpoints in one process: every fault that a disk, a kill or an attacker can cause."""

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from geneformer_pretrain import checkpoint_format
from geneformer_pretrain.checkpoint import CheckpointStore, move_aside
from geneformer_pretrain.checkpoint_manifest import (
    CheckpointError,
    CheckpointSaveError,
    describe,
    read_manifest,
    write_manifest,
)

FORMATS = ("full", "sharded")
ROOT = Path(__file__).parents[2]


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


# The manifest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(state=json_values, where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_manifest_is_found(state: object, where: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "step_3"
        folder.mkdir()
        write_manifest(folder, {"step": 3, "state": state})
        assert read_manifest(folder) == {"step": 3, "state": state}
        flip(folder / "manifest.json", where, bit)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read_manifest(folder)


def test_a_renamed_folder_is_not_another_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 3)
    (tmp_path / "step_3").rename(tmp_path / "step_4")
    with pytest.raises(CheckpointError, match="manifest of step 3"):
        store.find_latest()


# Damage at rest


def flip(file: Path, where: float, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero_tail(file: Path) -> None:
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes(len(content) - half))


def damages(seed: int) -> list[tuple[str, Callable[[Path], object]]]:
    rng = random.Random(seed)
    flips = [partial(flip, where=rng.random(), bit=rng.randrange(8)) for _ in range(12)]
    others = [("truncate", truncate), ("zero tail", zero_tail), ("delete", Path.unlink)]
    return [*(("flip", each) for each in flips), *others]


@pytest.mark.parametrize("format", FORMATS)
def test_damage_to_any_file_is_found_before_any_tensor_is_touched(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=3)
    save(store, 1, format)
    save(store, 2, format)
    good = tmp_path / "good"
    newest = tmp_path / "run" / "step_2"
    shutil.copytree(newest, good)
    files = names(newest)
    assert len(files) == {"full": 2, "sharded": 3}[format]
    for seed, file in enumerate(files):
        for kind, damage in damages(seed):
            shutil.rmtree(newest)
            shutil.copytree(good, newest)
            damage(newest / file)
            for opened in (store, CheckpointStore(tmp_path / "run", keep_last_n=3)):
                caplog.clear()
                assert_holds(opened, 1)
                messages = [record.message for record in caplog.records if record.levelno == logging.ERROR]
                assert any("step_2" in text and file in text for text in messages), (file, kind, messages)
                targets = zeros()
                with pytest.raises(CheckpointError, match=file):
                    opened.load(newest, targets)
                assert all(not tensor.any() for tensor in targets.values())


def test_none_good_is_an_error_with_every_reason(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    for step in (1, 2, 3):
        save(store, step)
    truncate(tmp_path / "step_1" / "checkpoint.pt")
    flip(tmp_path / "step_2" / "checkpoint.pt", 0.5, 3)
    (tmp_path / "step_3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path, keep_last_n=3).find_latest()
    for text in (
        "step_1: checkpoint.pt has",
        "step_2: checkpoint.pt is not what",
        "manifest.json is missing",
    ):
        assert text in str(caught.value)


# Pruning


def test_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    for step in (8, 9, 10, 11):
        save(store, step, FORMATS[step % 2])
    assert names(tmp_path) == ["step_10", "step_11"]


@pytest.mark.parametrize("damage", [truncate, lambda file: flip(file, 0.5, 0), Path.unlink])
def test_damaged_newer_folders_do_not_push_out_good_older_ones(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=4)
    for step in (100, 200, 300, 400):
        save(store, step)
    for step in (300, 400):
        damage(tmp_path / f"step_{step}" / "checkpoint.pt")
    store = CheckpointStore(tmp_path, keep_last_n=2)
    assert_holds(store, 200)
    save(store, 350)
    assert names(tmp_path) == ["step_200", "step_300", "step_350", "step_400"]
    save(store, 400)
    assert names(tmp_path) == ["step_350", "step_400"]
    assert_holds(store, 400)


def test_damage_after_verification_is_seen_by_the_pruner(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=2)
    save(store, 1)
    save(store, 2)
    flip(tmp_path / "step_2" / "checkpoint.pt", 0.5, 0)
    save(store, 3)
    assert_holds(store, 3)
    assert "step_1" in names(tmp_path)


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
        store = CheckpointStore(tmp_path, keep_last_n=1)
        assert_holds(store, 3)
        assert names(tmp_path) == ["step_1.trash", "step_2.trash", "step_3"]
    save(store, 4)
    assert names(tmp_path) == ["step_4"]


def test_only_leftovers_of_our_own_are_removed(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep_last_n=2), 1)
    for name in ("step_2.tmp", "step_3.trash", "step_1.old", "step_x.tmp", "my.tmp", "final_model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    store = CheckpointStore(tmp_path, keep_last_n=2)
    assert names(tmp_path) == ["final_model", "my.tmp", "step_1", "step_x.tmp"]
    assert_holds(store, 1)


def test_move_aside(tmp_path: Path) -> None:
    assert move_aside(tmp_path / "none") is None
    assert move_aside(tmp_path) is None
    moved = []
    for step in (1, 2):
        save(CheckpointStore(tmp_path, keep_last_n=2), step)
        (tmp_path / "metrics.jsonl").write_text(str(step))
        previous = move_aside(tmp_path)
        assert previous is not None
        moved.append(previous)
    assert names(tmp_path) == sorted(path.name for path in moved)
    for step, previous in enumerate(moved, start=1):
        assert names(previous) == ["metrics.jsonl", f"step_{step}"]
        assert_holds(CheckpointStore(previous, keep_last_n=2), step)
    assert CheckpointStore(tmp_path, keep_last_n=2).find_latest() is None


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


# Saves that fail


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond `size` bytes fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0, 700, 1500])
def test_disk_full(tmp_path: Path, format: str, size: int) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=1)
    save(store, 1, format)
    before = {file.name: describe(file) for file in (tmp_path / "step_1").iterdir()}
    for blocking in (True, False):
        with largest_file(size), pytest.raises(CheckpointSaveError, match=r"rank 0: .*File too large"):
            save_and_wait(store, 2, format, blocking)
        assert names(tmp_path) == ["step_1"]
        assert {file.name: describe(file) for file in (tmp_path / "step_1").iterdir()} == before
    store.wait()
    save(store, 2, format)
    assert_holds(store, 2)
    assert names(tmp_path) == ["step_2"]


def test_a_failure_in_the_background_is_told_once_and_costs_no_later_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    with largest_file(0):
        save(store, 1, blocking=False)
        assert store._in_flight is not None
        store._in_flight.exception()
    with pytest.raises(CheckpointSaveError, match="step_1 failed"):
        save(store, 2, blocking=False)
    store.wait()
    assert_holds(store, 2)
    with largest_file(0):
        save(store, 3, blocking=False)
        assert store._in_flight is not None
        store._in_flight.exception()
    save(store, 4)
    store.wait()
    assert_holds(store, 4)


def test_folder_not_writable() -> None:
    result = run_here("unwritable")
    assert result == {"start": "PermissionError", "save": "PermissionError", "then": "step_1"}


def scenario_unwritable() -> dict[str, str]:
    """Run as a user whom permissions hold back, which root is not."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o777)
    if os.getuid() == 0:
        os.setuid(65534)
    directory = base / "run"
    store = CheckpointStore(directory, keep_last_n=2)
    save(store, 1)
    directory.chmod(0o555)
    outcome = {}
    for key, action in (
        ("start", lambda: CheckpointStore(directory, keep_last_n=2)),
        ("save", lambda: save(store, 2)),
    ):
        try:
            action()
        except CheckpointError as error:
            outcome[key] = "PermissionError" if "PermissionError" in str(error) else str(error)
    latest = store.find_latest()
    outcome["then"] = latest.name if latest else "nothing"
    directory.chmod(0o755)
    shutil.rmtree(directory)
    return outcome


def test_everything_is_on_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{int(descriptor)}')).name}")
        fsync(descriptor)

    def recorded_rename(old: Path, new: Path, **kwargs: int) -> None:
        events.append(f"rename {Path(old).name} {Path(new).name}")
        rename(old, new, **kwargs)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    store = CheckpointStore(tmp_path / "run", keep_last_n=2)
    for step, format in enumerate(FORMATS):
        events.clear()
        save(store, step, format)
        written = {"full": ["checkpoint.pt"], "sharded": ["__0_0.distcp", ".metadata.tmp"]}[format]
        commit = events.index(f"rename step_{step}.tmp step_{step}")
        assert {f"sync {name}" for name in written} <= set(events[:commit])
        assert events[commit - 2 : commit] == ["sync manifest.json", f"sync step_{step}.tmp"]
        assert events[commit + 1 :] == ["sync run"]


# Crashes


def run_here(scenario: str, *arguments: str) -> dict[str, object]:
    """Run a function of this file in a fresh process, free of pytest's threads, so that it may fork."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, scenario, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def forked(action: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_a_crash_before_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    result = run_here("crash_points", str(tmp_path))
    assert result["full"] > 15  # type: ignore[operator]
    assert result["sharded"] > 20  # type: ignore[operator]


def scenario_crash_points(base: str) -> dict[str, int]:
    """Crash before the 1st, 2nd, ... file operation of a save that replaces step_2 and prunes step_1."""
    crashed = {}
    for format in FORMATS:
        origin = Path(base) / f"origin_{format}"
        store = CheckpointStore(origin, keep_last_n=2)
        save(store, 1, format)
        save(store, 2, format)
        point = 0
        while True:
            point += 1
            directory = Path(base) / f"{format}_{point}"
            shutil.copytree(origin, directory)
            child = forked(lambda d=directory, f=format, p=point: save_and_crash(d, f, p))  # type: ignore[misc]
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, 9), status
            store = CheckpointStore(directory, keep_last_n=1)
            assert_holds(store, 2)
            left = names(directory)
            assert set(left) <= {"step_1", "step_2"}, left
            for name in left:
                store.load(directory / name, zeros())
            shutil.rmtree(directory)
            if status == 0:
                assert left == ["step_2"], left
                break
        crashed[format] = point - 1
    return crashed


def save_and_crash(directory: Path, format: str, point: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
            event == "open" and str(arguments[0]).startswith(str(directory))
        ):
            count += 1
            if count == point:
                os._exit(9)

    store = CheckpointStore(directory, keep_last_n=1)
    sys.addaudithook(hook)
    save(store, 2, format)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    result = run_here("sigkill", str(tmp_path))
    assert result["survived"] == 12
    assert result["saves"] > 12  # type: ignore[operator]


def scenario_sigkill(base: str) -> dict[str, int]:
    directory = Path(base) / "run"
    rng = random.Random(0)
    step = 0
    save(CheckpointStore(directory, keep_last_n=2), step)
    for kill in range(12):
        child = forked(lambda first=step: save_for_ever(directory, first))  # type: ignore[misc]
        time.sleep(0.02 + rng.random() * 0.25)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = CheckpointStore(directory, keep_last_n=2)
        latest = store.find_latest()
        assert latest is not None
        reached = read_manifest(latest)["step"]
        assert reached >= step, f"kill {kill} lost step {step}"
        assert len(names(directory)) <= 3
        step = reached
        assert_holds(store, step)
    return {"survived": kill + 1, "saves": step}


def save_for_ever(directory: Path, step: int) -> None:
    store = CheckpointStore(directory, keep_last_n=2)
    while True:
        step += 1
        save(store, step, FORMATS[step % 2], blocking=step % 3 == 0)


# Malice


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
        (1, "nsupported|Unsupported|WeightsUnpickler"),
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
    with pytest.raises(CheckpointError, match="Weights only load failed"):
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    print(json.dumps(globals()[f"scenario_{sys.argv[1]}"](*sys.argv[2:])))
