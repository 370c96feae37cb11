"""What a new run moves aside, and what it leaves alone."""

from pathlib import Path

import pytest

from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.run.archive import archive_run
from geneformer_pretrain.training import main as train
from tests.checkpoints import assert_holds, names, save
from tests.tiny import (
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    tiny_config,
)


def test_checkpoints_moved_aside_are_whole(tmp_path: Path) -> None:
    assert archive_run(tmp_path / "none") is None
    assert archive_run(tmp_path) is None
    moved = []
    for step in (1, 2):
        save(CheckpointStore(tmp_path, keep_last_n=2), step)
        (tmp_path / "metrics.jsonl").write_text(str(step))
        (tmp_path / "cells").mkdir()
        (tmp_path / "cells/rank_0.jsonl").touch()
        previous = archive_run(tmp_path)
        assert previous is not None
        moved.append(previous)
    assert names(tmp_path) == sorted(path.name for path in moved)
    for step, previous in enumerate(moved, start=1):
        assert names(previous) == ["cells", "metrics.jsonl", f"step_{step}"]
        assert_holds(CheckpointStore(previous, keep_last_n=2), step)
    assert CheckpointStore(tmp_path, keep_last_n=2).find_latest() is None


def test_only_what_a_run_wrote_is_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be that of all runs, or of the whole project."""
    config = tiny_config(tmp_path, "training.log_cell_ids=true")
    assert train.run(config) == 0
    run = tmp_path / "run"
    written = names(run)
    assert {"cells", "config.yaml", "final_model", "metrics.jsonl", "step_2"} <= set(written)
    foreign = [
        "other_run",
        "corpus.parquet",
        "final_model.old",
        "hang",
        "notes.txt",
        "step_2.old",
        "step_x",
        "train.py",
    ]
    for name in ("other_run/step_1", "hang", "step_x", "step_2.old", "final_model.old"):
        (run / name).mkdir(parents=True)
    for name in (
        "hang/man.txt",
        "corpus.parquet",
        "notes.txt",
        "train.py",
        "cells/notes.txt",
        "cells/rank_0 (1).jsonl",
    ):
        (run / name).touch()
    again = tiny_config(tmp_path, "training.resume_from_checkpoint=false", "training.log_cell_ids=true")
    assert train.run(again) == 0
    (previous,) = run.glob("previous-*")
    assert names(previous) == written
    assert names(run) == sorted([*written, *foreign, previous.name])
    assert names(previous / "cells") == ["rank_0.jsonl"]
    assert names(run / "cells") == ["notes.txt", "rank_0 (1).jsonl", "rank_0.jsonl"]
    assert f"The earlier run in {run} is in {previous} now." in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_configuration_of_something_else_is_not_overwritten(tmp_path: Path, resume: str) -> None:
    (tmp_path / "run/final_model").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("mine: true\n")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 10}\n')
    with pytest.raises(TrainingError, match=r"run/config\.yaml is not of a run, .* move the file away"):
        train.run(tiny_config(tmp_path, f"training.resume_from_checkpoint={resume}"))
    assert (tmp_path / "run/config.yaml").read_text() == "mine: true\n"
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 10}\n'
    assert names(tmp_path / "run") == ["config.yaml", "exit.json", "final_model", "metrics.jsonl"]


def test_a_log_of_something_else_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 10}\n')
    assert train.run(tiny_config(tmp_path)) == 0
    (previous,) = (tmp_path / "run").glob("previous-*")
    assert (previous / "metrics.jsonl").read_text() == '{"step": 10}\n'
