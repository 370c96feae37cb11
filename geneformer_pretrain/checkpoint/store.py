"""Checkpoints that survive crashes: written aside, verified, committed by one rename.

A checkpoint is the folder `step_N`. A save takes these steps::

    step_N.tmp/            every rank writes its file and syncs it to disk
    step_N.tmp/manifest.json    rank 0: size and checksum of each file, versions, the trainer's state
    step_N/                rank 0 renames: the checkpoint exists from this instant, or not at all
    step_M.trash/          rank 0 renames what is no longer kept, then deletes it

A name `step_N` therefore never stands for something half written or half deleted, whenever the run is killed.
Damage that a disk does later is found by `CheckpointStore.find_latest`, which checks every byte before any of
it is used.
"""

import json
import logging
import os
import platform
import re
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from geneformer_pretrain import __version__
from geneformer_pretrain.checkpoint.formats import open_tensors, write_tensors
from geneformer_pretrain.checkpoint.host import HostBuffers
from geneformer_pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    NewerFormatError,
    file_checksum,
    find_damage,
    find_missing_or_resized,
    manifest_hash,
    mtime_signature,
    read_manifest,
    step_folders,
    step_of,
    write_manifest,
)
from geneformer_pretrain.checkpoint.shards import Shards, StoredTensor
from geneformer_pretrain.distributed.agreement import Ranks, on_all_ranks
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from geneformer_pretrain.files import delete_folder, sync_folder

log = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"(step_(?:0|[1-9]\d*))\.(tmp|replaced|trash)")


