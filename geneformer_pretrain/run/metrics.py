"""metrics.jsonl and the progress of a run."""

import json
import logging
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from geneformer_pretrain.console import Progress, amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import replacing
from geneformer_pretrain.run.tracking import Tracker

log = logging.getLogger(__name__)

TRACKING_INTERVAL = 1.0
"""Shortest time in seconds between two records that trackers get; records with a validation loss always go there."""


RECENT_SECONDS = 30.0
"""The progress shows means over the steps of so many seconds before it, and over the last step if that took longer."""


class MetricsLog:
    """Writes one record per logged step, shows progress once started and feeds trackers; used on the main rank.

    Parameters
    ----------
    folder
        Checkpoint folder; metrics.jsonl is appended to.
    first_step
        Completed steps at the start. Later records, of a run that was cut off, are dropped.
    num_steps
        Steps of the whole run.
    trackers
        Further receivers of the records.
    """

    def __init__(self, folder: Path, first_step: int, num_steps: int, trackers: list[Tracker]) -> None:
        self.file = JsonLines(folder / "metrics.jsonl", first_step)
        self.trackers = trackers
        self._tracked = 0.0
        self._recent: deque[tuple[float, float]] = deque()
        self._tokens = self._seconds = 0.0  # of the recent steps
        self._first_step, self._num_steps = first_step, num_steps
        self.progress: Progress | None = None

    def start(self) -> None:
        """Show the progress from here on."""
        self.progress = Progress(self._num_steps, "train", "step", initial=self._first_step, exact=True)

    def write(self, record: dict[str, Any]) -> None:
        """Record one step; numbers that are not finite become null, since JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(finite)
        now = time.monotonic()
        if now - self._tracked >= TRACKING_INTERVAL or "validation_loss" in record:
            self._tracked = now
            for tracker in self.trackers:
                tracker.log(finite)

    def advance(self, step: int, loss: float, learning_rate: float, tokens: float, seconds: float) -> None:
        """Move the progress to `step`.

        Parameters
        ----------
        tokens, seconds
            Tokens of this step, and its duration without saving and validation.
        """
        self._recent.append((tokens, seconds))
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        while len(self._recent) > 1 and self._seconds > RECENT_SECONDS:
            old_tokens, old_seconds = self._recent.popleft()
            self._tokens, self._seconds = self._tokens - old_tokens, self._seconds - old_seconds
        mean = self._seconds / len(self._recent)
        duration = f"{mean:,.2f} s" if mean >= 1 else f"{1e3 * mean:,.1f} ms"
        rate = f"{duration} a step, {self._tokens / self._seconds:,.0f} tokens/s"
        note = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate}"
        if self.progress is not None:
            self.progress.advance(step - self.progress.done, note)

    def close(self) -> None:
        """Close file and progress; trackers are closed by whoever made them, after exit.json is written."""
        if self.progress is not None:
            self.progress.close()
        self.file.close()


class JsonLines:
    """Appends records to a file. Records that a full disk refuses are kept, and written once there is room.

    Parameters
    ----------
    path
        Appended to.
    last_step
        Records of later steps are dropped first.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        cut_back(path, last_step)
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a failure to write is logged once, and never stops the run."""
        stuck = bool(self.unwritten)
        self.unwritten += (json.dumps(record) + "\n").encode()
        try:
            self._write_out()
        except OSError as error:
            if not stuck:
                log.error("cannot write to %s: %s; its records wait in memory", self.file.name, error)

    def _write_out(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self) -> None:
        """Try once more to write the rest."""
        try:
            self._write_out()
        except OSError as error:
            lost = amount(self.unwritten.count(b"\n"), "record")
            log.error("%s at the end of %s lost: %s", lost, self.file.name, error)
        self.file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the records after `step` from a JSON-lines file, and a last line torn by a crash.

    Raises
    ------
    DataError
        A line that is not a record; names it.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") and number == len(lines):
            break
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a record of a step; fix it or move the file away.") from error
        if is_kept:
            kept.append(line)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
