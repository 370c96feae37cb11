"""Writes the tables of docs/configuration.md from the typed configuration and the values in hydra_config/.

usage: python -m docs.make_configuration
"""

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from geneformer_pretrain.config.compose import CONFIG_DIR, all_keys, choices, load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.model.memory import num_parameters

PAGE = Path(__file__).with_name("configuration.md")
NAMES = sorted(choices(CONFIG_DIR), key=("l0_sanity", "10m", "106m", "4b", "v2_104m", "v2_316m").index)
DIFFERS = "differs"


def meanings(group: type) -> dict[str, str]:
    """Read the docstring below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(definition, ast.ClassDef)
    found, name = {}, ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
            name = ""
    return found


def mark_code(text: str) -> str:
    """Put names of keys, of files and of special values into backticks."""
    keys = sorted({*all_keys(), *(key.partition(".")[2] for key in all_keys() if "_" in key)}, key=len, reverse=True)
    files = ("metrics.jsonl", "config.yaml", "exit.json", "final_model/", "best_model/", "previous-TIME/", "wandb.init")
    words = [*keys, *files, "cells/rank_R.jsonl", "input_ids", "save_to_disk", "null", "<mask>", "WANDB_API_KEY"]
    pattern = "|".join(re.escape(word) for word in words)
    return re.sub(rf"(?<![\w.`/])(?:{pattern})(?:=\w+)?(?![\w`/])", lambda found: f"`{found[0]}`", text)


def type_in_words(kind: Any) -> str:
    """Name a type as a user writes its values."""
    if type(None) in get_args(kind):
        return f"{type_in_words(get_args(kind)[0])} or null"
    if get_origin(kind) is dict:
        return "mapping"
    if issubclass(kind, StrEnum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return str(kind.__name__)


def as_yaml(value: Any) -> str:
    """Write a value as on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, StrEnum):
        return value.value
    return re.sub(r"e-0*", "e-", f"{value:.0e}") if isinstance(value, float) and 0 < value < 1e-3 else str(value)


def shown_values(configs: Mapping[str, Config], key: str) -> list[str]:
    """List a key's value in each configuration; one that is the configuration's own name is written as NAME."""
    group, name = key.split(".")
    shown = []
    for config_name, config in configs.items():
        text = as_yaml(getattr(getattr(config, group), name))
        is_named_after_it = key in ("training.checkpoint_dir", "training.wandb_init_args")
        shown.append(text.replace(config_name, "NAME") if is_named_after_it else text)
    return shown


def tables() -> dict[str, str]:
    """Make the generated parts of the page, by the name of their marker."""
    configs = {name: load_config(name) for name in NAMES}
    values = {key: shown_values(configs, key) for key in all_keys()}
    differing = {key: shown for key, shown in values.items() if len(set(shown)) > 1}
    lines = ["| key | " + " | ".join(f"`{name}`" for name in NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    lines += [f"| `{key}` | " + " | ".join(f"`{value}`" for value in shown) + " |" for key, shown in differing.items()]
    sizes = [f"{num_parameters(config.model):,}" for config in configs.values()]
    lines.append("| parameters | " + " | ".join(sizes) + " |")
    parts = {"differences": "\n".join(lines)}
    for group, kind in get_type_hints(Config).items():
        types, meaning = get_type_hints(kind), meanings(kind)
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name in (field.name for field in fields(kind)):
            key = f"{group}.{name}"
            default = DIFFERS if key in differing else f"`{values[key][0]}`"
            lines.append(f"| `{key}` | {type_in_words(types[name])} | {default} | {mark_code(meaning[name])} |")
        parts[group] = "\n".join(lines)
    return parts


def render(page: str) -> str:
    """Return the page with its generated parts made anew, each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in tables().items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}{found[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        assert count == 1, f"docs/configuration.md has {count} parts called {name}"
    return page


def read_value(text: str) -> Any:
    """Read a value of the page as Hydra reads it."""
    return OmegaConf.to_container(OmegaConf.create(f"x: {text}"))["x"]  # type: ignore[index, call-overload]


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    print(f"wrote {PAGE}")
