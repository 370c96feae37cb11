"""What ranks tell each other about their progress, and what follows for a run that stands still."""

import json
from dataclasses import dataclass

import torch.distributed as dist

from geneformer_pretrain.distributed.agreement import name_ranks

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


def read_heartbeats(store: dist.Store, world_size: int) -> dict[int, Heartbeat]:
    """The last heartbeat of each rank that has sent any."""
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
            f"Silent (stopped, dead or stuck outside of Python): {places(silent, after)}."
            + (f" The others: {places(living, after)}."),
        )
    if len(behind) == len(living):
        return [], [], f"All stand at the same place: {places(living, after)}."
    others = [rank for rank in living if rank not in behind]
    return [], behind, f"Behind: {places(behind, after)}. The others wait: {places(others, after)}."


def places(ranks: list[int], heartbeats: dict[int, Heartbeat]) -> str:
    """Where ranks stand, those at the same place together."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        at = heartbeats.get(rank)
        groups.setdefault(f"step {at.step}, {at.phase}" if at else "no sign of it yet", []).append(rank)
    return "; ".join(f"{name_ranks(group)} ({place})" for place, group in groups.items())
