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
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from geneformer_pretrain.console import say
from geneformer_pretrain.distributed.agreement import name_ranks
from geneformer_pretrain.distributed.rendezvous import open_store
from geneformer_pretrain.distributed.world import World

EXIT_CODE_HANG = 76
"""Exit code of a process that ended itself because the run hangs."""

INTERVAL = 1.0
"""Seconds between two heartbeats."""

CONFIRM_SECONDS = 5.0
"""A rank whose heartbeat stands still for that long after the alarm is silent."""

REPORT_SECONDS = 10.0
"""How long writing the report may take."""


FINISHED = "finished"
"""Phase of a rank that has left the training loop."""


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of one rank: `tick` counts its seconds, `beats` the phases that its loop has entered."""

    tick: int
    beats: int
    step: int
    phase: str
    pid: int
    agent: str | None
    """Number of the torchrun process that started the rank."""


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
    write_exit
        Writes exit.json: `write_exit(folder, reason, exit_code, **details)`.
    """

    def __init__(self, timeout: float, folder: Path, world: World, write_exit: Callable[..., None]) -> None:
        self.timeout, self.folder, self.world = timeout, folder, world
        self._write_exit = write_exit
        self._position = (0, 0, "starting")
        self._readings: list[dict[int, Heartbeat]] = []
        self._alarm, self._stopped = threading.Event(), threading.Event()

    def beat(self, step: int, phase: str) -> None:
        """Record that the loop enters a phase of a step; every rank enters the same ones in the same order."""
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
            say(f"Rank {self.world.rank} lost the launcher ({reason}): leaving.", error=True)
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
            say(f"Error: {message}", error=True)
        path = self.folder / "hang" / f"rank_{self.world.rank}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"rank {self.world.rank}, process {os.getpid()}, step {step}, {phase}\n\n{stacks}")
        self._write_exit(self.folder, "hang", EXIT_CODE_HANG, step=step, silent=silent, behind=behind, error=message)
        own_agent = os.environ.get("GROUP_RANK")
        for rank in silent:
            # A stopped process heeds no SIGTERM, and torchrun waits long before it sends more.
            if own_agent is not None and rank in after and after[rank].agent == own_agent:
                with suppress(ProcessLookupError):
                    os.kill(after[rank].pid, signal.SIGKILL)
        os._exit(EXIT_CODE_HANG)


def all_stacks() -> str:
    """Return the stacks of all threads, through memory: the disk may be what hangs."""
    with os.fdopen(os.memfd_create("stacks"), "w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def read_heartbeats(store: dist.Store, world_size: int) -> dict[int, Heartbeat]:
    """Read the last heartbeat of each rank that has sent any."""
    ranks = [rank for rank in range(world_size) if store.check([str(rank)])]
    return {rank: Heartbeat(**json.loads(store.get(str(rank)))) for rank in ranks}


def diagnose(
    before: dict[int, Heartbeat], after: dict[int, Heartbeat], world_size: int
) -> tuple[list[int], list[int], str]:
    """Find who keeps the others waiting.

    Parameters
    ----------
    before, after
        Heartbeats by rank, a few seconds apart.
    world_size
        Number of ranks.

    Returns
    -------
    silent : list of int
        Ranks without a new heartbeat.
    behind : list of int
        If none is silent: the ranks whose loop got least far, unless all stand at the same place.
    finding : str
        The same in words.
    """
    if after == before:
        return [], [], "The launcher's store does not answer either, so nothing is known of the other ranks."
    still = {rank for rank in after if before.get(rank) == after[rank] and after[rank].phase != FINISHED}
    silent = [rank for rank in range(world_size) if rank in still or rank not in after]
    living = [rank for rank in after if rank not in silent]
    least = min(after[rank].beats for rank in living)
    behind = [rank for rank in living if after[rank].beats == least]
    if silent:
        return (
            silent,
            [],
            f"Silent (stopped, dead or stuck outside of Python): {_places(silent, after)}."
            + (f" The others: {_places(living, after)}."),
        )
    if len(behind) == len(living):
        return [], [], f"All stand at the same place: {_places(living, after)}."
    others = [rank for rank in living if rank not in behind]
    return [], behind, f"Behind: {_places(behind, after)}. The others wait: {_places(others, after)}."


def _places(ranks: list[int], heartbeats: dict[int, Heartbeat]) -> str:
    """Describe where ranks stand, those at the same place together."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        at = heartbeats.get(rank)
        groups.setdefault(f"step {at.step}, {at.phase}" if at else "no sign of it yet", []).append(rank)
    return "; ".join(f"{name_ranks(group)} ({place})" for place, group in groups.items())
