"""Settings with which a run fits into the memory of its GPUs."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.kernels.select import MAX_OFFSET
from geneformer_pretrain.model.memory import PeakMemory, peak_memory
from geneformer_pretrain.model.resolve import KEEP_GATHERED_BELOW
from geneformer_pretrain.planner.engines import engine_configs
from geneformer_pretrain.planner.speed import Cluster, replays_graphs

GIB = 2**30
ITEMSIZE = 2
"""Bytes of BF16."""
USABLE_SHARE = 0.92
"""Of a GPU's memory: the estimate may be some percent off, and the CUDA context and NCCL want 1 to 2 GiB."""
MOST_GPUS = 1024
"""Number of GPUs up to which one is looked for that holds a model."""


def room(cluster: Cluster) -> float:
    """Return the bytes of a GPU that may be planned with."""
    return USABLE_SHARE * cluster.card.memory_gib * GIB


def memory_of(config: Config, cluster: Cluster, parameters: int) -> tuple[bool, PeakMemory]:
    """Return whether gathered weights are freed after the forward, and the peak; as a run decides it."""
    training, graphs = config.training, replays_graphs(config, cluster)

    def peak(reshards: bool) -> PeakMemory:
        return peak_memory(config, cluster.gpus, parameters, ITEMSIZE, graphs, reshards)

    reshards = training.reshard_after_forward
    if reshards is None:
        shards = training.use_fsdp2 or training.use_nvfsdp
        kept = shards and peak(False).total <= KEEP_GATHERED_BELOW * cluster.card.memory_gib * GIB
        reshards = not kept
    return reshards, peak(reshards)


def largest_micro_batch(config: Config, cluster: Cluster, parameters: int) -> int:
    """Return the largest micro-batch whose peak fits and that the attention kernels take, by bisection."""

    def fits(size: int) -> bool:
        tried = replace(config, model=replace(config.model, micro_batch_size=size * step))
        return memory_of(tried, cluster, parameters)[1].total <= room(cluster)

    step = 128 // math.gcd(config.model.seq_length, 128)  # Token budgets are multiples of 128.
    low, high = 0, MAX_OFFSET // (3 * config.model.hidden_size * config.model.seq_length * step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * step


@dataclass(frozen=True)
class Remedy:
    """Settings with which a run fits.

    Attributes
    ----------
    gpus
        Number of GPUs; more than planned where no setting fits on those.
    settings
        KEY=VALUE of each key that differs from the configuration.
    """

    gpus: int
    settings: list[str]


def remedies(config: Config, cluster: Cluster, parameters: int) -> list[Remedy]:
    """Return settings with which a run fits that does not as configured, or the fewest GPUs on which some do.

    Tried are another engine, then a smaller micro-batch and recomputation each by itself, then both; more GPUs share
    one copy of the model (FSDP2).

    Returns
    -------
    list of Remedy
        Empty if the run fits, and if it does on no number of GPUs up to MOST_GPUS.
    """
    if _fits(config, cluster, parameters):
        return []
    engines = [_changed(engine) for engine, _ in engine_configs(config, cluster)]
    sharded = _changed(config, use_fsdp2=True, use_nvfsdp=False, shard_group_size=None)
    of_node = cluster.gpus_per_node
    for gpus in range(cluster.gpus, max(cluster.gpus, MOST_GPUS) + 1):
        if gpus <= of_node or gpus % of_node == 0:
            tried = engines if gpus == cluster.gpus else [sharded]
            fitting = _fitting(tried, replace(cluster, gpus=gpus), parameters)
            if fitting:
                return [Remedy(gpus, _differences(config, found)) for found in fitting]
    return []


def _fits(config: Config, cluster: Cluster, parameters: int) -> bool:
    return memory_of(config, cluster, parameters)[1].total <= room(cluster)


def _fitting(engines: list[Config], cluster: Cluster, parameters: int) -> list[Config]:
    """Return an engine that fits; else one with a smaller micro-batch, or with recomputation; else one with both."""

    def largest(config: Config) -> int:
        return largest_micro_batch(config, cluster, parameters)

    def smaller(config: Config) -> Config:
        size = min(largest(config) or config.model.micro_batch_size, config.model.micro_batch_size)
        return replace(config, model=replace(config.model, micro_batch_size=size))

    def recomputing(config: Config) -> list[Config]:
        now = config.training.recompute_every_n_layers or math.inf
        return [_changed(config, recompute_every_n_layers=every) for every in (2, 1) if every < now]

    def fitting(configs: list[Config]) -> list[Config]:
        return [config for config in configs if _fits(config, cluster, parameters)]

    unchanged = fitting(engines)
    if unchanged:
        return unchanged[:1]
    engines = sorted(engines, key=largest, reverse=True)
    for engine in engines:
        found = fitting([smaller(engine)]) + fitting(recomputing(engine))[:1]
        if found:
            return found
    return fitting([smaller(config) for engine in engines for config in recomputing(engine)[-1:]])[:1]


def _changed(config: Config, **training: Any) -> Config:
    """Return a configuration with other values under `training`.

    Gathered weights are freed where memory lacks, and CUDA graphs left to `auto` where a run would refuse them.
    """
    changed = replace(config.training, **training)
    if changed.reshard_after_forward is False:
        changed = replace(changed, reshard_after_forward=None)
    if changed.cuda_graphs and (changed.use_fsdp2 or changed.use_nvfsdp or changed.recompute_every_n_layers):
        changed = replace(changed, cuda_graphs=None)
    return replace(config, training=changed)


def _differences(config: Config, other: Config) -> list[str]:
    """List KEY=VALUE of each key under `training` and `model` in which another configuration differs."""
    return [
        f"{group}.{key}={json.dumps(value)}"
        for group in ("training", "model")
        for key, value in vars(getattr(other, group)).items()
        if value != getattr(getattr(config, group), key)
    ]
