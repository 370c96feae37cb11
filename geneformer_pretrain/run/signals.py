"""Leaving: on a signal, with an exit code that holds, telling a job script why the run ended."""

import json
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

log = logging.getLogger(__name__)

EXIT_CODE_SIGNAL = 75
"""Exit code of a process that saved and left because of a signal (EX_TEMPFAIL: run it again)."""

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While active, remembers a SIGTERM, SIGINT, SIGUSR1 or SIGHUP instead of dying of it.

    The training loop asks `received` once a step, and the ranks agree on a common last step. A second SIGINT
    interrupts at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        if self._previous[signal.SIGHUP] is signal.SIG_IGN:  # by nohup: a closed terminal is to be no reason to stop
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def leave(code: str | int | None) -> NoReturn:
    """End this process as `sys.exit(code)` does, but without the interpreter's teardown.

    A thread of a process group may still hold tensors of the last collective. To let go of one that Python knows, it
    takes the interpreter's lock, and in the teardown that aborts the process ("terminate called without an active
    exception"): a complete run would look like one that failed.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: closed before the start
            stream.flush()
    os._exit(code or 0)


def write_exit(folder: Path, reason: str, exit_code: int, **details: Any) -> None:
    """Write exit.json: torchrun reports 1 whatever its workers return, so scripts read this instead.

    The first rank to write it is right: an error on one rank soon breaks the connections of all others.
    """
    path = folder / "exit.json"
    try:
        with path.open("x") as file:
            file.write(json.dumps({"reason": reason, "exit_code": exit_code, **details}) + "\n")
    except FileExistsError:
        return
    except OSError as error:  # It must not take the place of the error that it was to tell of.
        log.error("cannot write %s: %s", path, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)
