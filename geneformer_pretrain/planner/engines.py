"""The engines that a plan compares."""

from dataclasses import replace

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import require
from geneformer_pretrain.planner.speed import Cluster


def engine_configs(config: Config, cluster: Cluster) -> list[tuple[Config, bool]]:
    """List the configured engine, marked True, and its alternatives: DDP, FSDP2, and FSDP2 in groups of a node's GPUs.

    Raises
    ------
    ConfigError
        If `training.shard_group_size` does not divide the number of GPUs.
    """
    training, gpus = config.training, cluster.gpus
    group = training.shard_group_size
    require(
        group is None or gpus % group == 0,
        f"training.shard_group_size={group} does not divide the {gpus} GPUs of --gpus.",
    )

    if group == gpus:  # The same as no groups.
        training = replace(training, shard_group_size=None)
        config = replace(config, training=training)

    def with_engine(use_fsdp2: bool, group: int | None) -> Config:
        reshards = training.reshard_after_forward if use_fsdp2 else None
        return replace(
            config,
            training=replace(
                training,
                use_fsdp2=use_fsdp2,
                use_nvfsdp=False,
                shard_group_size=group,
                reshard_after_forward=reshards,
            ),
        )

    configs = [with_engine(False, None)]
    if gpus > 1:
        configs.append(with_engine(True, None))
    of_node = cluster.gpus_per_node if cluster.nodes > 1 else gpus // 2
    if gpus > 2 and of_node > 1 and gpus % of_node == 0:
        configs.append(with_engine(True, of_node))
    if config not in configs:
        configs.insert(0, config)
    return [(each, each == config) for each in configs]


def engine_name(config: Config, gpus: int) -> str:
    """Name the engine of a configuration on that many GPUs."""
    training = config.training
    if not (training.use_fsdp2 or training.use_nvfsdp):
        return "one GPU" if gpus == 1 else "DDP"
    name = "FSDP2" if training.use_fsdp2 else "nvFSDP"
    group = training.shard_group_size
    return name if group in (None, gpus) else f"{name}, groups of {group}"
