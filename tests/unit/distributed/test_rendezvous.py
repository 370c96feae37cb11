"""The numbers that a launcher puts into the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from geneformer_pretrain.distributed.rendezvous import LEAST, check_environment
from geneformer_pretrain.errors import ConfigError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LEAST:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("x", "", "-1", "²")),
        ("LOCAL_RANK", "1.0"),
        ("WORLD_SIZE", "0"),
        ("GROUP_WORLD_SIZE", "0"),
        ("MASTER_PORT", "port"),
    ],
)
def test_what_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name}={value} in the environment is no whole number from [01] on: "):
        check_environment()


def test_ranks_lie_below_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    check_environment()
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_environment()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK=2 in the environment is not below WORLD_SIZE=2"):
        check_environment()


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["train.py", "--config-name", "l0_sanity", "training.checkpoint_dir={folder}/run"], "RANK"),
        (["train.py", "--config-name", "l0_sanity", "training.checkpoint_dir={folder}/run"], "WORLD_SIZE"),
        (["-m", "geneformer_pretrain", "embed", "model", "cells", "--output", "{folder}/out.parquet"], "WORLD_SIZE"),
    ],
)
def test_a_start_with_a_wrong_variable_is_one_line(tmp_path: Path, command: list[str], variable: str) -> None:
    words = [word.format(folder=tmp_path) for word in command]
    environment = os.environ | {variable: "x"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {variable}=x in the environment is no whole number from ")
    assert list(tmp_path.iterdir()) == []
