"""The table of faults injected and survived, and runs that are gone when their test ends."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.launcher import Run
from tests.forks import start_forkserver


@dataclass
class Row:
    """One line of the table: a test counts each fault when it is injected, and again when it was survived."""

    promise: int
    fault: str
    injected: int = 0
    survived: int = 0


ROWS = pytest.StashKey[dict[tuple[int, str], Row]]()

Tally = Callable[[int, str], Row]
Start = Callable[..., Run]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return `tally(promise, fault)`, which gives the line to count on."""
    rows = request.config.stash.setdefault(ROWS, {})
    return lambda promise, fault: rows.setdefault((promise, fault), Row(promise, fault))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table in the form in which docs/reliability.md keeps it."""
    rows = config.stash.get(ROWS, {})
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.line("| promise | fault | injected | survived |")
    terminalreporter.line("|---|---|---|---|")
    for row in sorted(rows.values(), key=lambda row: (row.promise, row.fault)):
        terminalreporter.line(f"| {row.promise} | {row.fault} | {row.injected} | {row.survived} |")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return `start(arguments, size, fault=None, folders=None)`, which starts a `Run` of `train.py`."""
    start_forkserver()
    runs: list[Run] = []
    logs = tmp_path / "logs"
    logs.mkdir()

    def begin(*args: object, **kwargs: object) -> Run:
        runs.append(Run(logs, *args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
