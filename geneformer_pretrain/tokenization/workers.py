"""Worker processes that start quickly and never outlive the process that started them.

Processes rather than threads: HDF5 lets one thread at a time into its library, and decompression happens in there.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any


def start_server(module: str) -> None:
    """Start the process that workers are forked from; it imports a module while this process does other things."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([module])
    forkserver.ensure_running()


def process_pool(workers: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool whose workers call `prepare(*arguments)` first."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, context, _start, (prepare, arguments))


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the work
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    prepare(*arguments)


def _leave_with_parent() -> None:
    """End this process when the one that started it ends, however it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
