"""The command line: its table, help that imports nothing heavy, summaries and plain errors."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from geneformer_pretrain import cli
from geneformer_pretrain.console import Summary
from geneformer_pretrain.errors import DataError

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numba", "anndata", "pandas", "transformers", "pyarrow", "hydra", "matplotlib", "sklearn", "numpy"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    code = f"""
import sys
from geneformer_pretrain.cli import main
try:
    main(["{name}", "--help"])
except SystemExit as ending:
    assert ending.code == 0
print(sorted({HEAVY} & sys.modules.keys()), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: geneformer-pretrain" in ended.stdout
    assert "--report" in ended.stdout or name == "gene-set"
    assert ended.stderr.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "gene-set"])
def test_help_shows_defaults_that_are_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(name, "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert not any(f"(default: {nothing})" in out for nothing in ("None", "False", ""))
    assert ("(default: -2)" in out) is (name in ("embed", "perturb", "evaluate"))


@pytest.mark.parametrize("name", ["embed", "perturb", "evaluate"])
def test_a_layer_of_counts_has_an_option_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(name, "model", "cells.h5ad", "--layer", "counts") == 1
    assert "name a layer of counts with --counts-layer" in capsys.readouterr().err


def test_every_module_of_a_command_is_in_the_table() -> None:
    modules = {path.stem for path in (ROOT / "geneformer_pretrain/commands").glob("*.py")} - {"__init__"}
    named = {name.replace("-", "_") for name in cli.COMMANDS}
    assert named <= modules
    assert all(not hasattr(import_module(f"geneformer_pretrain.commands.{name}"), "run") for name in modules - named)


def end_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a command `try` into the table; set `run` to what it does."""
    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--size", type=int), run=None)
    monkeypatch.setitem(cli.COMMANDS, "try", "a trial")
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    return module


def test_a_summary_is_printed_and_reported(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = lambda arguments: Summary([f"size {arguments.size}"], {"size": arguments.size})
    assert end_of("try", "--size", "3", "--report", str(tmp_path / "report.json")) == 0
    assert capsys.readouterr().out == "size 3\n"
    assert json.loads((tmp_path / "report.json").read_text()) == {"size": 3}


@pytest.mark.parametrize(("report", "said"), [("none/report.json", "there is no folder"), (".", "is a folder")])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str, said: str
) -> None:
    command.run = lambda arguments: pytest.fail("ran")
    assert end_of("try", "--report", str(tmp_path / report)) == 1
    assert capsys.readouterr().err.startswith(f"Error: --report {tmp_path / report}: {said}")


def test_a_report_in_a_place_that_cannot_be_written_to(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = lambda arguments: pytest.fail("ran")
    for place, why in (("/proc/report.json", "/proc cannot"), ("/proc/version", "cannot")):  # new, and there already
        assert end_of("try", "--report", place) == 1
        assert f"{place}: {why} be written to (" in capsys.readouterr().err


def test_an_earlier_report_is_kept_until_the_next_and_a_pipe_is_no_file(
    command: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text("earlier")

    def run(arguments: SimpleNamespace) -> Summary:
        if arguments.report != "/dev/stdout":
            assert Path(arguments.report).read_text() == "earlier"
        return Summary(values={"a": 1})

    command.run = run
    assert end_of("try", "--report", str(tmp_path / "report.json")) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
    assert end_of("try", "--report", "/dev/stdout") == 0


def test_a_report_may_lie_in_the_new_output(command: SimpleNamespace, tmp_path: Path) -> None:
    def run(arguments: SimpleNamespace) -> Summary:
        Path(arguments.output).mkdir()
        return Summary()

    command.run, command.add_arguments = run, lambda parser: parser.add_argument("--output")
    assert end_of("try", "--output", str(tmp_path / "new"), "--report", str(tmp_path / "new/report.json")) == 0
    assert (tmp_path / "new/report.json").read_text() == "{}\n"


def test_a_report_that_fails_after_the_work_is_one_line(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()

    def run(arguments: object) -> Summary:
        (tmp_path / "folder").rmdir()
        return Summary(["done"])

    command.run = run
    assert end_of("try", "--report", str(tmp_path / "folder/report.json")) == 1
    printed = capsys.readouterr()
    assert printed.out == "done\n"
    assert printed.err == f"Error: {tmp_path}/folder/report.json: No such file or directory\n"


def test_help_texts_are_of_one_style() -> None:
    assert all(text[0].islower() and not text.endswith(".") for text in cli.COMMANDS.values())


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (DataError("cells.h5ad, row 3: bad"), "Error: cells.h5ad, row 3: bad\n"),
        (FileNotFoundError(2, "No such file or directory", "x"), "Error: x: No such file or directory\n"),
        (KeyboardInterrupt(), "Interrupted.\n"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_1(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], error: BaseException, printed: str
) -> None:
    def fail(arguments: object) -> Summary:
        raise error

    command.run = fail
    assert end_of("try") == 1
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("options", "output", "said"),
    [
        ([], None, " The same command goes on where it stopped."),
        (["--overwrite"], None, " The same command without --overwrite goes on where it stopped."),
        (["--overwrite"], "a finished file, which the command would refuse", ""),
    ],
)
@pytest.mark.parametrize("words", [["embed", "model", "cells"], ["perturb", "model", "cells"], ["tokenize", "cells"]])
def test_what_goes_on_after_an_interrupt_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
    options: list[str], output: str | None, said: str,
) -> None:  # fmt: skip
    def interrupt(arguments: object) -> Summary:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"geneformer_pretrain.commands.{words[0]}"), "run", interrupt)
    if output is not None:
        (tmp_path / "out").write_text(output)
    needed = {"tokenize": ["--gene-set", "genes"], "perturb": ["--mode", "delete"]}.get(words[0], [])
    assert end_of(*words, "--output", str(tmp_path / "out"), *needed, *options) == 1
    assert capsys.readouterr().err == f"Interrupted.{said}\n"


def test_a_bug_keeps_its_traceback(command: SimpleNamespace) -> None:
    def fail(arguments: object) -> Summary:
        raise KeyError("a bug")

    command.run = fail
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["try"])


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [(["nonsense"], "invalid choice: 'nonsense'"), (["try", "--size", "x"], "argument --size: invalid int value: 'x'")],
)
def test_wrong_arguments_exit_with_1(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], printed: str
) -> None:
    assert end_of(*arguments) == 1
    assert printed in capsys.readouterr().err
