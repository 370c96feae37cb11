"""config.yaml: the configuration of a run, its resolved choices, versions and code."""

import json
import platform
import subprocess
from dataclasses import asdict
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import OmegaConf

from geneformer_pretrain import __version__
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.files import replacing

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "pyarrow",
    "numpy",
    "numba",
    "hydra-core",
    "transformer-engine",
    "megatron-fsdp",
)

CONFIG_FILE = "config.yaml"
OLD_CONFIG_PREFIX = "config_until_step_"
"""File-name prefix of superseded configurations."""


def package_versions() -> dict[str, str]:
    """Return the versions of this project, of Python and of the installed packages that matter to a run."""
    versions = {"geneformer-pretrain": __version__, "python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_revision() -> str:
    """Return the revision of the code, with "-dirty" where files were changed; "unknown" outside of a git checkout."""
    here = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def code_digest() -> str:
    """Hash the source files; a git revision would not tell which of a node's files were changed."""
    package = Path(__file__).resolve().parents[1]
    digest = xxhash.xxh3_128()
    for path in [package.parent / "modeling_bert_te.py", *sorted(package.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity_of_rank(config: Config) -> dict[str, Any]:
    """Return the values that must be equal on all ranks: configuration, versions, code."""
    values = {f"{group}.{key}": value for group, keys in asdict(config).items() for key, value in keys.items()}
    return values | package_versions() | {"source code": code_digest()}


def config_as_yaml(config: Config) -> str:
    """Write the composed configuration as YAML."""
    plain = json.loads(json.dumps(asdict(config), default=lambda x: x.value if isinstance(x, Enum) else x))
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def is_record(path: Path) -> bool:
    """True if `write_run_record` wrote the file, and not someone else under the same name."""
    return path.is_file() and b"\ngit_revision:" in path.read_bytes()


def write_run_record(config: Config, resolved: Resolved, folder: Path, step: int) -> list[str]:
    """Write config.yaml: the composed configuration, resolved choices, package versions and git revision.

    Where `step` steps are done already and the record changes, their record is kept as
    config_until_step_N.yaml. Records of later steps, which will be made again, are deleted.

    Returns
    -------
    One line for each key that changed, with its earlier value and its new one.
    """
    path = folder / CONFIG_FILE
    origin = OmegaConf.to_yaml(
        OmegaConf.create(
            {"resolved": resolved.values(), "versions": package_versions(), "git_revision": git_revision()}
        )
    )
    record = config_as_yaml(config) + origin
    changes = []
    if step:
        names = {
            found.stem.removeprefix(OLD_CONFIG_PREFIX): found for found in folder.glob(f"{OLD_CONFIG_PREFIX}*.yaml")
        }
        kept = {int(number): found for number, found in names.items() if number.isdecimal()}
        undone = [kept[number] for number in sorted(kept) if number > step]
        made_with = undone[0] if undone else path
        if made_with.exists():
            changes = _changes(made_with, record)
        if changes and step not in kept:
            made_with.rename(folder / f"{OLD_CONFIG_PREFIX}{step}.yaml")
        for gone in undone:
            gone.unlink(missing_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(record)
    return changes


def _changes(path: Path, record: str) -> list[str]:
    try:
        earlier, now = (_flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (path.read_text(), record))
    except Exception as error:  # A damaged record does not keep the run from going on.
        return [f"{path.name}: the earlier one cannot be read ({type(error).__name__}: {error})"]
    keys = dict.fromkeys([*now, *earlier])
    shown = {key: (_shown(earlier, key), _shown(now, key)) for key in keys}
    return [f"{key}: {before} -> {after}" for key, (before, after) in shown.items() if before != after]


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    return values[key] if isinstance(values[key], str) else json.dumps(values[key])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
