"""What identifies a run: its configuration, the versions it ran with, the cells that it saw."""

import json
import platform
import re
import subprocess
from dataclasses import asdict
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash
from omegaconf import OmegaConf

from geneformer_pretrain.checkpoint.manifest import sync_file
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.batch import BatchMetadata
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.run.metrics import JsonLines, cut_back

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

RECORD = "config.yaml"
KEPT = "config_until_step_"
"""Start of the names of records that another one followed."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to a run."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_revision() -> str:
    """Revision of the code, with "-dirty" where files were changed; "unknown" outside of a git checkout."""
    here = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def code_digest() -> str:
    """Hash of the source files; a git revision would not tell which of a node's files were changed."""
    package = Path(__file__).resolve().parents[1]
    digest = xxhash.xxh3_128()
    for path in [package.parent / "modeling_bert_te.py", *sorted(package.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity_of_rank(config: Config) -> dict[str, Any]:
    """What must be the same on all ranks before they can agree on anything else: configuration, versions, code."""
    values = {f"{group}.{key}": value for group, keys in asdict(config).items() for key, value in keys.items()}
    return values | package_versions() | {"source code": code_digest()}


def config_as_yaml(config: Config) -> str:
    """The composed configuration as YAML."""
    plain = json.loads(json.dumps(asdict(config), default=lambda x: x.value if isinstance(x, Enum) else x))
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def is_record(path: Path) -> bool:
    """Whether a file was written by `write_run_record`, and not by someone else under the same name."""
    return path.is_file() and b"\ngit_revision:" in path.read_bytes()


def write_run_record(config: Config, folder: Path, step: int) -> list[str]:
    """Write config.yaml: the composed configuration, package versions and git revision.

    Where `step` steps are done already and the record changes, the one that they were made with is kept as
    config_until_step_N.yaml. Records of later steps, which will be made again, go.

    Returns
    -------
    One line for each key that changed, with its earlier value and its new one.
    """
    path = folder / RECORD
    origin = OmegaConf.to_yaml(OmegaConf.create({"versions": package_versions(), "git_revision": git_revision()}))
    record = config_as_yaml(config) + origin
    changes = []
    if step:
        names = {found.stem.removeprefix(KEPT): found for found in folder.glob(f"{KEPT}*.yaml")}
        kept = {int(number): found for number, found in names.items() if number.isdecimal()}
        undone = [kept[number] for number in sorted(kept) if number > step]
        made_with = undone[0] if undone else path
        if made_with.exists():
            changes = _changes(made_with, record)
        if changes and step not in kept:
            made_with.rename(folder / f"{KEPT}{step}.yaml")
        for gone in undone:
            gone.unlink(missing_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(record)
        sync_file(file)
    temporary.replace(path)
    return changes


def _changes(path: Path, record: str) -> list[str]:
    try:
        earlier, now = (_flat(OmegaConf.to_container(OmegaConf.create(text))) for text in (path.read_text(), record))
    except Exception as error:  # Whatever is wrong with it, it does not keep the run from going on.
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


class CellLog:
    """Appends the cell numbers of each micro-batch to cells/rank_R.jsonl.

    Parameters
    ----------
    folder
        Checkpoint folder.
    world
        This process among all.
    first_step
        Records of later steps, of a run that was cut off, are dropped. Ranks share the files that a run on
        more ranks left.
    """

    def __init__(self, folder: Path, world: World, first_step: int) -> None:
        (folder / "cells").mkdir(exist_ok=True)
        own = folder / "cells" / f"rank_{world.rank}.jsonl"
        for path in (folder / "cells").iterdir():
            match = re.fullmatch(r"rank_(\d+)\.jsonl", path.name)
            if match and int(match[1]) % world.size == world.rank and path != own:
                cut_back(path, first_step)
        self.file = JsonLines(own, first_step)

    def write(self, step: int, batch: BatchMetadata) -> None:
        """Record one micro-batch of the optimizer step that completes `step` steps."""
        record: dict[str, Any] = {"step": step, "pack": batch.pack, "epoch": batch.epoch}
        self.file.write({**record, "cells": batch.cells.tolist()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
