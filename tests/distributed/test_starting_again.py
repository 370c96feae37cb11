"""A start in the folder of an earlier run: what is refused, what is kept, and what is moved aside."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from geneformer_pretrain.data.dataset import open_training_data
from geneformer_pretrain.errors import CheckpointError, ConfigError, TrainingError
from geneformer_pretrain.training import main as train
from tests.tiny import (
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    read_cells,
    read_exit,
    read_metrics,
    tiny_config,
    write_parquet,
)


def test_complete_run_says_so_and_exports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    assert train.run(config) == 0
    model = tmp_path / "run/final_model/model.safetensors"
    weights, metrics = model.read_bytes(), (tmp_path / "run/metrics.jsonl").read_bytes()
    record = (tmp_path / "run/config.yaml").read_bytes()
    shutil.rmtree(tmp_path / "run/final_model")
    capsys.readouterr()
    assert train.run(tiny_config(tmp_path, "training.learning_rate=0.5")) == 0
    assert "This run is complete: 2 of 2 steps done." in capsys.readouterr().out
    assert train.run(tiny_config(tmp_path, "training.num_train_steps=1")) == 0
    assert "This run has 2 steps, more than training.num_train_steps=1: there is nothing" in capsys.readouterr().out
    assert model.read_bytes() == weights
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "run/config.yaml").read_bytes() == record  # of the steps that were made
    assert read_exit(tmp_path / "run") == {"reason": "completed", "exit_code": 0, "step": 2}


def test_the_progress_begins_when_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the configuration, on one stream with it; and an epoch of one pack is less than a step of six."""
    cells = write_parquet(tmp_path / "few.parquet", make_cells(1))
    config = tiny_config(tmp_path, f"data.path={cells}", "training.gradient_accumulation_steps=6")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert train.run(config) == 0
    printed = capsys.readouterr().out
    assert "\nepoch       less than one step, which reads each cell 6.0 times; the run has 2\n" in printed
    assert printed.index("\noutput      ") < printed.index("\ntrain: 0 of 2 steps\n")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest good one is used and the log says so; without any, the run stops and starts nothing."""
    config = tiny_config(tmp_path, "training.num_train_steps=4", "training.save_every_n_steps=1")
    assert train.run(config) == 0
    weights = (tmp_path / "run/final_model/model.safetensors").read_bytes()
    flip_bit(tmp_path / "run/step_4/rank_0.safetensors")
    (tmp_path / "run/step_3/rank_0.safetensors").unlink()
    assert train.run(config) == 0
    assert [record.levelname for record in caplog.records].count("ERROR") >= 2
    assert "step_2, which is good" in caplog.text
    assert (tmp_path / "run/final_model/model.safetensors").read_bytes() == weights

    for path in (tmp_path / "run").glob("step_*/rank_0.safetensors"):
        flip_bit(path)
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"none .* is good.*step_4.*step_3.*step_2.*Restore .*resume_from_checkpoint=false"
    ):
        train.run(config)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    exit_json = read_exit(tmp_path / "run")
    assert (exit_json["reason"], exit_json["exit_code"], exit_json["rank"]) == ("error", 1, 0)
    assert "none of the checkpoints is good" in exit_json["error"]


def test_not_resuming_moves_the_earlier_run_aside(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path, "training.log_cell_ids=true")) == 0
    run = tmp_path / "run"
    earlier = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = tiny_config(tmp_path, "training.resume_from_checkpoint=false", "training.num_train_steps=1")
    assert train.run(again) == 0
    (previous,) = run.glob("previous-*")
    for name, content in earlier.items():
        assert (previous / name).read_bytes() == content, name
    assert [record["step"] for record in read_metrics(run)] == [1]
    assert (run / "step_1").is_dir()
    assert not (run / "step_2").exists()


def test_results_without_a_checkpoint_are_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train.run(tiny_config(tmp_path, "training.save_every_n_steps=1")) == 0
    for folder in run.glob("step_*"):
        shutil.rmtree(folder)
    earlier = (run / "metrics.jsonl").read_bytes()
    # A finished run; then, without its export, one that had come so far that there should be a checkpoint.
    for number in (1, 2):
        assert train.run(tiny_config(tmp_path, "training.num_train_steps=1", "training.save_every_n_steps=1")) == 0
        found = sorted(run.glob("previous-*"))
        assert len(found) == number
        assert f"had results but no checkpoint to go on from; they are in {found[-1]} now" in capsys.readouterr().out
        assert (found[-1] / "metrics.jsonl").read_bytes() == earlier
        assert [record["step"] for record in read_metrics(run)] == [1]
        if number == 1:
            shutil.rmtree(run / "final_model")
            shutil.rmtree(run / "step_1")
            (run / "metrics.jsonl").write_bytes(earlier)


def test_the_log_of_a_run_without_a_checkpoint_is_moved_aside(tmp_path: Path) -> None:
    """Cut off before its first save: nothing can go on from it, and nothing is lost."""
    assert train.run(tiny_config(tmp_path)) == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "final_model")
    shutil.rmtree(run / "step_2")
    earlier = (run / "metrics.jsonl").read_bytes()
    assert train.run(tiny_config(tmp_path)) == 0
    (previous,) = run.glob("previous-*")
    assert (previous / "metrics.jsonl").read_bytes() == earlier
    assert [record["step"] for record in read_metrics(run)] == [1, 2]


def test_a_damaged_log_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.run(tiny_config(tmp_path)) == 0
    record = (run / "config.yaml").read_bytes()
    (run / "metrics.jsonl").write_text("also mine\n")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 1: not a record of a step; fix it"):
        train.run(tiny_config(tmp_path, "training.num_train_steps=3"))
    assert (run / "config.yaml").read_bytes() == record


def test_failed_start_moves_nothing_aside(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    bad = tiny_config(tmp_path, "training.resume_from_checkpoint=false", "model.vocab_size=50")
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        train.run(bad)
    assert not list((tmp_path / "run").glob("previous-*"))
    assert (tmp_path / "run/step_2").is_dir()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("training.seed=1", "seed: 0 in the checkpoint, 1 now"),
        ("model.micro_batch_size=8", "micro_batch_size: 4 in the checkpoint, 8 now"),
        ("training.mlm_probability=0.3", "mlm_probability: 0.15 in the checkpoint, 0.3 now"),
        (
            "data.path={folder}/other.parquet",
            "corpus: {folder}/cells.parquet (60 cells, {tokens} tokens) in the checkpoint, "
            "{folder}/other.parquet (50 cells, {other_tokens} tokens) now",
        ),
        ("data.vocab_path={folder}/vocab.txt", "vocabulary: None in the checkpoint, {folder}/vocab.txt now"),
    ],
)
def test_changed_data_are_refused_unless_accepted(tmp_path: Path, change: str, shown: str) -> None:
    cells, other = make_cells(60), make_cells(50, seed=5)
    write_parquet(tmp_path / "other.parquet", other)
    genes = [f"gene_{i}" for i in range(2, 101)]
    (tmp_path / "vocab.txt").write_text("\n".join(["<pad>", "<mask>", *genes]) + "\n")
    assert train.run(tiny_config(tmp_path, "training.log_cell_ids=true")) == 0
    changed = [change.format(folder=tmp_path), "training.num_train_steps=4", "training.log_cell_ids=true"]
    with pytest.raises(ConfigError, match="step_2") as error:
        train.run(tiny_config(tmp_path, *changed))
    counts = {"tokens": f"{sum(map(len, cells)):,}", "other_tokens": f"{sum(map(len, other)):,}"}
    assert shown.format(folder=tmp_path, **counts) in str(error.value)
    assert "training.accept_changed_data=true" in str(error.value)
    assert (tmp_path / "run/step_2").is_dir()

    assert train.run(tiny_config(tmp_path, *changed, "training.accept_changed_data=true")) == 0
    packs = read_cells(tmp_path / "run")
    assert [(step, epoch) for step, epoch, _ in packs.values()] == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_other_content_under_the_same_name_is_told(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    write_parquet(tmp_path / "cells.parquet", [[cell[0], *cell[:0:-1]] for cell in make_cells(60)])
    told = r"/cells\.parquet \(60 cells, [\d,]+ tokens\) in the checkpoint, of other content now"
    with pytest.raises(ConfigError, match=told):
        train.run(tiny_config(tmp_path, "training.num_train_steps=4"))


def test_a_checkpoint_without_names_of_files_shows_hashes(tmp_path: Path) -> None:
    identity = open_training_data(tiny_config(tmp_path), is_main=False, pin_memory=False).fingerprint
    saved = asdict(identity) | {"corpus": "ab12"}
    with pytest.raises(ConfigError, match=r"corpus: 'ab12' in the checkpoint, cells\.parquet now"):
        identity.require_same(saved, "step_2", {"corpus": "cells.parquet"}, {})
