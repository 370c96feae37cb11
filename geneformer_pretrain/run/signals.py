"""Stopping on a signal after a checkpoint, and leaving with an exit code that holds."""

import os
import signal
from types import FrameType, TracebackType
from typing import NoReturn, Self

from geneformer_pretrain.console import TolerantStream, say

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


def exit_without_teardown(code: str | int | None) -> NoReturn:
    """End this process as `sys.exit(code)` does, but without the interpreter's teardown.

    A thread of a process group may still hold tensors of the last collective. To let go of one that Python knows, it
    takes the interpreter's lock, and in the teardown that aborts the process ("terminate called without an active
    exception"): a complete run would look like one that failed.
    """
    if isinstance(code, str):
        say(code, error=True)
        code = 1
    for number in (1, 2):
        TolerantStream(number).flush()
    os._exit(code or 0)
