"""Training curves from metrics.jsonl: what is drawn, what is torn, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from geneformer_pretrain.cli import main
from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.run.curves import draw_curves, read_records


def write_metrics(path: Path, steps: int, torn: str = "") -> Path:
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 8 / step, "learning_rate": 1e-4, "tokens_per_second": 1e5 + step}
        if step == 3:
            record["loss"] = None
        if step % 10 == 0:
            record |= {"validation_loss": 9 / step, "validation_unigram_loss": 7.5}
        lines.append(json.dumps(record) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines) + torn)
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_curves_hold_the_metrics(tmp_path: Path, drawn: list[Figure]) -> None:
    last = draw_curves(write_metrics(tmp_path / "metrics.jsonl", 30), tmp_path / "curves.png")
    assert last == {
        "step": 30,
        "loss": 8 / 30,
        "learning_rate": 1e-4,
        "tokens_per_second": 100_030,
        "validation_loss": 9 / 30,
        "validation_unigram_loss": 7.5,
    }
    loss, rate, speed = drawn[0].axes
    training, validation, unigram = loss.lines
    assert list(unigram.get_ydata()) == [7.5, 7.5]
    assert list(training.get_xdata()) == [step for step in range(1, 31) if step != 3]
    assert list(validation.get_xdata()) == [10, 20, 30]
    assert list(validation.get_ydata()) == [9 / 10, 9 / 20, 9 / 30]
    assert list(rate.lines[0].get_ydata()) == [1e-4] * 30
    assert list(speed.lines[0].get_ydata())[-1] == 100_030
    assert imread(tmp_path / "curves.png").shape[:2] == (960, 1080)
    assert not list(tmp_path.glob(".*"))


def test_long_runs_are_smoothed_and_outliers_do_not_set_the_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 5.0, "learning_rate": 1e-4, "tokens_per_second": 1e5} for step in range(1, 4001)]
    records[7]["loss"] = 1e9
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(metrics, tmp_path / "curves.png")
    faint, smooth = drawn[0].axes[0].lines
    assert len(faint.get_xdata()) == 4000
    assert len(smooth.get_xdata()) == 200
    assert max(smooth.get_ydata()) == 5
    assert drawn[0].axes[0].get_ylim()[1] < 10


def test_torn_last_line_is_left_out(tmp_path: Path) -> None:
    records, last = read_records(write_metrics(tmp_path / "metrics.jsonl", 5, torn='{"step": 6, "lo'))
    assert last["step"] == 5
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory; name the training.checkpoint_dir of a run"),
        ("", "no step is recorded yet"),
        ('{"step": 1}\n{"loss": 2}\n', "line 2: not a record of a step"),
        ("1\n", "line 1: not a record of a step"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(DataError, match=said):
        draw_curves(metrics, tmp_path / "curves.png")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "metrics.jsonl", 2)
    with pytest.raises(OutputError, match=r"none/curves\.png: cannot be written"):
        draw_curves(metrics, tmp_path / "none/curves.png")


def test_command_draws_into_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path / "run/metrics.jsonl", 20)
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as ending:
        main(["curves", str(tmp_path / "run"), "--report", str(report)])
    assert ending.value.code == 0
    assert "step 20: loss 0.4000, validation_loss 0.4500" in capsys.readouterr().out
    picture = tmp_path / "run/training_curves.png"
    assert json.loads(report.read_text())["picture"] == str(picture)
    assert imread(picture).shape[2] == 4
