"""Trackers of a run. They are never a reason to stop or to delay training.

Each tracker's calls run in a thread of its own, fed by a bounded queue: one that raises is dropped with a message, one
that hangs loses records, and closing it has a time limit.
"""

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.run.wandb_models import log_models

log = logging.getLogger(__name__)

QUEUE_SIZE = 1000
"""Records that may wait for a tracker."""

CLOSE_SECONDS = 60.0
"""Longest wait for a tracker at the end of a run."""

MODEL_SECONDS = 600.0
"""Longest further wait for W&B to read or copy models."""

WANDB_ID = "wandb_id.txt"
"""File in the run's folder with the id of its W&B run, which restarts go on with."""


class Tracker:
    """Hands records to a tracking library in the background.

    Parameters
    ----------
    name
        Name of the library, for messages.
    log_record
        Sends one record.
    finish
        Ends the run there, with its exit code.
    extra_seconds
        Added to `CLOSE_SECONDS`.
    helpers
        Processes of the library. They are killed if they hang: one that keeps standard error open would keep the
        reader of a pipe waiting after the end of the run.
    """

    def __init__(
        self,
        name: str,
        log_record: Callable[[dict[str, Any]], None],
        finish: Callable[[int], None],
        extra_seconds: float = 0.0,
        helpers: Iterable[int] = (),
    ) -> None:
        self.name, self.extra_seconds = name, extra_seconds
        self._log_record, self._finish, self._helpers = log_record, finish, helpers
        self._queue: queue.Queue[dict[str, Any] | int] = queue.Queue(QUEUE_SIZE)
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Queue a record; never waits."""
        try:
            if not self._lost.is_set():
                self._queue.put_nowait(record)
        except queue.Full:
            self._lose(f"it has not accepted the last {QUEUE_SIZE} records")
            _kill(self._helpers)

    def close(self, exit_code: int) -> None:
        """End the tracker's run, waiting for at most a minute, and longer for models."""
        if self._lost.is_set():
            return
        seconds = CLOSE_SECONDS + (self.extra_seconds if exit_code == 0 else 0.0)  # Models are those of a complete run.
        end = time.monotonic() + seconds
        with suppress(queue.Full):
            self._queue.put(exit_code, timeout=seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._lose(f"it did not finish within {seconds:.0f} s")
            _kill(self._helpers)

    def _work(self) -> None:
        try:
            while isinstance(record := self._queue.get(), dict):
                self._log_record(record)
            self._finish(record)
        except Exception as error:  # Any fault of a tracking library: training goes on without it.
            self._lose(f"{type(error).__name__}: {error}".partition("\n")[0])

    def _lose(self, reason: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            _report_loss(self.name, reason)


def _report_loss(name: str, reason: str) -> None:
    log.error("%s is lost (%s); the run goes on without it, metrics.jsonl has every record", name, reason)


def _children() -> set[int]:
    """Processes started by this one, where the system lists them."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found.update(map(int, path.read_text().split()))
    return found


def _kill(helpers: Iterable[int]) -> None:
    """Kill those that still are children of this process and lead a group of their own, with their children."""
    for helper in set(helpers) & _children():
        with suppress(OSError):
            if os.getpgid(helper) == helper:
                os.killpg(helper, signal.SIGKILL)


def start_trackers(config: Config, folder: Path) -> list[Tracker]:
    """Start the trackers that the configuration asks for; one whose helper process or server fails is left out.

    Raises
    ------
    ConfigError
        A tracker that is not installed, or does not accept its arguments or login; with the remedy.
    """
    tracker = None if config.training.wandb_init_args is None else _start_wandb(config, folder)
    return [] if tracker is None else [tracker]


def _start_wandb(config: Config, folder: Path) -> Tracker | None:
    """Start Weights & Biases: offline unless a key is set or the configuration says otherwise.

    The id of the W&B run is kept in the run's folder, so that a restart continues the same curves.
    """
    without = "set training.wandb_init_args=null to train without it."
    try:
        import wandb  # imported only when tracking is on: it is slow to load
    except ImportError as error:
        raise ConfigError(
            f"training.wandb_init_args: wandb cannot be imported ({error}); install it, or {without}"
        ) from error

    arguments = dict(config.training.wandb_init_args or {})
    default_mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    arguments.setdefault("mode", os.environ.get("WANDB_MODE", default_mode))
    arguments.setdefault("dir", os.environ.get("WANDB_DIR", str(folder)))
    arguments.setdefault("config", asdict(config))
    id_file = folder / WANDB_ID
    if "id" not in arguments and "WANDB_RUN_ID" not in os.environ and id_file.exists():
        arguments["id"] = id_file.read_text().strip()
    if arguments["mode"] != "offline":  # Offline runs of one id are joined when they are synced.
        arguments.setdefault("resume", "allow")
    others = _children()
    try:
        run = wandb.init(**arguments)
    except (TypeError, ValueError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ConfigError(
            f"training.wandb_init_args: wandb does not start with them: {error}; correct them (mode=offline needs no "
            f"login), or {without}"
        ) from error
    except Exception as error:  # Its helper process, its server or the network: a restart at night goes on without it.
        _report_loss("W&B", f"{type(error).__name__}: {error}".partition("\n")[0])
        _kill(_children() - others)
        return None
    if run.id is not None:
        id_file.write_text(f"{run.id}\n")
    models = config.training.wandb_log_model

    def finish(exit_code: int) -> None:
        if models is not None and exit_code == 0:
            log_models(wandb, run, folder, models)
        run.finish(exit_code)

    return Tracker(
        "W&B",
        lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"]),
        finish,
        extra_seconds=0.0 if models is None else MODEL_SECONDS,
        helpers=_children() - others,
    )