class CheckpointStore:
    """The checkpoints of one run, in one folder that all ranks share.

    Every method is collective: all ranks call it, in the same order, and all return or all raise.
    Without an initialised process group it serves the one process.

    Parameters
    ----------
    directory
        Made if it does not exist. Leftovers of crashed saves in it are removed.
    keep_last_n
        How many good checkpoints to keep, at least 1.
    timeout
        How long ranks wait for each other; longer than the slowest rank needs to write its file.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to, or if the ranks do not see the same folder.
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
        self.ranks.require_shared_folder(self.directory, "training.checkpoint_dir", CheckpointError)
        self.ranks.run_on_rank0(self._recover, CheckpointError)

    # Saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        *,
        protected: Collection[int] = (),
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
        protected
            Steps whose checkpoints are not pruned, beside the newest `keep_last_n`.
        blocking
            If false, return when the tensors are copied to host memory. `wait`, to be called before the next save,
            raises if the save failed.

        Raises
        ------
        CheckpointSaveError
            On every rank, if any rank failed.
        """
        if self._in_flight is not None:
            raise RuntimeError("a save is in flight: wait for it first")
        held: dict[str, Shards] = {}
        body: dict[str, Any] = {}

        def stage() -> int:
            # Read back, since JSON knows neither tuples nor numbers as keys.
            body.update(json.loads(json.dumps({"step": step, "state": state})))
            rank, size = self.ranks.rank, self.ranks.size
            shards = {name: Shards.to_save(name, tensor, rank, size) for name, tensor in tensors.items()}
            held.update(self._host.copy(shards, borrow=blocking))
            return step

        steps = self.ranks.run_on_all_ranks(stage, CheckpointSaveError)
        if len(set(steps)) > 1:
            raise CheckpointSaveError(f"the ranks are about to save different steps: {steps}")
        if blocking:
            self._write(step, held, body, frozenset(protected))
        else:
            self._in_flight = self._writer.submit(self._write, step, held, body, frozenset(protected))

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises
        ------
        CheckpointSaveError
            If it failed; raised once.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def _write(self, step: int, tensors: dict[str, Shards], body: dict[str, Any], protected: frozenset[int]) -> None:
        final = self.directory / f"step_{step}"
        temporary = self.directory / f"step_{step}.tmp"

        def make_folder() -> None:
            self._recover()
            temporary.mkdir()

        def write_files() -> dict[str, dict[str, Any]]:
            names = write_tensors(temporary, self.ranks.rank, tensors)
            return {name: file_checksum(temporary / name) for name in names}

        try:
            self.ranks.run_on_rank0(make_folder, CheckpointSaveError)
            written = self.ranks.run_on_all_ranks(write_files, CheckpointSaveError)
            body["format_version"], body["release"] = FORMAT_VERSION, __version__
            body["files"] = {name: entry for files in written for name, entry in sorted(files.items())}
            body["world_size"] = self.ranks.size
            body["torch"], body["python"] = str(torch.__version__), platform.python_version()
            body["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self.ranks.run_on_rank0(lambda: self._commit(temporary, final, body), CheckpointSaveError)
        except CheckpointSaveError as error:
            if self.ranks.rank == 0:
                try:
                    self._recover()
                except OSError as left:
                    log.error("could not clean up after a failed save: %s", left)
            raise CheckpointSaveError(
                f"saving {final} failed: {error}. Earlier checkpoints are untouched; see that training.checkpoint_dir "
                "has free space and may be written to."
            ) from None
        if self.ranks.rank == 0:
            try:
                self._prune(final, protected)
            except OSError as error:
                log.error("saved %s, but could not delete what it supersedes: %s", final, error)

    def _commit(self, temporary: Path, final: Path, body: dict[str, Any]) -> None:
        fault = find_missing_or_resized(temporary, body)
        if fault is not None:
            raise FileNotFoundError(f"{fault}, as rank 0 sees it: do all ranks share {self.directory}?")
        write_manifest(temporary, body)
        if os.path.lexists(final):
            final.rename(final.with_suffix(".replaced"))  # A crash before the next line is undone by _recover.
        temporary.rename(final)
        sync_folder(self.directory)
        self._verified[final] = mtime_signature(final, body)

    def _prune(self, newest: Path, protected: frozenset[int]) -> None:
        """Delete what is older than the newest good checkpoints; damaged ones do not count as kept.

        Folders of later steps can only be damaged ones that this run went back behind. They are left for a
        look until the run comes by again.
        """
        if os.path.lexists(newest.with_suffix(".replaced")):
            self._discard(newest.with_suffix(".replaced"))
        kept = 1
        for folder in step_folders(self.directory):
            if step_of(folder) >= step_of(newest):
                continue
            if kept < self.keep_last_n:
                kept += self._verify(folder) is None
            elif step_of(folder) not in protected:
                self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """Delete a folder in such a way that a crash leaves nothing half deleted under a good name."""
        trash = folder.with_suffix(".trash")
        if os.path.lexists(trash):
            self._delete(trash)
        folder.rename(trash)
        self._delete(trash)
        self._verified.pop(folder, None)

    def _delete(self, folder: Path) -> None:
        """Delete a folder that no one needs; if that fails, log it once and let training go on."""
        try:
            delete_folder(folder)
        except OSError as error:
            if folder not in self._undeletable:
                log.error("could not delete %s: %s", folder, error)
            self._undeletable.add(folder)

    def _recover(self) -> None:
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

        Each damaged checkpoint that is newer is logged at level ERROR with the reason.

        Returns
        -------
        Path or None
            None if there is no step folder at all.

        Raises
        ------
        CheckpointError
            If there are step folders but none is good, if the ranks do not see the same ones, or if the newest that
            is not damaged was written by a newer release.
        """
        self.wait()
        listing = self.ranks.run_on_all_ranks(self._listing, CheckpointError)[self.ranks.rank]
        self.ranks.require_equal(listing, CheckpointError)
        faults: list[str] = []
        for folder in (self.directory / name for name in listing):
            fault = self._verify_on_all_ranks(folder)
            if fault is None:
                if faults and self.ranks.rank == 0:
                    log.error("going back to the older checkpoint %s, which is good", folder)
                return folder
            if isinstance(fault, NewerFormatError):
                raise on_all_ranks(fault, self.ranks.size)
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
            By canonical name: plain tensors or `DTensor`, whichever engine and number of ranks saved them.
        optional
            Names that start with this may be missing on either side; such targets stay as they are.

        Raises
        ------
        CheckpointError
            If a file is damaged or refused, or if names, shapes or types differ; lists the differences.
        """
        self.wait()
        folder = Path(path)
        self.ranks.require_equal({f"checkpoint {folder.name}": manifest_hash(folder)}, CheckpointError)
        fault = self._verify_on_all_ranks(folder)
        if fault is not None:
            raise on_all_ranks(CheckpointError(f"{folder}: {fault}"), self.ranks.size)

        saved: dict[str, StoredTensor] = {}
        wanted: dict[str, Shards] = {}

        def check() -> None:
            saved.update(open_tensors(folder, read_manifest(folder)))
            loose = {name for name in saved.keys() ^ targets.keys() if optional and name.startswith(optional)}
            wanted.update({name: Shards.of(name, tensor) for name, tensor in targets.items() if name not in loose})
            problems = [f"{name} is missing from the checkpoint" for name in wanted if name not in saved]
            problems += [f"{name} is in the checkpoint only" for name in saved.keys() - wanted.keys() - loose]
            problems += [
                f"{name} is {saved[name].info} in the checkpoint, {shards.info} here"
                for name, shards in wanted.items()
                if name in saved and saved[name].info != shards.info
            ]
            if problems:
                more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
                raise ValueError(f"{folder} does not fit this model: " + "; ".join(problems[:5]) + more)
            for name, shards in wanted.items():
                saved[name].require_all(name, shards)

        def copy() -> None:
            for name, shards in wanted.items():
                saved[name].copy_to(name, shards)

        self.ranks.run_on_all_ranks(check, CheckpointError)
        self.ranks.run_on_all_ranks(copy, CheckpointError)

    def _listing(self) -> dict[str, str]:
        """Identify the checkpoints in the folder as this rank sees it, newest first."""
        return {folder.name: manifest_hash(folder) for folder in step_folders(self.directory)}

    def _verify_on_all_ranks(self, folder: Path) -> CheckpointError | None:
        """Verify a checkpoint, the reading of its files divided among the ranks; all return the same."""
        faults = self.ranks.gather(self._verify(folder, self.ranks.rank, self.ranks.size))
        found = next((fault for fault in faults if fault is not None), None)
        if found is not None:
            self._verified.pop(folder, None)
        return found

    def _verify(self, folder: Path, part: int = 0, parts: int = 1) -> CheckpointError | None:
        """Verify a checkpoint as `find_damage` does, unless nothing changed since the last time."""
        try:
            signature = mtime_signature(folder, read_manifest(folder))
        except CheckpointError as error:
            return error
        except OSError as error:
            return CheckpointError(str(error))
        if self._verified.get(folder) == signature:
            return None
        damage = find_damage(folder, part, parts)
        if damage is None:
            self._verified[folder] = signature
        return damage
