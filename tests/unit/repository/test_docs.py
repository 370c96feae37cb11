"""The documentation against the code: keys and defaults, commands, snippets, files and what a run writes."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.data import DataConfig
from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.config.training import TrainingConfig
from geneformer_pretrain.training import main as train
from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.tiny import VOCAB_SIZE, overrides, read_metrics

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
AGENTS = (ROOT / "AGENT_DOCUMENTATION.md").read_text()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
# What tells history may name keys and files that are gone.
HISTORY = ("CHANGELOG.md", "LOG.md")
GENERATED = "internal/gitingest.txt"
PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md") if path.name not in HISTORY)

NAMES = ("l0_sanity", "10m", "106m", "4b")
GROUPS: dict[str, type] = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
KEYS = [f"{group}.{field.name}" for group, kind in GROUPS.items() for field in fields(kind)]


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


def value_of(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def parsed(cell: str, name: str) -> Any:
    """The value that a cell shows for the configuration `name`, read as Hydra reads YAML."""
    assert re.fullmatch(r"`[^`]+`", cell), f"{cell} is not one piece of code"
    return OmegaConf.to_container(OmegaConf.create(f"x: {cell[1:-1].replace('NAME', name)}"))["x"]  # type: ignore[index, call-overload]


def type_in_words(kind: Any) -> str:
    if type(None) in get_args(kind):
        return f"{type_in_words(get_args(kind)[0])} or null"
    if get_origin(kind) is dict:
        return "mapping"
    if issubclass(kind, StrEnum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return str(kind.__name__)


# --- configuration ----------------------------------------------------------------------------------------


def test_configuration_lists_each_key_once_in_order() -> None:
    listed = [row[0] for group in GROUPS for row in rows(section(CONFIGURATION, group))]
    assert listed == [f"`{key}`" for key in KEYS]


@pytest.mark.parametrize("key", KEYS)
def test_types_and_defaults(key: str, configs: dict[str, Config]) -> None:
    """The default is the value of all four configurations, or the table of differences has each of them."""
    group, name = key.split(".")
    ((_, kind, default, meaning),) = (row for row in rows(section(CONFIGURATION, group)) if row[0] == f"`{key}`")
    assert kind == type_in_words(get_type_hints(GROUPS[group])[name])
    assert meaning
    differences = rows(section(CONFIGURATION, "What the configurations change"))
    shown = [row[1:] for row in differences if row[0] == f"`{key}`"]
    if default == "differs":
        (cells,) = shown
    else:
        assert not shown, f"{key} has a default and stands in the table of differences"
        cells = [default] * len(NAMES)
    for cell, (config_name, config) in zip(cells, configs.items(), strict=True):
        value = value_of(config, key)
        assert parsed(cell, config_name) == (value.value if isinstance(value, StrEnum) else value)


def test_table_of_differences_has_the_configurations_as_columns() -> None:
    assert "| key | " + " | ".join(f"`{name}`" for name in NAMES) + " |" in CONFIGURATION


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    code = " ".join(re.findall(r"`[^`\n]+`", page.read_text()))
    named = set(re.findall(r"(?<![\w./])(?:model|training|data)\.[a-z]\w*", code)) - {"model.safetensors", "data.md"}
    assert not named - set(KEYS)


def test_sizes_are_true(configs: dict[str, Config]) -> None:
    shapes = {row[0].split("`")[1]: row[1:] for row in rows(section(README, "Configurations"))}
    assert list(shapes) == list(NAMES)
    for name, config in configs.items():
        model = config.model
        with torch.device("meta"):
            parameters = BertForMaskedLM(BertConfig(**model.architecture())).num_parameters()
        assert f"{parameters:,} (" in CONFIGURATION
        size = f"{parameters / 1e9:.1f} billion" if parameters > 1e9 else f"{parameters / 1e6:.1f}M"
        assert shapes[name] == [
            f"{model.num_hidden_layers}, {model.hidden_size}, {model.intermediate_size}, {model.num_attention_heads}",
            size,
            f"{model.token_budget:,}",
            "Transformer Engine" if model.use_te_layers else "PyTorch",
        ]


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
        elif word == "--cfg":
            assert next(words) in ("all", "job", "hydra")
        else:
            assert "=" in word, f"{word!r} in {command!r} is neither an option nor KEY=VALUE"
            given.append(word)
    assert name in NAMES
    load_config(name, given)


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
        assert at_root
        assert not [name for name in at_root if not (ROOT / name).exists()]


def test_layout_names_every_file() -> None:
    """Tests may be named by their folder."""
    named = {name for row in rows(section(AGENTS, "Layout")) for name in re.findall(r"`([^`]+)`", row[0])}
    gone = [name for name in named if not (ROOT / name).exists()]
    assert not gone, f"in AGENT_DOCUMENTATION.md's layout, but not there: {gone}"
    folders = tuple(f"{name}/" for name in named if (ROOT / name).is_dir())
    unnamed = [name for name in repository_files() - named - {GENERATED} if not name.startswith(folders)]
    assert not unnamed, f"give each a line in AGENT_DOCUMENTATION.md, under Layout: {sorted(unnamed)}"


# --- a run and its export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the README's snippets find the export of a tiny run, the second one in its place."""
    folder = tmp_path_factory.mktemp("readme")
    given = overrides(
        folder,
        f"training.checkpoint_dir={folder / 'checkpoints/l0_sanity'}",
        f"data.validation_path={folder / 'cells.parquet'}",
        "training.log_cell_ids=true",
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
    paragraph = next(part for part in AGENTS.split("\n\n") if part.startswith("`metrics.jsonl`, one object"))
    documented = set(re.findall(r"`(\w+)`", paragraph)) - {"null"}
    recorded = set(read_metrics(folder / "checkpoints/l0_sanity")[-1])
    assert documented == recorded | {"peak_memory_gib"}


def test_snippets_run_on_an_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both classes, as the README uses them, agree wherever there is a token."""
    monkeypatch.chdir(folder)
    stock: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    snippets = fences(README, "python")
    assert len(snippets) == 2
    for snippet, names in zip(snippets, (stock, ours), strict=True):
        exec(compile(snippet, "README.md", "exec"), names)
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
