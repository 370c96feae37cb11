"""The run's store, through which ranks speak before their process group exists and after it is gone."""

import os
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from geneformer_pretrain.console import say
from geneformer_pretrain.distributed.agreement import is_on_all_ranks, merge, name_ranks, on_all_ranks
from geneformer_pretrain.errors import ConfigError, explain, require

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""Longest wait for the other ranks: the first start on a slow file system takes minutes."""

GRACE = timedelta(seconds=20)
"""Longest wait for further ranks once one has reported a mistake."""

PRINT_TIMEOUT = timedelta(seconds=10)
"""Longest wait for the rank that prints an error for others."""

POLL_SECONDS = 0.1

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each process."""

LEAST = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 1, "MASTER_PORT": 0}
"""Variables of a launcher that hold a number, and the least number that each may hold."""


def check_environment() -> None:
    """Check the numbers that a launcher set, before they are used; each may also be unset.

    Raises
    ------
    ConfigError
        Naming the variable that is no whole number, or out of range.
    """
    remedy = "start with torchrun, or unset it for a single process."
    for name, least in LEAST.items():
        value = os.environ.get(name)
        require(
            value is None or (value.isascii() and value.isdigit() and int(value) >= least),
            f"{name}={value} in the environment is no whole number from {least} on: {remedy}",
        )
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    require(
        rank is None or size is None or int(rank) < int(size),
        f"RANK={rank} in the environment is not below WORLD_SIZE={size}: {remedy}",
    )


def open_store(purpose: str, timeout: timedelta = timedelta(minutes=1)) -> dist.Store:
    """Connect to the run's store; keys of one purpose are apart from those of another, and of before a restart.

    Raises
    ------
    ConnectionError
        The store does not answer in time, or the environment is incomplete.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return dist.HashStore()
    if missing:
        raise ConnectionError(
            f"{', '.join(ENVIRONMENT)} belong together, and {', '.join(missing)} is not set in this process's "
            "environment: start with torchrun, or unset RANK and WORLD_SIZE for a single process."
        )
    try:
        # Without torchrun, the first rank's store waits here for all others.
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except RuntimeError as error:
        raise connection_error(error) from error
    return dist.PrefixStore(f"{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def connection_error(error: Exception) -> ConnectionError:
    """Make the error for ranks that cannot connect to each other in the first place."""
    reason = " ".join(str(error).split())[:500]
    return ConnectionError(
        f"rank {os.environ.get('RANK', 0)} cannot connect to the others: {reason}. Check MASTER_ADDR and MASTER_PORT, "
        "and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if they are set."
    )


def meet(mistake: str = "") -> dist.Store:
    """Wait until all ranks are here.

    Parameters
    ----------
    mistake
        The reason why this rank cannot go on, if any.

    Returns
    -------
    dist.Store
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
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        store = open_store("start", GRACE if mistake else RENDEZVOUS_TIMEOUT)
    except ConnectionError as error:
        if mistake:
            raise ConfigError(mistake) from error
        raise
    store.set(str(rank), mistake.encode(errors="backslashreplace").decode())
    if mistake:
        store.add("mistakes", 1)
    arrived = store.add("arrived", 1)
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    any_mistake = False
    while arrived < size and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        arrived = store.add("arrived", 0)
        if not any_mistake and store.add("mistakes", 0):
            any_mistake, deadline = True, min(deadline, time.monotonic() + GRACE.total_seconds())
    if arrived == size and not store.add("mistakes", 0):
        return store
    came = [other for other in range(size) if store.check([str(other)])]
    mistakes = {other: store.get(str(other)).decode() for other in came}
    mistakes = {other: reason for other, reason in mistakes.items() if reason}
    if mistakes:
        raise on_all_ranks(ConfigError(merge(mistakes, size)), size if len(came) == size else 1)
    absent = name_ranks([other for other in range(size) if other not in came])
    raise TimeoutError(
        f"{absent} of {size} did not come within {RENDEZVOUS_TIMEOUT.seconds // 60} minutes; look at the output of the "
        "nodes that they run on, and start all nodes again."
    )


def exit_with_error(error: Exception, *, smaller: tuple[str, ...] = ()) -> NoReturn:
    """End this process with a plain message. Of an error that all ranks raise, one rank of each node prints it.

    Each node has a log of its own, or a terminal.
    """
    message = f"Error: {explain(error, smaller=smaller)}"
    shared = is_on_all_ranks(error) and int(os.environ.get("WORLD_SIZE", 1)) > 1
    prints = not shared or os.environ.get("LOCAL_RANK", "0") == "0"
    if prints:
        say(message, error=True)
    if shared:
        node = os.environ.get("GROUP_RANK", "0")
        try:
            store = open_store("printed")
            if prints:
                store.set(node, "")
            # torchrun ends the rank that is about to print as soon as another one has left.
            store.wait([node], PRINT_TIMEOUT)
        except (dist.DistError, ConnectionError):
            if not prints:
                say(message, error=True)
    sys.exit(1)
