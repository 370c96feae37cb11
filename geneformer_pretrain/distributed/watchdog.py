"""Notices that a run no longer advances, names the rank that keeps the others waiting, and ends the process.

Each rank has two threads beside the training loop; neither needs the loop's cooperation, since PyTorch releases
the interpreter wherever it waits::

    exchange    publishes this rank's heartbeat every second, and passes an alarm on to all ranks
    watch       raises the alarm when the loop stands still for the timeout, reports, and exits

Heartbeats go through the run's TCP store, which the launcher holds: a shared file system would show them late, and
may itself be what hangs. The store can hang too, so `watch` never waits for it.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from geneformer_pretrain.distributed.heartbeats import FINISHED, Heartbeat, diagnose, read_heartbeats
from geneformer_pretrain.distributed.rendezvous import open_store
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.run.signals import write_exit

EXIT_CODE_HANG = 76
"""Exit code of a process that ended itself because the run hangs."""

INTERVAL = 1.0
"""Seconds between two heartbeats."""

CONFIRM_SECONDS = 5.0
"""A rank whose heartbeat stands still for that long after the alarm is silent."""

REPORT_SECONDS = 10.0
"""How long writing the report may take."""


class Watchdog:
    """While active, ends all processes of a run that stands still.

    Parameters
    ----------
    timeout
        Seconds that the loop may stay in one phase; 0 switches the watchdog off. Time in which the whole process
        is suspended does not count.
    folder
        Checkpoint folder, for exit.json and hang/rank_R.txt.
    world
        This process among all.
    """

    def __init__(self, timeout: float, folder: Path, world: World) -> None:
        self.timeout, self.folder, self.world = timeout, folder, world
        self._position = (0, 0, "starting")
        self._readings: list[dict[int, Heartbeat]] = []
        self._alarm, self._stopped = threading.Event(), threading.Event()

    def beat(self, step: int, phase: str) -> None:
        """Tell that the loop enters a phase of a step; every rank enters the same ones in the same order."""
        self._position = (self._position[0] + 1, step, phase)

    def __enter__(self) -> Self:
        if self.timeout > 0:
            self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            # Not the process group's connection, which is locked while the loop waits on it.
            store = open_store("watchdog")
            self._exchanger = threading.Thread(target=self._exchange, args=[store], name="heartbeat", daemon=True)
            self._watcher.start()
            self._exchanger.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._alarm.is_set():
            self._watcher.join()  # Errors now are connections that other ranks broke by leaving; the report counts.
        self.beat(self._position[1], FINISHED)
        self._stopped.set()
        if self.timeout > 0:
            self._exchanger.join(2 * INTERVAL)

    def _exchange(self, store: dist.Store) -> None:
        tick, agent = 0, os.environ.get("GROUP_RANK")
        try:
            while True:
                stopped = self._stopped.is_set()
                heartbeat = Heartbeat(tick, *self._position, os.getpid(), agent)
                store.set(str(self.world.rank), json.dumps(asdict(heartbeat)))
                if stopped:
                    return
                if self._alarm.is_set():
                    store.set("alarm", "")
                    self._readings.append(read_heartbeats(store, self.world.size))
                elif store.check(["alarm"]):
                    self._alarm.set()
                self._stopped.wait(INTERVAL)
                tick += 1
        except dist.DistError as error:
            if self._stopped.is_set() or self._alarm.is_set():
                return
            reason = str(error).splitlines()[0]
            print(f"Rank {self.world.rank} lost the launcher ({reason}): leaving.", file=sys.stderr, flush=True)
            # An orphan would go on writing into the folder of the run that is started in its place.
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        beats, idle = -1, 0.0
        while not self._stopped.wait(INTERVAL):
            # Counted, not read from a clock: a clock also runs while a scheduler suspends the job.
            idle = idle + INTERVAL if self._position[0] == beats else 0.0
            beats = self._position[0]
            if idle >= self.timeout:
                self._alarm.set()
            if self._alarm.is_set():
                self._report()

    def _report(self) -> None:
        stacks = all_stacks()
        # Whatever blocks the report, a hung file system or a full pipe, must not keep the process.
        deadline = threading.Timer(CONFIRM_SECONDS + REPORT_SECONDS, os._exit, [EXIT_CODE_HANG])
        deadline.daemon = True
        deadline.start()
        time.sleep(CONFIRM_SECONDS)
        before, after = (self._readings[0], self._readings[-1]) if self._readings else ({}, {})
        silent, behind, finding = diagnose(before, after, self.world.size)
        _, step, phase = self._position
        message = f"No progress for {self.timeout:g} s. {finding} Stacks: {self.folder / 'hang'}."
        if self.world.rank == min(set(range(self.world.size)) - set(silent), default=self.world.rank):
            print(f"Error: {message}", file=sys.stderr, flush=True)
        path = self.folder / "hang" / f"rank_{self.world.rank}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"rank {self.world.rank}, process {os.getpid()}, step {step}, {phase}\n\n{stacks}")
        write_exit(self.folder, "hang", EXIT_CODE_HANG, step=step, silent=silent, behind=behind, error=message)
        own_agent = os.environ.get("GROUP_RANK")
        for rank in silent:
            # A stopped process heeds no SIGTERM, and torchrun waits long before it sends more.
            if own_agent is not None and rank in after and after[rank].agent == own_agent:
                with suppress(ProcessLookupError):
                    os.kill(after[rank].pid, signal.SIGKILL)
        os._exit(EXIT_CODE_HANG)


def all_stacks() -> str:
    """Stacks of all threads; by way of memory, since the disk may be what hangs."""
    with os.fdopen(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
