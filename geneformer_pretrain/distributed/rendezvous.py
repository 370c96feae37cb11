"""Before the process group: all ranks meet, so that what keeps one of them from joining is told by all of them.

They speak through the run's store, which the launcher holds. After the end of the group it serves once more, for
the rank that tells an error on behalf of the others.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from geneformer_pretrain.distributed.agreement import (
    agreed,
    is_agreed,
    merge,
    name_ranks,
    naming_failed_connections,
    naming_lost_connections,
)
from geneformer_pretrain.errors import ConfigError

MEETING = timedelta(minutes=10)
"""How long a rank waits for the others: the first start on a slow file system takes minutes."""

MEETING_OF_FAILED = timedelta(minutes=1)
"""How long a rank that has a mistake to tell of waits for the others."""

TELLING = timedelta(seconds=10)
"""How long ranks wait for each other before they end."""


ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""


@naming_failed_connections()
def open_store(purpose: str, timeout: timedelta = timedelta(minutes=1)) -> dist.Store:
    """Connect to the run's store anew; keys of one purpose do not meet those of another, or of before a restart.

    Raises
    ------
    ConnectionError
        The store does not answer in time, or the environment says only in part where it is.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return dist.HashStore()
    if missing:
        raise ConnectionError(
            f"{', '.join(ENVIRONMENT)} belong together, and {', '.join(missing)} is not set in this process's "
            "environment: start with torchrun, or unset RANK and WORLD_SIZE for a single process."
        )
    # Without torchrun, the first rank's store waits here for all others.
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@naming_lost_connections()
def meet(mistake: str = "") -> dist.Store:
    """Wait until all ranks are here; `mistake` is what keeps this one from going on.

    Returns
    -------
    The store through which they met.

    Raises
    ------
    ConfigError
        On every rank, if any of them has made a mistake, with its reason.
    ConnectionError
        The ranks cannot speak to each other.
    TimeoutError
        Some ranks did not come; names them.
    """
    patience = MEETING_OF_FAILED if mistake else MEETING
    store = open_store("meeting", patience)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keys = [str(rank) for rank in range(size)]
    store.set(keys[rank], mistake)
    if store.add("number of ranks here", 1) == size:
        store.compare_set("outcome", "", "complete")
    try:
        store.wait(["outcome"], patience)
    except dist.DistStoreError:  # Not all came in time. Whoever gives up first lets the others go, too.
        store.compare_set("outcome", "", "given up")
    complete = store.get("outcome") == b"complete"
    came = [rank for rank in range(size) if complete or store.check([keys[rank]])]
    absent = [rank for rank in range(size) if rank not in came]
    told = dict(zip(came, store.multi_get([keys[rank] for rank in came]), strict=True))
    mistakes = {rank: reason.decode() for rank, reason in told.items() if reason}
    if mistakes:
        # The launcher's store ends with the first rank beside it that leaves: not before all have read.
        with suppress(dist.DistError):
            if store.add("have read", 1) == len(came):
                store.set("all have read", "")
            store.wait(["all have read"], TELLING)
        error = ConfigError(merge(mistakes, size))
        raise error if absent else agreed(error, size)
    if not complete:
        who = f"{name_ranks(absent)} of {size}" if absent else "a rank"
        raise TimeoutError(
            f"{who} did not come within {MEETING.seconds // 60} minutes; look at the output of the nodes that they run "
            "on, and start all nodes again."
        )
    return store


@contextmanager
def telling_all_ranks() -> Iterator[None]:
    """Tell all ranks of a mistake before the process group is there: they would wait for this one in vain."""
    try:
        yield
    except (ConfigError, OSError) as error:
        try:
            meet(str(error))
        except ConnectionError as lost:
            raise error from lost


def end(error: Exception) -> NoReturn:
    """End this process with a plain message. Where all ranks have the same one, one rank of each node prints it.

    Each node has a log of its own, or a terminal.
    """
    message = f"Error: {error}"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(message)
    node, speaks = os.environ.get("GROUP_RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks or not is_agreed(error):
        print(message, file=sys.stderr, flush=True)
    if is_agreed(error):
        try:
            store = open_store("telling")
            if speaks:
                store.set(node, "")
            # torchrun ends the rank that is about to print as soon as another one has left.
            store.wait([node], TELLING)
        except (dist.DistError, ConnectionError):
            if not speaks:
                print(message, file=sys.stderr, flush=True)
    sys.exit(1)
