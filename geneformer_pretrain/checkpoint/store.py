"""Checkpoints that survive crashes: written aside, verified, committed by one rename.

A checkpoint is the folder `step_N`. The way of a save::

    step_N.tmp/            every rank writes its files and syncs them to disk
    step_N.tmp/manifest.json    rank 0: size and checksum of each file, versions, the trainer's state
    step_N/                rank 0 renames: the checkpoint exists from this instant, or not at all
    step_M.trash/          rank 0 renames what is no longer kept, then deletes it

A name `step_N` therefore never stands for something half written or half deleted, whenever the run is killed.
What a disk does to it later is found by `CheckpointStore.find_latest`, which checks every byte before any of
it is used.
"""

import json
import logging
import os
import platform
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from geneformer_pretrain.checkpoint.formats import FORMATS, CheckpointFormat
from geneformer_pretrain.checkpoint.manifest import (
    describe,
    read_manifest,
    signature,
    size_fault,
    stamp,
    sync_folder,
    write_manifest,
)
from geneformer_pretrain.checkpoint.shards import HostBuffers, Shards
from geneformer_pretrain.distributed.agreement import Ranks, on_all_ranks
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from geneformer_pretrain.files import delete_folder

__all__ = ["CheckpointError", "CheckpointSaveError", "CheckpointStore", "read_manifest"]

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(0|[1-9]\d*)")
_LEFTOVER = re.compile(r"(step_(?:0|[1-9]\d*))\.(tmp|replaced|trash)")


