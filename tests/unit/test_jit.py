"""The cache of compiled functions: keyed by the sources, and absent where no folder can be written to."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest

from geneformer_pretrain import jit
from geneformer_pretrain.data.packing import permutation

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _forget_the_folder() -> Iterator[None]:
    jit._cache_folder.cache_clear()
    yield
    jit._cache_folder.cache_clear()


def test_without_a_folder_to_keep_it_in_code_is_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        first, second = (jit.compiled(lambda x, by=by: x + by) for by in (1, 2))
    assert (first(1), second(1)) == (2, 3)
    assert [record.getMessage().count("set NUMBA_CACHE_DIR") for record in caplog.records] == [1]


def test_the_users_folder_comes_next_where_the_sources_are_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__pycache__").touch()  # in the way of a folder, as permissions are, and for root too
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = jit._cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "home/geneformer_pretrain"
    assert numba.config.CACHE_DIR == ""


ORDER = "from geneformer_pretrain.data.packing import permutation; print(permutation(20, 42, 3).tolist())"


def order_of(package: Path) -> list[int]:
    environment = os.environ | {"PYTHONPATH": str(package)}
    environment.pop("NUMBA_CACHE_DIR", None)
    process = subprocess.run(
        [sys.executable, "-c", ORDER], env=environment, cwd=package, capture_output=True, text=True, check=True
    )
    return [int(number) for number in process.stdout.strip("[]\n").split(",")]


def test_an_edit_of_an_inlined_function_reaches_the_functions_that_inline_it(tmp_path: Path) -> None:
    """The order of the cells is compiled from packing.py, and the hash in it is inlined from masking.py."""
    package = tmp_path / "geneformer_pretrain"
    package.mkdir()
    for name in ("__init__.py", "errors.py", "jit.py", "files.py", "console.py", "data"):
        source = ROOT / "geneformer_pretrain" / name
        if source.is_dir():
            shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, package / name)
    before = order_of(tmp_path)
    assert before == permutation(20, 42, 3).tolist()
    (cache,) = (package / "__pycache__").glob("numba-*")
    compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}
    assert compiled
    assert order_of(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")} == compiled  # from the cache

    masking = package / "data/masking.py"
    text = masking.read_text()
    assert text.count("0xBF58476D1CE4E5B9") == 1
    masking.write_text(text.replace("0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5BB"))
    after = order_of(tmp_path)
    shutil.rmtree(package / "__pycache__")
    assert after == order_of(tmp_path)  # what a fresh cache gives
    assert after != before
    assert sorted(after) == np.arange(20).tolist()
