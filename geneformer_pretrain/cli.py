"""The command line `geneformer-pretrain COMMAND ...`: a table of commands, each in a module of its own.

A command module in `geneformer_pretrain.commands` has two functions. `add_arguments(parser)` declares its
arguments and imports nothing heavy, so that `--help` answers at once. `run(arguments)` does the work and returns a
`Summary`; it imports what it needs.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from geneformer_pretrain import __version__

COMMANDS: dict[str, str] = {
    "gene-set": "import, build, show and export gene sets: vocabularies with the medians that rank genes",
    "tokenize": "turn counts of genes in cells into a corpus of tokens",
    "plan": "size a run before it is started: memory, time, disk and cost, without a GPU",
    "curves": "draw the training curves of a run from its metrics.jsonl",
    "evaluate": "score the embeddings of labelled cells, beside baselines",
    "embed": "embed cells with a trained model",
    "export": "convert a checkpoint of a run to a plain Hugging Face BERT",
    "perturb": "delete, overexpress or shift genes in silico, and score what changes",
    "inspect": "report and draw what a corpus holds: lengths, genes, groups, padding saved, steps per epoch",
    "split": "split a corpus into a training and a held-out part, by cell or by whole groups",
}
"""Names of the commands, each with what it does; the module's name has underscores for dashes."""

RESUMABLE = ("tokenize", "embed", "perturb")
"""Commands that go on where they were stopped."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 if it succeeded, 1 if not."""
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    if "RANK" in os.environ:  # threads of a process group can abort the interpreter's teardown
        from geneformer_pretrain.run.signals import exit_without_teardown

        exit_without_teardown(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s")
    parser = _parser(arguments)
    parsed = parser.parse_args(arguments)
    from geneformer_pretrain.console import say
    from geneformer_pretrain.errors import UserError, explain

    module = import_module(_module(parsed.command))
    try:
        if parsed.report is not None:
            _require_report(Path(parsed.report), getattr(parsed, "output", None))
        summary = module.run(parsed)
        if os.environ.get("RANK", "0") == "0":
            for line in summary.lines:
                say(line)
            if parsed.report is not None:
                Path(parsed.report).write_text(json.dumps(summary.values, indent=1) + "\n")
    except KeyboardInterrupt:
        say(f"Interrupted.{_way_on(parsed)}", error=True)
        return 1
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else explain(error)
        if text is None:
            raise
        say(f"Error: {text}", error=True)
        return 1
    return 0


def _way_on(parsed: argparse.Namespace) -> str:
    """Sentence on how an interrupted command goes on, if it can; empty if not."""
    if parsed.command not in RESUMABLE or Path(parsed.output).is_file():  # that would have to be deleted first
        return ""
    return f" The same command{' without --overwrite' if parsed.overwrite else ''} goes on where it stopped."


def _require_report(path: Path, output: Path | str | None) -> None:
    """Raise an error, before the work, if the summary could not be written; it may lie in the new output."""
    from geneformer_pretrain.errors import OutputError, require
    from geneformer_pretrain.files import require_room_beside

    is_folder = path.parent.is_dir() or (output is not None and path.parent == Path(output))
    require(is_folder, f"--report {path}: there is no folder {path.parent}; make it, or correct the path.")
    require(not path.is_dir(), f"--report {path}: is a folder; name a file.")
    if not path.exists() and path.parent.is_dir():
        require_room_beside(path)
    elif path.is_file():  # and no pipe, whose reader would take closing it for the end
        try:
            path.open("ab").close()
        except OSError as error:
            raise OutputError(
                f"--report {path}: cannot be written to ({error.strerror}); name another file."
            ) from error


def _module(command: str) -> str:
    return f"geneformer_pretrain.commands.{command.replace('-', '_')}"


class _Parser(argparse.ArgumentParser):
    """Exits with 1 on a mistake, as every error of a command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"Error: {message}. `{self.prog} --help` lists the arguments.\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are values; for none, False and the empty text, the help itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, "") else action.help


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; only the command that is named gets its arguments."""
    parser = _Parser(
        prog="geneformer-pretrain",
        description="From counts to a pretrained Geneformer and what it knows. Training itself: torchrun train.py.",
        epilog="`geneformer-pretrain COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"geneformer-pretrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, text in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, formatter_class=_Help)
        if name == named:
            import_module(_module(name)).add_arguments(command)
            command.add_argument("--report", metavar="FILE", help="write the summary to this file, as JSON")
    return parser
