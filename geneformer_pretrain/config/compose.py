"""Compose a configuration from `hydra_config/` and the command line."""

import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError, require

CONFIG_DIR = Path(__file__).resolve().parents[2] / "hydra_config"
DEFAULT_NAME = "l0_sanity"
SHARED = ("defaults", "geneformer_v1", "geneformer_v2")
"""Files that other configurations include; not choices of their own."""

RECORDED = ("versions", "git_revision", "resolved")
"""Keys that a run adds to its config.yaml, which may be given as a configuration again."""


def load_config(
    name: str = DEFAULT_NAME,
    overrides: Sequence[str] = (),
    *,
    config_path: str | None = None,
    config_dir: str | None = None,
) -> Config:
    """Compose `NAME.yaml` with overrides and check it.

    Parameters
    ----------
    name
        A file of `hydra_config/`, or of the folder `config_path`.
    overrides
        KEY=VALUE as on the command line.
    config_path
        Folder to use in place of `hydra_config/`, such as a run's own.
    config_dir
        A further folder to find configurations in.

    Raises
    ------
    ConfigError
        Naming the key, file or option, and what may have been meant.
    """
    for option, given_folder in (("--config-path", config_path), ("--config-dir", config_dir)):
        require(
            given_folder is None or Path(given_folder).is_dir(),
            f"{option}: no folder {given_folder}; correct the path.",
        )
    read = read_overrides(overrides)
    searches = config_dir is not None or any(override.key_or_group == "hydra.searchpath" for override in read)
    if config_path is None and not searches:  # Other folders may have other choices, and other keys to use in them.
        check_choice("configuration", name, CONFIG_DIR)
        check_keys(read)
    given = [_without_plus(override) for override in overrides]
    folder = CONFIG_DIR if config_path is None else Path(config_path).resolve()
    if config_dir is not None:  # Hydra looks for the named configuration in the first folder alone.
        own, shared = Path(config_dir).resolve(), folder
        folder = own if (own / f"{name.removesuffix('.yaml')}.yaml").is_file() else shared
        given.append(f"hydra.searchpath=[file://{own if folder == shared else shared}]")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return check(compose(name.removesuffix(".yaml"), overrides=given))
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error


def check(composed: DictConfig) -> Config:
    """Type, complete and check a composed configuration.

    Raises
    ------
    ConfigError
        Naming the offending key.
    """
    with open_dict(composed):
        for key in RECORDED:
            composed.pop(key, None)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), composed)
        missing = sorted(OmegaConf.missing_keys(typed))
        require(not missing, f"No value for {', '.join(missing)}; give each one in YAML or as KEY=VALUE.")
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise unknown_key(str(error.full_key)) from error
    except OmegaConfBaseException as error:
        bad_key, reason = getattr(error, "full_key", None), str(error).splitlines()[0]
        named = f"Configuration key {bad_key}: {reason}" if bad_key else reason
        raise ConfigError(f"{named}. docs/configuration.md lists the values of each key.") from error
    assert isinstance(config, Config)
    return config


def read_command_line(arguments: Sequence[str]) -> Namespace:
    """Read the arguments of `train.py` as Hydra does, in any order.

    Returns
    -------
    Namespace
        Hydra's, with `shows` beside: true if the arguments ask to print something and run nothing, and `ordered`:
        the same arguments as Hydra's own parser accepts them, overrides first.

    Raises
    ------
    ConfigError
        For a multirun.
    """
    given = get_args_parser().parse_intermixed_args(list(arguments))
    require(
        not given.multirun,
        "--multirun is not supported; start one run a command, each with its own training.checkpoint_dir.",
    )
    given.shows = any((given.help, given.hydra_help, given.cfg, given.info, given.shell_completion))
    own = {id(override) for override in given.overrides}  # An option may have a value that reads the same.
    options = [argument for argument in arguments if id(argument) not in own and argument != "--"]
    given.ordered = [*(_without_plus(override) for override in given.overrides), *options]
    return given


def read_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse KEY=VALUE as Hydra does.

    Raises
    ------
    ConfigError
        For text that Hydra cannot read, with the quotes that it needs; for several values at once.
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


def check_keys(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for the first key that does not exist; Hydra's own advice would be to add it."""
    groups = {group.name for group in fields(Config)}
    known = {*all_keys(), *groups}
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if re.split("[./]", key)[0] != "hydra" and ".".join(key.split(".")[:2]) not in known:
            raise unknown_key(key)
        if key == "model" and isinstance(value, str) and "${" not in value:
            check_choice("model", value, CONFIG_DIR / "model")


def unknown_key(key: str) -> ConfigError:
    """Make the error for a key that does not exist, with the one whose name is most like it."""
    names = [*all_keys(), *(group.name for group in fields(Config))]
    known = {name.rpartition(".")[2]: name for name in names}
    meant = [known[name] for name in get_close_matches(key.rpartition(".")[2], known, 1)]
    suggestion = f"did you mean {meant[0]}?" if meant else "if it is part of a value with a space, quote that value."
    return ConfigError(f"Unknown configuration key {key}: {suggestion} docs/configuration.md lists all keys.")


def all_keys() -> list[str]:
    """List every key, as GROUP.KEY."""
    return [f"{name}.{field.name}" for name, group in get_type_hints(Config).items() for field in fields(group)]


def choices(folder: Path) -> list[str]:
    """List the names of a folder's configurations."""
    return sorted({path.stem for path in folder.glob("*.yaml")} - set(SHARED))


def check_choice(kind: str, name: str, folder: Path) -> None:
    """Raise ConfigError for a name that a folder has no YAML file for, or for a file that is not YAML."""
    plain, names = name.removesuffix(".yaml"), choices(folder)
    path = folder / f"{plain}.yaml"
    meant = " or ".join(get_close_matches(name, names, 2))
    suggestion = f"did you mean {meant}? " if meant else ""
    require(plain in names, f"Unknown {kind} {name!r}: {suggestion}{folder.name}/ has {', '.join(names)}.")
    try:
        OmegaConf.load(path)
    except (YAMLError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _without_plus(override: str) -> str:
    """Make Hydra accept new keys within the mapping that may have any, which it would want a plus for."""
    return f"++{override}" if re.match(r"training\.wandb_init_args[.=]", override) else override


def _advice(text: str) -> str:
    """Explain why Hydra cannot read an override, and offer quotes if they help."""
    _, is_pair, value = text.partition("=")
    if not is_pair:
        is_name = text in choices(CONFIG_DIR)
        meant = f"did you mean --config-name {text}?" if is_name else "is it part of a value with a space? Quote that."
        return f"{text!r} is not KEY=VALUE: {meant}"
    advice = f"{text}: Hydra cannot read this. See that the key is a name and that quotes and brackets are closed"
    with suppress(HydraException):
        OverridesParser.create().parse_override(shlex.split(_quoted(text))[0])
        if not value.startswith(("{", "[", "'", '"')) and "${" not in value:
            advice += f"; special characters need quotes, for Hydra and for the shell: {_quoted(text)}"
    return advice


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    value = value.replace('"', r"\"")
    return shlex.quote(f'{key}="{value}"')
