"""The plan of a run: everything a lab asks before it books GPUs."""

from dataclasses import dataclass, replace
from math import gcd

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import require
from geneformer_pretrain.kernels.select import MAX_OFFSET
from geneformer_pretrain.model.memory import PeakMemory, num_parameters, peak_memory
from geneformer_pretrain.model.resolve import KEEP_GATHERED_BELOW
from geneformer_pretrain.planner.arithmetic import flops_per_token
from geneformer_pretrain.planner.estimate import StepTime, step_time
from geneformer_pretrain.planner.lengths import CellLengths
from geneformer_pretrain.planner.saving import CHECKPOINT_BYTES, MODEL_BYTES, TO_DISK, Saving, kept_checkpoints, saving
from geneformer_pretrain.planner.speed import PACK_FILL, Cluster, check_card, replays_graphs

GIB = 2**30
ITEMSIZE = 2
"""Bytes of BF16."""
USABLE_SHARE = 0.92
"""Of a GPU's memory: the estimate may be some percent off, and the CUDA context and NCCL want 1 to 2 GiB."""


@dataclass(frozen=True)
class EnginePlan:
    """One way to spread the run over the GPUs.

    Attributes
    ----------
    engine
        In words.
    is_configured
        True for the engine that the configuration asks for.
    memory
        Peak of one GPU by part.
    largest_micro_batch
        Largest `model.micro_batch_size` that fits; 0 if none does.
    hours_per_epoch, gpu_hours_per_epoch, gpu_hours_of_run, cost_per_epoch, cost_of_run
        Saving included; costs are None without a price.
    """

    engine: str
    is_configured: bool
    memory: PeakMemory
    fits: bool
    largest_micro_batch: int
    step: StepTime
    tokens_per_second_per_gpu: float
    model_flops_utilization: float
    saving: Saving
    hours_per_epoch: float
    gpu_hours_per_epoch: float
    cost_per_epoch: float | None
    gpu_hours_of_run: float
    cost_of_run: float | None


@dataclass(frozen=True)
class Plan:
    """Sizes of a run, and its engines side by side.

    Attributes
    ----------
    flops_per_token
        Model FLOPs, forward and backward.
    attended
        Tokens that an average token attends to.
    tokens_per_step, cells_per_step
        Of all GPUs together.
    checkpoint_bytes, disk_bytes
        One checkpoint, and the run's folder with all that are kept and the export.
    cache_bytes
        The corpus as it is cached, with three epochs' plans.
    """

    cluster: Cluster
    num_parameters: int
    flops_per_token: float
    attended: float
    corpus: str
    cells: int
    tokens: float
    micro_batch_tokens: int
    accumulation: int
    tokens_per_step: float
    cells_per_step: float
    steps_per_epoch: float
    num_train_steps: int
    checkpoint_bytes: int
    disk_bytes: int
    cache_bytes: float
    engines: list[EnginePlan]

    @property
    def configured(self) -> EnginePlan:
        """The engine that the configuration asks for."""
        return next(engine for engine in self.engines if engine.is_configured)


def make_plan(
    config: Config, cluster: Cluster, lengths: CellLengths, *, price: float | None = None, disk: float = TO_DISK
) -> Plan:
    """Plan a run.

    Parameters
    ----------
    price
        Of one GPU-hour.
    disk
        Bytes per second with which all ranks together write checkpoints.

    Raises
    ------
    ConfigError
        Settings that cannot be, or that the planner does not know.
    """
    check_card(config, cluster)
    model, training = config.model, config.training
    parameters = num_parameters(model)
    cut = lengths.cut(model.seq_length, config.data.validation_fraction or 0.0)
    flops = flops_per_token(model, training.mlm_probability, cut.attended)
    tokens_per_step = PACK_FILL * model.token_budget * training.gradient_accumulation_steps * cluster.gpus
    steps = cut.tokens / tokens_per_step
    size = CHECKPOINT_BYTES * parameters
    engines = []
    for name, engine_config, is_configured in _engines(config, cluster):
        own = engine_config.training
        reshards, memory = _memory(engine_config, cluster, parameters)
        step = step_time(engine_config, cluster, parameters, cut.attended, reshards=reshards)
        shards = own.use_fsdp2 or own.use_nvfsdp
        writers = (own.shard_group_size or cluster.gpus) if shards else 1
        saves = saving(own, parameters, writers, step.seconds, disk)
        seconds = step.seconds / (1 - saves.share)
        rate = tokens_per_step / cluster.gpus / step.seconds
        gpu_hours = steps * seconds / 3600 * cluster.gpus
        of_run = training.num_train_steps * seconds / 3600 * cluster.gpus
        engines.append(
            EnginePlan(
                engine=name,
                is_configured=is_configured,
                memory=memory,
                fits=memory.total <= _room(cluster),
                largest_micro_batch=_largest_micro_batch(engine_config, cluster, parameters),
                step=step,
                tokens_per_second_per_gpu=rate,
                model_flops_utilization=rate * flops / (cluster.card.bf16_tflops * 1e12),
                saving=saves,
                hours_per_epoch=gpu_hours / cluster.gpus,
                gpu_hours_per_epoch=gpu_hours,
                cost_per_epoch=None if price is None else gpu_hours * price,
                gpu_hours_of_run=of_run,
                cost_of_run=None if price is None else of_run * price,
            )
        )
    bytes_per_token = 2 if model.vocab_size <= 2**16 else 4
    return Plan(
        cluster=cluster,
        num_parameters=parameters,
        flops_per_token=flops,
        attended=cut.attended,
        corpus=lengths.source,
        cells=cut.cells,
        tokens=cut.tokens,
        micro_batch_tokens=model.token_budget,
        accumulation=training.gradient_accumulation_steps,
        tokens_per_step=tokens_per_step,
        cells_per_step=tokens_per_step * cut.cells / cut.tokens,
        steps_per_epoch=steps,
        num_train_steps=training.num_train_steps,
        checkpoint_bytes=size,
        disk_bytes=kept_checkpoints(training) * size + MODEL_BYTES * parameters,
        cache_bytes=bytes_per_token * lengths.tokens + (4 + 3 * 4) * lengths.cells,
        engines=engines,
    )


def _engines(config: Config, cluster: Cluster) -> list[tuple[str, Config, bool]]:
    """List the configured engine and its alternatives: DDP, FSDP2, and FSDP2 in groups of a node's GPUs."""
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
    return [(_name(each, gpus), each, each == config) for each in configs]


def _name(config: Config, gpus: int) -> str:
    training = config.training
    if not (training.use_fsdp2 or training.use_nvfsdp):
        return "one GPU" if gpus == 1 else "DDP"
    name = "FSDP2" if training.use_fsdp2 else "nvFSDP"
    group = training.shard_group_size
    return name if group in (None, gpus) else f"{name}, groups of {group}"


def _room(cluster: Cluster) -> float:
    return USABLE_SHARE * cluster.card.memory_gib * GIB


def _memory(config: Config, cluster: Cluster, parameters: int) -> tuple[bool, PeakMemory]:
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


def _largest_micro_batch(config: Config, cluster: Cluster, parameters: int) -> int:
    """Return the largest micro-batch whose peak fits and that the attention kernels take, by bisection."""

    def fits(size: int) -> bool:
        tried = replace(config, model=replace(config.model, micro_batch_size=size * step))
        return _memory(tried, cluster, parameters)[1].total <= _room(cluster)

    step = 128 // gcd(config.model.seq_length, 128)  # Token budgets are multiples of 128.
    low, high = 0, MAX_OFFSET // (3 * config.model.hidden_size * config.model.seq_length * step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * step
