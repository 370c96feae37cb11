"""Compiled loops over cells and tokens."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """Have numba compile a function at its first call, to run without Python's lock; kept for later processes."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # No folder to keep it in; numba looks for one at once.
        _warn_once()
        return njit(nogil=True)(function)


@cache
def _warn_once() -> None:
    log.warning(
        "neither %s nor the home folder may be written to: each process compiles its loops anew, for some seconds; "
        "set NUMBA_CACHE_DIR to a folder that keeps what is compiled",
        Path(__file__).parent,
    )
