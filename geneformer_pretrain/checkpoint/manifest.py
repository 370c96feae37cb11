"""The manifest of a checkpoint: what was written, so that it can be told whether it still is."""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import xxhash

from geneformer_pretrain.errors import CheckpointError

MANIFEST = "manifest.json"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: "step", "format", "world_size", "state", "files" and versions.

    Raises
    ------
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
    if Path(path).name != f"step_{body['step']}":
        raise CheckpointError(f"{file} is the manifest of step {body['step']}")
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


def describe(file: Path) -> dict[str, Any]:
    """Return size and checksum of a file, reading all of it."""
    with open(file, "rb") as content:
        checksum = hashlib.file_digest(content, xxhash.xxh3_128).hexdigest()
    return {"size": file.stat().st_size, "checksum": checksum}


def size_fault(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Say which file is missing or has another size than it had; None if all are there."""
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
    return None


def signature(folder: Path, manifest: dict[str, Any]) -> object:
    """Return a value that changes when a file is written to: what was verified need not be read again.

    Raises
    ------
    CheckpointError
        If a file is missing or has the wrong size.
    """
    fault = size_fault(folder, manifest)
    if fault is not None:
        raise CheckpointError(fault)
    return stamp(folder), tuple((folder / name).stat().st_mtime_ns for name in sorted(manifest["files"]))


def stamp(folder: Path) -> str:
    """Identify a checkpoint by its manifest, readable or not."""
    try:
        return xxhash.xxh3_128((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        return str(error.strerror)


def sync_file(file: IO[Any]) -> None:
    """Bring everything written to `file` so far onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk: a file or a rename is not safe before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
