"""The lock on a checkpoint folder, in one process; tests/faults has it between runs."""

import errno
import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.errors import CheckpointError, ConfigError, name_error
from geneformer_pretrain.run.archive import archive_run
from geneformer_pretrain.run.folder import EXIT_FILE, LOCK_FILE, is_not_empty, lock_run_folder, write_failed_start

COMPLETED = '{"reason": "completed", "exit_code": 0, "step": 2}\n'


def test_held_until_the_end_and_then_gone(tmp_path: Path) -> None:
    folder = tmp_path / "made/for/it"
    with lock_run_folder(folder, Ranks()):
        assert not is_not_empty(folder)
        with pytest.raises(CheckpointError, match=f"made/for/it is in use by process {os.getpid()} on .*, since 20"):
            lock_run_folder(folder, Ranks()).__enter__()
        (folder / "result").touch()
        assert is_not_empty(folder)
    assert [path.name for path in folder.iterdir()] == ["result"]
    with lock_run_folder(folder, Ranks()):
        pass
    assert folder.exists()


def test_a_folder_made_in_vain_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_run_folder(tmp_path / "new", Ranks()):
        1 / 0  # noqa: B018
    assert not (tmp_path / "new").exists()
    assert not is_not_empty(tmp_path / "new")


def test_a_file_left_by_a_killed_run_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "gone", "pid": 1, "since": "long ago"}')
    (tmp_path / "exit.json").touch()
    with lock_run_folder(tmp_path, Ranks()):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
        assert not (tmp_path / "exit.json").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before ends between the opening of its file and the locking."""
    flock, calls = fcntl.flock, []

    def slow(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with lock_run_folder(tmp_path, Ranks()):
        assert len(calls) == 2
        assert (tmp_path / LOCK_FILE).exists()
        with pytest.raises(CheckpointError, match="in use"):
            lock_run_folder(tmp_path, Ranks()).__enter__()


def test_the_earlier_end_goes_with_the_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / EXIT_FILE).write_text(COMPLETED)
    with lock_run_folder(tmp_path, Ranks()) as earlier_exit:
        assert not (tmp_path / EXIT_FILE).exists()
        previous = archive_run(tmp_path, earlier_exit)
    assert previous is not None
    assert (previous / EXIT_FILE).read_text() == COMPLETED


def test_a_file_of_something_else_is_not_taken_for_the_last_end(tmp_path: Path) -> None:
    (tmp_path / EXIT_FILE).write_text("doors")
    with pytest.raises(CheckpointError, match=r"exit\.json is not of a run, .* move the file away"):
        lock_run_folder(tmp_path, Ranks()).__enter__()
    write_failed_start(tmp_path, CheckpointError("wrong"))
    assert [entry.name for entry in tmp_path.iterdir()] == [EXIT_FILE]
    assert (tmp_path / EXIT_FILE).read_text() == "doors"


def test_without_locks_the_run_starts_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), lock_run_folder(tmp_path, Ranks()):
        pass
    assert "No locks available" in caplog.text


def test_the_lock_stays_when_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    with lock_run_folder(tmp_path, Ranks()):
        previous = archive_run(tmp_path)
        assert previous is not None
        assert (tmp_path / LOCK_FILE).exists()
        assert (previous / "step_1").exists()
        assert archive_run(tmp_path) is None


def test_a_lock_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that became read-only is told by what could not be saved, not by the lock."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def fail_in_a_read_only_folder() -> None:
        with lock_run_folder(tmp_path, Ranks()):
            monkeypatch.setattr(Path, "unlink", refuse)
            raise CheckpointError("nothing can be saved")

    with pytest.raises(CheckpointError, match="nothing can be saved"):
        fail_in_a_read_only_folder()
    assert f"cannot remove {tmp_path / LOCK_FILE}" in caplog.text
    monkeypatch.undo()
    with lock_run_folder(tmp_path, Ranks()):  # The lock itself is gone.
        pass


@pytest.mark.parametrize("error", [ConfigError("wrong"), dist.DistBackendError("NCCL error"), KeyError("a bug")])
def test_whatever_fails_a_start_replaces_the_earlier_end(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "exit.json").write_text(COMPLETED)
    write_failed_start(tmp_path, error)
    told = json.loads((tmp_path / "exit.json").read_text())
    assert told == {"reason": "error", "exit_code": 1, "rank": 0, "error": name_error(error)}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_without_locks_a_failed_start_leaves_a_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may be under way in it."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / LOCK_FILE).write_text("held by another run")
    (tmp_path / "metrics.jsonl").touch()
    write_failed_start(tmp_path, ConfigError("wrong"))
    assert (tmp_path / LOCK_FILE).read_text() == "held by another run"
    assert not (tmp_path / "exit.json").exists()
