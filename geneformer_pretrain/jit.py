"""Compiled loops over cells and tokens, cached by the content of this folder's sources."""

import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import xxhash

log = logging.getLogger(__name__)

WINGS = ("data", "tokenization", "inference")
"""Folders with compiled functions."""


def compiled(function: Callable[..., Any]) -> Any:
    """Have numba compile a function at its first call, to run without Python's lock, and cache it for later processes.

    numba notices a change of the function's own file only, and not one of a function that it inlines from another
    file. So the cache lies in a folder named by the digest of all sources that take part.
    """
    folder = _cache_folder()
    if folder is None:
        return numba.njit(nogil=True)(function)
    users_own = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(nogil=True, cache=True)(function)
    finally:
        numba.config.CACHE_DIR = users_own


@cache
def _cache_folder() -> Path | None:
    """Return the first writable folder among that of NUMBA_CACHE_DIR, one beside the sources and the user's own."""
    sources = Path(__file__).parent
    places = [sources / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "geneformer_pretrain"]
    if numba.config.CACHE_DIR:
        places = [Path(numba.config.CACHE_DIR)]
    for place in places:
        try:
            folder = place.expanduser() / f"numba-{source_digest(sources)}"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except (OSError, RuntimeError):  # RuntimeError: no home folder
            continue
    log.warning(
        "%s cannot be written to: each process compiles the loader anew, which takes some seconds; set NUMBA_CACHE_DIR "
        "to a folder that can",
        " and ".join(map(str, places)),
    )
    return None


def source_digest(package: Path) -> str:
    """Hash the names and contents of the files that hold compiled functions, or functions inlined into them."""
    digest = xxhash.xxh3_128()
    for path in sorted(file for wing in WINGS for file in (package / wing).glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
