"""Progress: a bar on a terminal, plain lines at a bounded rate elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from geneformer_pretrain import console
from geneformer_pretrain.console import Progress, amount
from geneformer_pretrain.run.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock; set its only element to the seconds."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert not out
    assert "\r" not in err
    return err.splitlines()


def test_lines_are_bounded_by_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10_000, "tokenize", "cell") as progress:
        for _ in range(1000):
            clock[0] += 0.125
            progress.advance(10)
    assert lines(capsys) == [
        "tokenize: 2,400 of 10,000 cells, 80/s, 1.6 min left",
        "tokenize: 4,800 of 10,000 cells, 80/s, 1.1 min left",
        "tokenize: 7,200 of 10,000 cells, 80/s, 0.6 min left",
        "tokenize: 9,600 of 10,000 cells, 80/s, 0.1 min left",
        "tokenize: 10,000 of 10,000 cells, 80/s",
    ]


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (0, ("cell",), "0 cells"),
        (1, ("cell",), "1 cell"),
        (2000, ("cell",), "2,000 cells"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_a_count_and_its_noun(count: int, nouns: tuple[str, ...], text: str) -> None:
    assert amount(count, *nouns) == text


@pytest.mark.parametrize(("total", "said"), [(1, "train: 0 of 1 step"), (None, "train: 0 steps")])
def test_progress_of_a_single_step(total: int | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Progress(total, "train", "step", exact=True)
    assert lines(capsys) == [said]


def test_short_work_prints_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, "tokenize", "cell") as progress:
        clock[0] = 29.0
        progress.advance(10)
    with Progress(10, "embed", "cell", enabled=False, exact=True) as progress:
        clock[0] = 90.0
        progress.advance(10)
    assert lines(capsys) == []


def test_steps_are_announced_and_end_with_their_loss(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, 20, 25, [])
    assert lines(capsys) == []
    log.start()
    for step in range(21, 26):
        clock[0] += 20.0
        log.advance(step, 7.0 + step, 1e-3, 1e5, 5.0 if step == 21 else 20.0)
    log.close()
    log.close()
    assert lines(capsys) == [
        "train: 20 of 25 steps",
        "train: 22 of 25 steps, 1.0 min left, loss 29.0000, lr 1.00e-03, 12.50 s a step, 8,000 tokens/s",
        "train: 24 of 25 steps, 0.3 min left, loss 31.0000, lr 1.00e-03, 20.00 s a step, 5,000 tokens/s",
        "train: 25 of 25 steps, loss 32.0000, lr 1.00e-03, 20.00 s a step, 5,000 tokens/s",
    ]


BAR = """
from geneformer_pretrain.console import Progress
with Progress(3, "train", "step", exact=True) as progress:
    for step in range(3):
        progress.advance(1, f"loss {step}")
"""


@pytest.mark.process
def test_a_terminal_gets_a_bar() -> None:
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, stderr=terminal, check=True)
    os.close(terminal)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert re.search(r"\rtrain: 100%\|[^/]*\| 3/3 \[00:0\d<00:00, loss 2\]", shown)


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a path under an ASCII locale; nothing else is dropped."""
    written = io.BytesIO()
    monkeypatch.setattr(console.sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    console.say("output ümlaut")
    console.say("more")
    assert written.getvalue() == b"output \\xfcmlaut\nmore\n"
