"""The arguments of `train.py`: which configuration they compose, and what is said of mistakes in them."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from geneformer_pretrain.config import compose as composing
from geneformer_pretrain.config.compose import DEFAULT_NAME, load_config, read_command_line
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training import main as train
from tests.tiny import (
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    read_exit,
    tiny_config,
)


def refused(arguments: Sequence[str]) -> str:
    """Return the message with which a command line is refused before anything runs."""
    try:
        given = read_command_line(arguments)
        name = given.config_name or DEFAULT_NAME
        load_config(name, given.overrides, config_path=given.config_path, config_dir=given.config_dir)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{arguments} was not refused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.lerning_rate=1"], "training.lerning_rate: did you mean training.learning_rate?"),
        (["-cn=106m", "data.pth=a.c"], "data.pth: did you mean data.path?"),
        (
            ["--config-name", "11m"],
            "'11m': did you mean 10m? hydra_config/ has 106m, 10m, 4b, l0_sanity, v2_104m, v2_316m",
        ),
        (["model=107m"], "Unknown model '107m': did you mean 10m or 106m? model/ has 106m, 10m, 4b, v2_104m, v2_316m"),
        (["training.seed=1", "-cn", "10m", "sed=1"], "sed: did you mean training.seed?"),
        (["training.seed=1,2"], "training.seed=1,2: these are several values, for several runs"),
        (["data.path=a,b"], """'data.path="a,b"'"""),
        (["10m"], "'10m' is not KEY=VALUE: did you mean --config-name 10m?"),
        (["--config-name", "defaults"], "Unknown configuration 'defaults'"),
        (["my key=3"], "my key=3: Hydra cannot read this. See that the key is a name"),
        (["-m", "training.seed=1,2"], "--multirun is not supported"),
        (["+model=106m"], "model"),
        (["training.wandb_init_args=[a]"], "training.wandb_init_args"),
        (["learning_rate=1e-3"], "learning_rate: did you mean training.learning_rate?"),
        (["~training.sed"], "training.sed: did you mean training.seed?"),
        (["data.path=~/cells"], """for Hydra and for the shell: 'data.path="~/cells"'"""),
        (["data.path=/a b=c.parquet"], """'data.path="/a b=c.parquet"'"""),
        (["training.wandb_init_args={a: 1"], "See that the key is a name and that quotes and brackets are closed"),
        (["data.path=/a", "b=c.parquet"], "key b: if it is part of a value with a space, quote that value"),
        (["data.path=/a", "b/c.parquet"], "'b/c.parquet' is not KEY=VALUE: is it part of a value with a space?"),
        (["--config-dir", "/none"], "--config-dir: no folder /none; correct the path"),
        (["--config-path", "/none"], "--config-path: no folder /none; correct the path"),
    ],
)
def test_a_command_line_that_hydra_would_refuse_without_advice(arguments: list[str], message: str) -> None:
    assert message in refused(arguments)


@pytest.mark.parametrize(("text", "line"), [("training:\n\tfoo: 3\n", 2), ("training: {", 1)])
def test_a_file_that_is_not_yaml_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(composing, "CONFIG_DIR", tmp_path)
    assert re.search(rf"mine\.yaml: not YAML: .* line {line}, column \d", refused(["--config-name", "mine"]))


def test_configurations_of_other_folders(tmp_path: Path) -> None:
    """A folder of one's own beside hydra_config/, or in its place; and a run's own config.yaml."""
    (tmp_path / "mine.yaml").write_text("defaults: [10m, _self_]\ntraining: {seed: 7, checkpoint_dir: mine}\n")
    config = load_config("mine", ["training.learning_rate=1e-3"], config_dir=str(tmp_path))
    assert (config.training.seed, config.training.learning_rate, config.model.hidden_size) == (7, 1e-3, 256)
    assert train.run(tiny_config(tmp_path, "training.seed=5")) == 0
    again = load_config("config", ["training.num_train_steps=4"], config_path=str(tmp_path / "run"))
    assert (again.training.seed, again.training.num_train_steps, again.model.hidden_size) == (5, 4, 32)
    assert train.run(again) == 0
    assert read_exit(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["training.wandb_init_args={mode: disabled}"], {"project": "geneformer-pretrain", "mode": "disabled"}),
        (["training.wandb_init_args.mode=disabled"], {"project": "geneformer-pretrain", "mode": "disabled"}),
        (["+training.wandb_init_args.tags=[a]"], {"project": "geneformer-pretrain", "tags": ["a"]}),
        (["training.wandb_init_args=null"], None),
        (
            ["training.wandb_init_args.project=p", "training.wandb_init_args.group.x=1"],
            {"project": "p", "group": {"x": 1}},
        ),
    ],
)
def test_arguments_of_wandb_need_no_plus(arguments: list[str], expected: dict[str, Any] | None) -> None:
    found = load_config("l0_sanity", arguments).training.wandb_init_args
    assert found == (expected if expected is None else {"name": "l0_sanity", **expected})


def test_options_between_overrides_keep_their_values() -> None:
    arguments = ["training.seed=1", "-cd", "training.seed=2", "training.num_workers=0", "--", "training.seed=2"]
    given = read_command_line(arguments)
    assert given.config_dir == "training.seed=2"
    assert given.overrides == ["training.seed=1", "training.num_workers=0", "training.seed=2"]
    assert not given.shows
    assert read_command_line(["a=1", "--cfg", "job", "b=2"]).ordered == ["a=1", "b=2", "--cfg", "job"]


@pytest.mark.parametrize("value", ["${x", "{name:", "'a", "a=b\\"])
def test_quotes_that_would_not_help_are_not_offered(value: str) -> None:
    assert refused([f"data.path={value}"]).endswith("quotes and brackets are closed")


@pytest.mark.parametrize("value", ["a=b", "~/cells", "it's", 'a"b=c', "/a b=c(1)[2].parquet"])
def test_the_quotes_that_hydra_is_said_to_need_are_right(value: str) -> None:
    (advised,) = shlex.split(refused([f"data.path={value}"]).partition("for the shell: ")[2])
    assert load_config("l0_sanity", [advised]).data.path == os.path.expanduser(value)
