"""The documentation against the code: keys and defaults, commands, snippets, files and what a run writes."""

import argparse
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from docs import make_configuration
from geneformer_pretrain.cli import COMMANDS
from geneformer_pretrain.config.compose import CONFIG_DIR, all_keys, choices, load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.training import main as train
from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.tiny import VOCAB_SIZE, overrides, read_metrics

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
AGENTS = (ROOT / "AGENT_DOCUMENTATION.md").read_text()
INFERENCE = (ROOT / "docs/inference.md").read_text()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
# History (also docs/log/) may name keys and files that are gone.
HISTORY = ("CHANGELOG.md",)
GENERATED = "internal/gitingest.txt"
PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md") if path.name not in HISTORY)
MARKDOWN = sorted(
    {
        *ROOT.glob("*.md"),
        *(path for name in ("docs", "examples", "sample_data", "tests") for path in (ROOT / name).rglob("*.md")),
    }
)

NAMES = tuple(choices(CONFIG_DIR))
KEYS = all_keys()


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    return {name: load_config(name) for name in NAMES}


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    (level, start) = next((len(m[1]), m.end()) for m in re.finditer(rf"^(#+) {heading}$", text, re.MULTILINE))
    end = re.search(rf"^#{{1,{level}}} ", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


def rows(text: str) -> list[list[str]]:
    """Cells of every table row that begins with code, headers left out."""
    lines = re.findall(r"^\| (`.+) \|$(?!\n\|---)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def fences(text: str, language: str) -> list[str]:
    """Contents of all fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# --- configuration ----------------------------------------------------------------------------------------


def test_page_of_keys_is_current() -> None:
    assert make_configuration.render(CONFIGURATION) == CONFIGURATION, "run `make docs`"


def test_every_key_has_a_row_with_its_meaning() -> None:
    listed = [row for group in ("model", "training", "data") for row in rows(section(CONFIGURATION, group))]
    assert [row[0] for row in listed] == [f"`{key}`" for key in KEYS]
    assert all(len(row) == 4 and len(row[3]) > 10 for row in listed)


@pytest.mark.parametrize("value", [None, True, False, 0, 7, 0.02, 1e-8, 7e-4, 0.9, 600.0, "a", {"a": "b", "c": None}])
def test_shown_values_mean_what_they_show(value: Any) -> None:
    assert make_configuration.read_value(make_configuration.as_yaml(value)) == value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    code = " ".join(re.findall(r"`[^`\n]+`", page.read_text()))
    named = set(re.findall(r"(?<![\w./])(?:model|training|data)\.[a-z]\w*", code)) - {"model.safetensors", "data.md"}
    assert not named - set(KEYS)


def test_sizes_are_true(configs: dict[str, Config]) -> None:
    """The README's table of configurations: architecture, parameters, and a checkpoint of 12 bytes a parameter."""
    shapes = {row[0].split("`")[1]: row[1:] for row in rows(section(README, "Configurations"))}
    assert {*shapes, "l0_sanity"} == set(NAMES)
    for name, shown in shapes.items():
        model = configs[name].model
        with torch.device("meta"):
            parameters = BertForMaskedLM(BertConfig(**model.architecture())).num_parameters()
        assert f"{parameters:,}" in CONFIGURATION
        size = f"{parameters / 1e9:.1f} billion" if parameters > 1e9 else f"{parameters / 1e6:.1f}M"
        assert shown[:2] == [
            f"{model.num_hidden_layers}, {model.hidden_size}, {model.intermediate_size}, {model.num_attention_heads}",
            size,
        ]
        assert float(shown[-1].split()[0]) == pytest.approx(12 * parameters / 1e9, rel=0.03)


# --- commands ---------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page and command, what it passes to train.py) of every such command in a fenced block."""
    for page in PAGES:
        for block in fences(page.read_text(), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for entry in ("train.py", "slurm/train.sbatch"):
                    if entry in words:
                        yield f"{page.name}: {line}", words[words.index(entry) + 1 :]
                if words[:2] == ["make", "train"]:
                    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
                    yield f"{page.name}: {line}", shlex.split(" ".join(arguments))


def test_commands_are_found() -> None:
    assert len(list(commands())) >= 15


@pytest.mark.parametrize(("command", "arguments"), [pytest.param(*case, id=case[0]) for case in commands()])
def test_every_command_composes(command: str, arguments: list[str]) -> None:
    name, given = "l0_sanity", []
    words = iter(arguments)
    for word in words:
        if word == "--config-name":
            name = next(words)
        elif word == "--config-path":
            next(words)
        elif word == "--cfg":
            assert next(words) in ("all", "job", "hydra")
        else:
            assert "=" in word, f"{word!r} in {command!r} is neither an option nor KEY=VALUE"
            given.append(word)
    if name != "config":  # that of a run, with --config-path
        load_config(name, given)


def tool_commands() -> Iterator[tuple[str, list[str]]]:
    """(page and command, arguments) of every `geneformer-pretrain ...` in a fenced block."""
    for page in MARKDOWN:
        for block in fences(page.read_text(), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for entry in ("geneformer-pretrain", "geneformer_pretrain"):
                    if entry in words:
                        yield f"{page.name}: {line}", words[words.index(entry) + 1 :]


def test_tool_commands_are_found() -> None:
    assert {arguments[0] for _, arguments in tool_commands()} == set(COMMANDS) - {"export"}


@pytest.mark.parametrize(("command", "arguments"), [pytest.param(*case, id=case[0]) for case in tool_commands()])
def test_every_tool_command_parses(command: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"geneformer_pretrain.commands.{arguments[0].replace('-', '_')}").add_arguments(parser)
    parser.parse_args(arguments[1:])


# --- files ------------------------------------------------------------------------------------------------


def repository_files() -> set[str]:
    """Files that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listing.split("\0") if name and (ROOT / name).is_file()}


def written_by_a_run() -> list[str]:
    """Paths in the README's tree of a run's folder, relative to it."""
    (tree,) = fences(section(README, "What a run writes"), "text")
    return re.findall(r"^    (\S+)", tree, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """Paths with a folder that lies in the repository, and names of files at its root."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    code = re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|txt|parquet|sbatch|sh))`", page.read_text())
    inside = [name for name in code if name.split("/")[0] in folders and name != GENERATED]
    missing = [name for name in inside if not (ROOT / name).exists()]
    assert not missing
    if page.name == "README.md":
        at_root = [name for name in code if "/" not in name and name not in written_by_a_run()]
        assert not [name for name in at_root if not (ROOT / name).exists()]


def test_layout_names_every_wing() -> None:
    """Every top-level file or folder, and every wing of the package, has a line; all that is named exists."""
    named = {name for row in rows(section(AGENTS, "Layout")) for name in re.findall(r"`([^`]+)`", row[0])}
    gone = [name for name in named if not (ROOT / name).exists()]
    assert not gone, f"in AGENT_DOCUMENTATION.md's layout, but not there: {gone}"
    package = "geneformer_pretrain/"
    parts = {tuple(Path(name).parts) for name in repository_files()}
    top = {part[0] + "/" * (len(part) > 1) for part in parts if part[0] + "/" != package}
    wings = {package + part[1] + "/" * (len(part) > 2) for part in parts if part[0] + "/" == package}
    unnamed = (top | wings) - named
    assert not unnamed, f"give each a line in AGENT_DOCUMENTATION.md, under Layout: {sorted(unnamed)}"


# --- words and lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """At most 120 characters, tables and code apart."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.startswith("|")]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_the_fields_words(page: Path) -> None:
    private = r"\b(?:is|are|be|was|were) told\b|\btold (?:by|apart)\b|what surrounds|who holds|is told|\btelling\b"
    assert not re.findall(private, page.read_text())


# --- a run and its export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the snippets find the export of a tiny run, the second one in its place."""
    folder = tmp_path_factory.mktemp("readme")
    given = overrides(
        folder,
        f"training.checkpoint_dir={folder / 'checkpoints/l0_sanity'}",
        f"data.validation_path={folder / 'cells.parquet'}",
        "training.log_cell_ids=true",
        "training.keep_best=true",
        "training.learning_rate=1e-2",
    )
    assert train.run(load_config(overrides=given)) == 0
    assert train.run(load_config(overrides=[*given, "training.resume_from_checkpoint=false"])) == 0
    assert train.run(load_config(overrides=[*given, "training.num_train_steps=3"])) == 0
    return folder


def test_a_run_writes_what_the_readme_says(folder: Path) -> None:
    run = folder / "checkpoints/l0_sanity"
    listed = [name for name in written_by_a_run() if name != "wandb/"]  # this run was not tracked
    for name in listed:
        pattern = re.sub(r"_[NR]\b", "_*", name).replace("TIME", "*")
        assert list(run.glob(pattern.rstrip("/"))), name
    top = {re.sub(r"_[NR]\b", "_*", name).replace("TIME", "*").split("/")[0] for name in listed}
    unlisted = [path.name for path in run.iterdir() if not any(path.match(pattern) for pattern in top)]
    assert not unlisted, f"{unlisted} are written but not in the README"


def test_recorded_metrics_are_the_documented_ones(folder: Path) -> None:
    """In the tables of steps and of validations, but for what this run has no occasion for."""
    of_steps = section(CONFIGURATION, "Watching a run")
    of_validations = section((ROOT / "docs/data.md").read_text(), "Validation")
    first_cells = " ".join(row[0] for text in (of_steps, of_validations) for row in rows(text))
    documented = set(re.findall(r"`(\w+)`", first_cells))  # neither `validation_*` nor `validation_loss/VALUE`
    recorded = {key for record in read_metrics(folder / "checkpoints/l0_sanity") for key in record}
    assert documented == recorded | {"peak_memory_gib", "save_seconds", "outlier_steps"}


def test_snippets_run_on_an_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both classes, as docs/inference.md uses them, agree wherever there is a token."""
    monkeypatch.chdir(folder)
    stock: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    snippets = fences(INFERENCE, "python")
    assert len(snippets) == 2
    for snippet, names in zip(snippets, (stock, ours), strict=True):
        exec(compile(snippet, "docs/inference.md", "exec"), names)
    assert torch.equal(stock["input_ids"], ours["input_ids"])
    assert stock["logits"].shape == ours["logits"].shape == (2, 4, VOCAB_SIZE)
    valid = ours["attention_mask"].bool()
    assert_close(ours["logits"][valid].float(), stock["logits"][valid], atol=0.02, rtol=0.02)
    assert not ours["logits"][~valid].any()
    assert stock["classifier"].num_labels == 3
    assert ours["embeddings"].shape == (2, 32)
    assert ours["embeddings"].abs().sum(1).min() > 0
    assert all(parameter.grad is not None for parameter in ours["model"].parameters())


def test_contract_of_from_pretrained(folder: Path) -> None:
    """The call that downstream code makes, with the older names of arguments."""
    path = folder / "checkpoints/l0_sanity/final_model"
    model = BertForMaskedLM.from_pretrained(path, torch_dtype=torch.bfloat16, trust_remote_code=True)
    outputs = model(torch.tensor([[5, 6, 7]]))
    assert outputs.prediction_logits is outputs.logits
    assert outputs.logits.dtype == torch.bfloat16
    assert json.loads((path / "config.json").read_text())["model_type"] == "bert"
