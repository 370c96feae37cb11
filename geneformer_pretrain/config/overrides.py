"""What is typed on the command line: KEY=VALUE as Hydra reads it, and names of configurations, with plain errors."""

import re
import shlex
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from geneformer_pretrain.errors import ConfigError, require

CONFIG_DIR = Path(__file__).resolve().parents[2] / "hydra_config"


IS_PART = """is it part of a value with a space? Quote that for the shell and for Hydra: 'KEY="VALUE"'."""
CONFIGURATIONS, MODELS = (CONFIG_DIR, "defaults"), (CONFIG_DIR / "model", "geneformer_v1")
"""Folders with a file for each choice, and the file that the others share."""


def read_overrides(overrides: list[str]) -> list[Override]:
    """Read KEY=VALUE as Hydra does.

    Raises
    ------
    ConfigError
        What Hydra cannot read, with the quotes that it needs: Hydra's own error has no advice. Several values at once.
    """
    parser = OverridesParser.create()
    read = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(_advice(text)) from error
        require(
            not override.is_sweep_override(),
            f"{text}: these are several values, for several runs; start one run a command. A text with commas needs "
            f"quotes, for Hydra and for the shell: {_quoted(text)}",
        )
        read.append(override)
    return read


def without_plus(override: str) -> str:
    """Let keys within the mapping that takes any be given as others are, where Hydra wants a plus before new ones."""
    return f"++{override}" if re.match(r"training\.wandb_init_args[.=]", override) else override


def _advice(text: str) -> str:
    """What to say of what Hydra cannot read."""
    _, is_pair, value = text.partition("=")
    if not is_pair:
        meant = f"did you mean --config-name {text}?" if text in choices(*CONFIGURATIONS) else IS_PART
        return f"{text!r} is not KEY=VALUE: {meant}"
    advice = f"{text}: Hydra cannot read this. See that the key is a name and that quotes and brackets are closed"
    with suppress(HydraException):
        OverridesParser.create().parse_override(shlex.split(_quoted(text))[0])
        if not value.startswith(("{", "[", "'", '"')) and "${" not in value:
            advice += "; text with =, ~ or other special characters needs quotes, for Hydra and for the shell: "
            advice += _quoted(text)
    return advice


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    value = value.replace('"', r"\"")
    return shlex.quote(f'{key}="{value}"')


def choices(folder: Path, shared: str) -> list[str]:
    """Names of a folder's YAML files, other than the one that the others share."""
    return sorted({path.stem for path in folder.glob("*.yaml")} - {shared})


def check_choice(kind: str, name: str, folder: Path, shared: str) -> None:
    """Raise ConfigError for a name that a folder has no YAML file for, or a file that is not YAML."""
    names = choices(folder, shared)
    meant = " or ".join(get_close_matches(name, names, 2))
    suggestion = f"did you mean {meant}? " if meant else ""
    choice = f"{folder.relative_to(CONFIG_DIR.parent)}/ has {', '.join(names)}."
    plain = name.removesuffix(".yaml")
    path = folder / f"{plain}.yaml"
    require(plain != shared and path.is_file(), f"Unknown {kind} {name!r}: {suggestion}{choice}")
    try:
        OmegaConf.load(path)
    except (YAMLError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
