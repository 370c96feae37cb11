"""Files on file systems that lack operations, and errors of the system that are not the file's fault."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.errors import DataError, OutputError, explain
from geneformer_pretrain.files import new_folder, replacing, require_apart, require_new
from tests.corpora import write_parquet


def write_where_folders_fail(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Write a file where syncing a folder fails with an error of the system."""
    fsync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with replacing(path) as temporary:
        temporary.write_text("whole")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As on some FUSE and network mounts."""
    write_where_folders_fail(tmp_path / "file", monkeypatch, number)
    assert (tmp_path / "file").read_text() == "whole"


def test_a_folder_on_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_where_folders_fail(tmp_path / "file", monkeypatch, errno.EIO)


@pytest.mark.parametrize("place", ["file", "deep/er/file"])
def test_a_new_output_can_be_made_with_its_folders(tmp_path: Path, place: str) -> None:
    require_new(tmp_path / place, overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").touch()
    with pytest.raises(OutputError, match=r"there/deep: .*there cannot be written to \(Not a directory\)"):
        require_new(tmp_path / "there/deep", overwrite=True)


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    folder = new_folder(tmp_path / "thesis.txt", overwrite=True)
    with pytest.raises(OutputError, match=r"thesis\.txt: is a file; name a folder"), folder:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("output", "refused"), [("a", True), (".", True), ("a/b/c", False), ("other", False), ("a/b", True)]
)
def test_outputs_that_hold_an_input(tmp_path: Path, output: str, refused: bool) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    for path in (tmp_path / "a/b", tmp_path / "link"):
        if refused:
            with pytest.raises(OutputError, match=r"(is read itself|holds .*, which is read); name another output"):
                require_apart(tmp_path / output, [path])
        else:
            require_apart(tmp_path / output, [path])


@pytest.fixture
def no_more_files() -> Iterator[list[int]]:
    """Use up the file descriptors of this process, but for a number of them that the test frees."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    taken: list[int] = []
    yield taken
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lack_of_file_descriptors_is_not_damage(tmp_path: Path, no_more_files: list[int]) -> None:
    path = write_parquet(tmp_path / "cells.parquet", [[3, 4, 5]] * 10)
    found = set()
    for spare in range(12):
        while True:
            try:
                no_more_files.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for _ in range(spare):
            os.close(no_more_files.pop())
        try:
            open_corpus(path, tmp_path / f"cache{spare}")
        except DataError as error:
            found.add(str(error))
        except OSError as error:
            found.add(str(error))
    assert any("cannot be read now (Too many open files); raise the limit with ulimit -n" in text for text in found)
    assert not [text for text in found if "damaged" in text or "replace the file" in text]


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The second is refused, and the first goes on undisturbed; what a killed one left is no obstacle."""
    (tmp_path / "made.tmp").mkdir()
    (tmp_path / "made.tmp/.lock").touch()
    (tmp_path / "made.tmp/half").touch()
    with new_folder(tmp_path / "made") as folder:
        (folder / "whole").touch()
        with (
            pytest.raises(OutputError, match="made: another process makes it; wait for it, or name another output"),
            new_folder(tmp_path / "made"),
        ):
            pass
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_full_disk_is_named_as_such() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left on device", "out.parquet")) == (
        "out.parquet: No space left on device; free some where the output lies, and give the command again"
    )
    unnamed = explain(OSError(errno.ENOSPC, "Error writing bytes to file"))
    assert unnamed == "No space left on device; free some where the output lies, and give the command again"