class CheckpointStore:
    """The checkpoints of one run, in one folder that all ranks share.

    Every method is collective: all ranks call it, in the same order, and all return or all raise.
    Without an initialised process group it serves the one process.

    Parameters
    ----------
    directory
        Made if it does not exist. What crashed saves left in it is removed.
    keep_last_n
        How many good checkpoints to keep, at least 1.
    timeout
        How long ranks wait for each other; longer than the slowest rank needs to write its files.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, or if the ranks do not see the same folder or torch version.
    """

    def __init__(self, directory: str | Path, *, keep_last_n: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        if keep_last_n < 1:
            raise ValueError(f"keep_last_n is {keep_last_n}: at least 1 checkpoint has to be kept")
        self.directory = Path(directory)
        self.keep_last_n = keep_last_n
        self.ranks = Ranks(timeout)
        self._host = HostBuffers()
        self._verified: dict[Path, object] = {}
        self._undeletable: set[Path] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self.ranks.require_equal({"torch version": str(torch.__version__)}, CheckpointError)
        self.ranks.require_shared_folder(self.directory, "training.checkpoint_dir", CheckpointError)
        self.ranks.run_on_rank0(self._tidy, CheckpointError)

    # Saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        format: str,
        *,
        blocking: bool = True,
    ) -> None:
        """Save a checkpoint, then prune older ones.

        Parameters
        ----------
        step
            Completed optimizer steps; a checkpoint of this step that exists already is replaced.
        tensors
            By canonical name: plain tensors, equal on all ranks, or `DTensor`, of any shape and type.
        state
            Whatever else is resumed, as JSON; stored in the manifest under "state".
        format
            "full" (one file, by rank 0) or "sharded" (each rank its shards).
        blocking
            If false, return when the tensors are copied to host memory; `wait` tells the outcome.

        Raises
        ------
        CheckpointSaveError
            On every rank, if any rank failed. If `blocking` is false, this tells of the save before, when
            that one failed in the background; the new one is then under way all the same.
        """
        if format not in FORMATS:
            raise ValueError(f"checkpoint format {format!r} is none of {sorted(FORMATS)}")
        failed_before: CheckpointSaveError | None = None
        try:
            self.wait()
        except CheckpointSaveError as error:
            failed_before = error
            if self.ranks.rank == 0:
                log.error("the save before failed in the background: %s", error)
        held: dict[str, Shards] = {}
        body: dict[str, Any] = {}

        def stage() -> int:
            # Read back, since JSON knows neither tuples nor numbers as keys.
            body.update(json.loads(json.dumps({"step": step, "format": format, "state": state})))
            if format == "full" and self.ranks.rank != 0:
                return step
            shards = {name: Shards.of(name, tensor) for name, tensor in tensors.items()}
            if format == "full":
                for name, parts in shards.items():
                    parts.whole(name)
            held.update(self._host.copy(shards, borrow=blocking))
            return step

        steps = self.ranks.run_on_all_ranks(stage, CheckpointSaveError)
        if len(set(steps)) > 1:
            raise CheckpointSaveError(f"the ranks are about to save different steps: {steps}")
        if blocking:
            self._write(step, held, body, FORMATS[format])
        else:
            self._in_flight = self._writer.submit(self._write, step, held, body, FORMATS[format])
            if failed_before is not None:
                raise failed_before

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises
        ------
        CheckpointSaveError
            If it failed; told once.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def _write(self, step: int, tensors: dict[str, Shards], body: dict[str, Any], format: CheckpointFormat) -> None:
        final = self.directory / f"step_{step}"
        temporary = self.directory / f"step_{step}.tmp"

        def make_folder() -> None:
            self._tidy()
            temporary.mkdir()

        def write_files() -> dict[str, dict[str, Any]]:
            names = format.write(temporary, tensors, self.ranks.group)
            return {name: describe(temporary / name) for name in names}

        try:
            self.ranks.run_on_rank0(make_folder, CheckpointSaveError)
            written = self.ranks.run_on_all_ranks(write_files, CheckpointSaveError)
            body["files"] = {name: entry for files in written for name, entry in sorted(files.items())}
            body["world_size"] = self.ranks.size
            body["torch"], body["python"] = str(torch.__version__), platform.python_version()
            body["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.ranks.run_on_rank0(lambda: self._commit(temporary, final, body), CheckpointSaveError)
        except CheckpointSaveError as error:
            if self.ranks.rank == 0:
                try:
                    self._tidy()
                except OSError as left:
                    log.error("could not clean up after a failed save: %s", left)
            raise CheckpointSaveError(
                f"saving {final} failed: {error}. Earlier checkpoints are untouched; see that training.checkpoint_dir "
                "has free space and may be written to."
            ) from None
        if self.ranks.rank == 0:
            try:
                self._prune(final)
            except OSError as error:
                log.error("saved %s, but could not delete what it supersedes: %s", final, error)

    def _commit(self, temporary: Path, final: Path, body: dict[str, Any]) -> None:
        fault = size_fault(temporary, body)
        if fault is not None:
            raise FileNotFoundError(f"{fault}, as rank 0 sees it: do all ranks share {self.directory}?")
        write_manifest(temporary, body)
        if os.path.lexists(final):
            final.rename(final.with_suffix(".replaced"))  # A crash before the next line is undone by _tidy.
        temporary.rename(final)
        sync_folder(self.directory)
        self._verified[final] = signature(final, body)

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the newest good checkpoints; damaged ones do not count as kept.

        Folders of later steps can only be damaged ones that this run went back behind. They are left for a
        look until the run comes by again.
        """
        if os.path.lexists(newest.with_suffix(".replaced")):
            self._discard(newest.with_suffix(".replaced"))
        kept = 1
        for folder in self._folders()[self._folders().index(newest) + 1 :]:
            if kept == self.keep_last_n:
                self._discard(folder)
            elif self._fault(folder) is None:
                kept += 1

    def _discard(self, folder: Path) -> None:
        """Delete a folder in such a way that a crash leaves nothing half deleted under a good name."""
        trash = folder.with_suffix(".trash")
        if os.path.lexists(trash):
            self._delete(trash)
        folder.rename(trash)
        self._delete(trash)
        self._verified.pop(folder, None)

    def _delete(self, folder: Path) -> None:
        """Delete a folder that no one needs; if that fails, say so once and let training go on."""
        try:
            delete_folder(folder)
        except OSError as error:
            if folder not in self._undeletable:
                log.error("could not delete %s: %s", folder, error)
            self._undeletable.add(folder)

    def _tidy(self) -> None:
        """Undo or finish what a crash or a failed save interrupted."""
        for path in sorted(self.directory.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if path.name.startswith(".probe-"):
                path.unlink()
            elif match and match[2] == "replaced" and not os.path.lexists(path.with_name(match[1])):
                path.rename(path.with_name(match[1]))
            elif match and match[2] == "replaced":
                self._discard(path)
            elif match:
                self._delete(path)

    # Finding and loading

    def find_latest(self) -> Path | None:
        """Return the newest checkpoint of which every byte is as it was written.

        Each damaged checkpoint that is newer is reported at level ERROR with the reason.

        Returns
        -------
        Path or None
            None if there is no step folder at all.

        Raises
        ------
        CheckpointError
            If there are step folders but none is good, or if the ranks do not see the same ones.
        """
        self.wait()
        self.ranks.require_equal({"checkpoints": self._listing()}, CheckpointError)
        faults: list[str] = []
        for folder in self._folders():
            fault = self._shared_fault(folder)
            if fault is None:
                if faults and self.ranks.rank == 0:
                    log.error("going back to the older checkpoint %s, which is good", folder)
                return folder
            faults.append(f"{folder}: {fault}")
            if self.ranks.rank == 0:
                log.error("checkpoint %s is damaged and will not be used: %s", folder, fault)
        if faults:
            error = CheckpointError(
                f"none of the checkpoints is good. {'; '.join(faults)}. Restore one of these folders from a copy, or "
                "start over with training.resume_from_checkpoint=false, which moves the earlier run aside"
            )
            raise on_all_ranks(error, self.ranks.size)
        return None

    def load(self, path: str | Path, targets: Mapping[str, torch.Tensor], *, optional: str | None = None) -> None:
        """Copy a checkpoint into `targets`, in place; nothing is changed unless everything fits.

        Parameters
        ----------
        path
            A step folder, as `find_latest` returns it; verified here unless it has been just now.
        targets
            By canonical name: plain tensors or `DTensor`, whichever way the checkpoint was saved.
        optional
            Names that start with this may be missing on either side; such targets stay as they are.

        Raises
        ------
        CheckpointError
            If a file is damaged or refused, or if names, shapes or types differ; lists all differences.
        """
        self.wait()
        folder = Path(path)
        self.ranks.require_equal({"checkpoint to load": (folder.name, stamp(folder))}, CheckpointError)
        fault = self._shared_fault(folder)
        if fault is not None:
            raise CheckpointError(f"{folder}: {fault}")
        format = FORMATS[read_manifest(folder)["format"]]
        wanted: dict[str, Shards] = {}

        def check() -> None:
            saved = format.index(folder)
            loose = {name for name in saved.keys() ^ targets.keys() if optional and name.startswith(optional)}
            wanted.update({name: Shards.of(name, tensor) for name, tensor in targets.items() if name not in loose})
            problems = [f"{name} is missing from the checkpoint" for name in wanted if name not in saved]
            problems += [f"{name} is in the checkpoint only" for name in saved.keys() - wanted.keys() - loose]
            problems += [
                f"{name} is {saved[name]} in the checkpoint, {shards.info} here"
                for name, shards in wanted.items()
                if name in saved and saved[name] != shards.info
            ]
            if problems:
                more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
                raise ValueError(f"{folder} does not fit this model: " + "; ".join(problems[:5]) + more)

        self.ranks.run_on_all_ranks(check, CheckpointError)
        self.ranks.run_on_all_ranks(lambda: format.read(folder, wanted), CheckpointError)

    def _folders(self) -> list[Path]:
        """Step folders, newest first, and links that should lead to one."""
        steps = (path for path in self.directory.iterdir() if _STEP.fullmatch(path.name))
        found = [path for path in steps if path.is_dir() or path.is_symlink()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def _listing(self) -> dict[str, str]:
        return {folder.name: stamp(folder) for folder in self._folders()}

    def _shared_fault(self, folder: Path) -> str | None:
        """As `_fault`, with the reading of the files divided among the ranks."""
        faults = self.ranks.gather(self._fault(folder, self.ranks.rank, self.ranks.size))
        found = next((fault for fault in faults if fault is not None), None)
        if found is not None:
            self._verified.pop(folder, None)
        return found

    def _fault(self, folder: Path, part: int = 0, parts: int = 1) -> str | None:
        """Say what is wrong with a checkpoint, reading every `parts`-th file; None if nothing."""
        try:
            manifest = read_manifest(folder)
            unchanged = signature(folder, manifest)
            if self._verified.get(folder) == unchanged:
                return None
            for name in sorted(manifest["files"])[part::parts]:
                if describe(folder / name) != manifest["files"][name]:
                    return f"{name} is not what was written (its checksum differs)"
        except (OSError, CheckpointError) as error:
            return str(error)
        self._verified[folder] = unchanged
        return None
