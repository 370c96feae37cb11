"""Checkpoints that are not what was written: found before they are used, and not what pruning counts."""

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.checkpoint.manifest import read_manifest, write_manifest
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError
from tests.checkpoints import FILE, assert_holds, names, save, untouched, zeros

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
        assert read_manifest(folder) == {"step": 3, "state": state, "format_version": 1}
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


def test_damage_to_any_file_is_found_before_any_tensor_is_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path / "run", keep_last_n=3)
    save(store, 1)
    save(store, 2)
    good = tmp_path / "good"
    newest = tmp_path / "run" / "step_2"
    shutil.copytree(newest, good)
    files = names(newest)
    assert files == ["manifest.json", FILE]
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
                assert untouched(targets)


def test_none_good_is_an_error_with_every_reason(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=3)
    for step in (1, 2, 3):
        save(store, step)
    truncate(tmp_path / "step_1" / FILE)
    flip(tmp_path / "step_2" / FILE, 0.5, 3)
    (tmp_path / "step_3" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path, keep_last_n=3).find_latest()
    for text in (
        f"step_1: {FILE} has",
        f"step_2: {FILE} is not what",
        "manifest.json is missing",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("damage", [truncate, lambda file: flip(file, 0.5, 0), Path.unlink])
def test_damaged_newer_folders_do_not_push_out_good_older_ones(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=4)
    for step in (100, 200, 300, 400):
        save(store, step)
    for step in (300, 400):
        damage(tmp_path / f"step_{step}" / FILE)
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
    flip(tmp_path / "step_2" / FILE, 0.5, 0)
    save(store, 3)
    assert_holds(store, 3)
    assert "step_1" in names(tmp_path)
