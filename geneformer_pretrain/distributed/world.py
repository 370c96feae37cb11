"""Process group, ranks and devices. One process without torchrun is a world of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from geneformer_pretrain.distributed.rendezvous import check_environment, connection_error, meet
from geneformer_pretrain.errors import ConfigError, is_lost_connection


@dataclass(frozen=True)
class World:
    """A process's place among all processes, which run on one or several nodes."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    nodes: int = 1

    @property
    def is_main(self) -> bool:
        """True on the rank that prints, logs and writes shared files."""
        return self.rank == 0


@contextmanager
def distributed_world(timeout: timedelta = timedelta(minutes=10), *, mistake: str = "") -> Iterator[World]:
    """Join the process group that torchrun describes, or make one of a single process.

    Each process drives the GPU of its local rank, or the CPU where there is no GPU. Tensors on a GPU are
    reduced by NCCL, tensors in host memory by gloo.

    Parameters
    ----------
    timeout
        Time limit of collectives.
    mistake
        The reason why this rank cannot go on, if any: all ranks raise it.

    Raises
    ------
    ConfigError
        On every rank: a mistake of any of them, such as more processes on a node than GPUs. On this one alone: numbers
        in its environment that are none.
    ConnectionError
        The ranks cannot speak to each other.
    TimeoutError
        Some ranks did not come.
    """
    check_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if not mistake:
        try:
            device = choose_device(local_rank)
        except ConfigError as error:
            mistake = str(error)
    store = meet(mistake)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=dist.PrefixStore("default_pg", store),
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or is_lost_connection(error)):
            raise
        raise connection_error(error) from error
    failed = True
    try:
        yield World(rank, local_rank, size, device, int(os.environ.get("GROUP_WORLD_SIZE", 1)))
        failed = False
    finally:
        # NCCL waits for the collectives of ranks that this one has left behind. Leaving makes torchrun end them.
        if not failed or size == 1:
            dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """Return the GPU of a local rank, now the current one, or the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"Local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}. "
            "Give torchrun an --nproc_per_node of at most that number."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
