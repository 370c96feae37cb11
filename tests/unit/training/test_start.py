"""`training.init_from` through a whole run: weights, messages, resumption and refusals."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training import main as train
from tests.tiny import (
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    tiny_config,
)


def test_a_run_starts_from_a_published_model_and_then_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.run(tiny_config(tmp_path, "training.learning_rate=1e-2", "training.num_train_steps=5")) == 0
    published = tmp_path / "run/final_model"
    given = (
        f"training.init_from={published}",
        f"training.checkpoint_dir={tmp_path / 'second'}",
        "training.learning_rate=0",
        "training.weight_decay=0",
        "training.seed=9",
    )
    capsys.readouterr()
    assert train.run(tiny_config(tmp_path, *given)) == 0
    assert f"Starting from the weights of {published}." in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "second/final_model"))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert train.run(tiny_config(tmp_path, *given, "training.num_train_steps=3")) == 0
    assert "training.init_from does not count: the weights are those of the checkpoint." in capsys.readouterr().out


def test_a_model_that_does_not_fit_is_refused_key_by_key(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    given = [f"training.init_from={tmp_path / 'run/final_model'}", f"training.checkpoint_dir={tmp_path / 'second'}"]
    with pytest.raises(ConfigError, match=r"does not fit this run:\n.*model\.hidden_size: 32 there, 64 here"):
        train.run(tiny_config(tmp_path, *given, "model.hidden_size=64"))
    with pytest.raises(ConfigError, match=r"training\.init_extend_positions"):
        train.run(tiny_config(tmp_path, *given, "model.max_position_embeddings=128"))
    longer = ["model.max_position_embeddings=128", "training.init_extend_positions=true"]
    assert train.run(tiny_config(tmp_path, *given, *longer)) == 0
    with pytest.raises(ConfigError, match=r"do nothing without training\.init_from"):
        tiny_config(tmp_path, "training.init_extend_positions=true")
