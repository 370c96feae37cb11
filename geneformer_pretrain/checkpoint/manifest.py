"""The manifest of a checkpoint: what was written, and the check that it is still so."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import xxhash

from geneformer_pretrain import __version__
from geneformer_pretrain.errors import CheckpointError
from geneformer_pretrain.files import sync_file, sync_folder

MANIFEST = "manifest.json"

FORMAT_VERSION = 2
"""Format of new checkpoints. Release 0.1 wrote format 1, whose manifests do not name it. Whatever a format is, its
manifest is checked as here: by its own checksum."""

_STEP = re.compile(r"step_(0|[1-9]\d*)")


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer release wrote, in a format that this one does not know."""


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Returns
    -------
    dict
        "format_version", "step", "world_size", "state", "files" (name -> size and checksum) and versions.

    Raises
    ------
    NewerFormatError
        If a newer release wrote it.
    CheckpointError
        If it is missing, torn or altered, or belongs to another folder.
    """
    file = Path(path) / MANIFEST
    try:
        text = file.read_bytes().decode()
        body = json.loads(text)
        del body["checksum"]
        intact = _render(body) == text
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    if not intact:
        raise CheckpointError(f"{file} is damaged (its own checksum differs)")
    version = body.setdefault("format_version", 1)
    if version not in range(1, FORMAT_VERSION + 1):
        raise NewerFormatError(
            f"{path} was written by a newer release ({body.get('release')}, checkpoint format {version}); this one, "
            f"{__version__}, reads formats up to {FORMAT_VERSION}. Go on with that release, or start a new run in "
            "another training.checkpoint_dir"
        )
    if Path(path).name != f"step_{body.get('step')}":
        raise CheckpointError(f"{file} is the manifest of step {body.get('step')}")
    return body


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write the manifest of the files in `folder` and bring all of it onto the disk."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(_render(body))
        sync_file(file)
    sync_folder(folder)


def _render(body: dict[str, Any]) -> str:
    """Return a manifest's text with its own checksum in it; equal contents give equal bytes."""
    checksum = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "checksum": checksum}, sort_keys=True, indent=1) + "\n"


def step_folders(directory: Path) -> list[Path]:
    """List the step folders, newest first, and links that should lead to one."""
    steps = (path for path in directory.iterdir() if _STEP.fullmatch(path.name))
    found = [path for path in steps if path.is_dir() or path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step of a step folder."""
    return int(folder.name.removeprefix("step_"))


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> CheckpointError | None:
    """Return the reason why a checkpoint cannot be used, or None.

    Parameters
    ----------
    part, parts
        Ranks share the reading: of the sorted files, only every `parts`-th from number `part` on is read here.
    """
    try:
        manifest = read_manifest(folder)
        mtime_signature(folder, manifest)
        for name in sorted(manifest["files"])[part::parts]:
            if file_checksum(folder / name) != manifest["files"][name]:
                return CheckpointError(f"{name} is not what was written (its checksum differs)")
    except CheckpointError as error:
        return error
    except OSError as error:
        return CheckpointError(str(error))
    return None


def file_checksum(file: Path) -> dict[str, Any]:
    """Return size and checksum of a file, reading all of it."""
    with open(file, "rb") as content:
        checksum = hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
    return {"size": file.stat().st_size, "checksum": checksum}


def find_missing_or_resized(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Name a file that is missing or has another size than it had; None if all are there."""
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    return None


def mtime_signature(folder: Path, manifest: dict[str, Any]) -> object:
    """Return a value that changes when a file is written to: files verified before need not be read again.

    Raises
    ------
    CheckpointError
        If a file is missing or has the wrong size.
    """
    fault = find_missing_or_resized(folder, manifest)
    if fault is not None:
        raise CheckpointError(fault)
    return manifest_hash(folder), tuple((folder / name).stat().st_mtime_ns for name in sorted(manifest["files"]))


def manifest_hash(folder: Path) -> str:
    """Identify a checkpoint by its manifest, readable or not."""
    try:
        return xxhash.xxh3_128((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        return str(error.strerror)
