"""Saves that a full disk, missing permission, a crash or SIGKILL ends, in one process."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from geneformer_pretrain.checkpoint.manifest import file_checksum, find_damage, read_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from tests.checkpoints import FILE, assert_holds, names, save, save_and_wait, zeros

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]


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


@pytest.mark.parametrize("size", [0, 700])
def test_disk_full(tmp_path: Path, size: int) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=1)
    save(store, 1)
    before = {file.name: file_checksum(file) for file in (tmp_path / "step_1").iterdir()}
    for blocking in (True, False):
        with largest_file(size), pytest.raises(CheckpointSaveError, match=r"failed: OSError: .*File too large"):
            save_and_wait(store, 2, blocking)
        assert names(tmp_path) == ["step_1"]
        assert {file.name: file_checksum(file) for file in (tmp_path / "step_1").iterdir()} == before
    store.wait()
    save(store, 2)
    assert_holds(store, 2)
    assert names(tmp_path) == ["step_2"]


def test_a_failure_in_the_background_is_raised_once_and_costs_no_later_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    with largest_file(0):
        save(store, 1, blocking=False)
        with pytest.raises(CheckpointSaveError, match="step_1 failed"):
            store.wait()
    store.wait()
    save(store, 2, blocking=False)
    store.wait()
    assert_holds(store, 2)


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
    events.clear()
    save(store, 1)
    commit = events.index("rename step_1.tmp step_1")
    assert f"sync {FILE}" in events[:commit]
    assert events[commit - 2 : commit] == ["sync manifest.json", "sync step_1.tmp"]
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
    assert run_here("crash_points", str(tmp_path))["points"] > 15  # type: ignore[operator]


def scenario_crash_points(base: str) -> dict[str, int]:
    """Crash before the 1st, 2nd, ... file operation of a save that replaces step_3 and prunes step_2, not step_1."""
    origin = Path(base) / "origin"
    store = CheckpointStore(origin, keep_last_n=3)
    for step in (1, 2, 3):
        save(store, step)
    point = 0
    while True:
        point += 1
        directory = Path(base) / str(point)
        shutil.copytree(origin, directory)
        child = forked(lambda d=directory, p=point: save_and_crash(d, p))  # type: ignore[misc]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        store = CheckpointStore(directory, keep_last_n=1)
        assert_holds(store, 3)
        left = names(directory)
        assert {"step_1", "step_3"} <= set(left) <= {"step_1", "step_2", "step_3"}, left
        for name in left:
            store.load(directory / name, zeros())
        shutil.rmtree(directory)
        if status == 0:
            assert left == ["step_1", "step_3"], left
            return {"points": point - 1}


def save_and_crash(directory: Path, point: int) -> None:
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
    save(store, 3, protected=(1,))


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
        assert len(names(directory)) <= 4
        assert find_damage(directory / "step_0") is None, "the protected one is lost"
        step = reached
        assert_holds(store, step)
    return {"survived": kill + 1, "saves": step}


def save_for_ever(directory: Path, step: int) -> None:
    store = CheckpointStore(directory, keep_last_n=2)
    while True:
        step += 1
        save(store, step, blocking=step % 3 == 0, protected=(0,))
        store.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    print(json.dumps(globals()[f"scenario_{sys.argv[1]}"](*sys.argv[2:])))
