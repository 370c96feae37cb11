"""The plan of a run: everything a lab asks before it books GPUs."""

import math
from dataclasses import dataclass

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.model.memory import PeakMemory, num_parameters
from geneformer_pretrain.planner.arithmetic import flops_per_token
from geneformer_pretrain.planner.engines import engine_configs, engine_name
from geneformer_pretrain.planner.estimate import StepTime, step_time
from geneformer_pretrain.planner.fitting import Remedy, largest_micro_batch, memory_of, remedies, room
from geneformer_pretrain.planner.lengths import CellLengths
from geneformer_pretrain.planner.saving import CHECKPOINT_BYTES, MODEL_BYTES, TO_DISK, Saving, kept_checkpoints, saving
from geneformer_pretrain.planner.speed import PACK_FILL, Cluster, check_card


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
    steps_per_epoch
        Less than 1 if a step has more micro-batches than all cells fill: each step then reads cells several times.
    checkpoint_bytes, disk_bytes
        One checkpoint, and the run's folder with all that are kept and the export.
    cache_bytes
        The corpus as it is cached, with three epochs' plans.
    remedies
        Settings with which a run fits that does not as configured; none if no number of these GPUs holds it.
    """

    cluster: Cluster
    vocab_size: int
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
    remedies: list[Remedy]

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
    packs_per_step = training.gradient_accumulation_steps * cluster.gpus
    tokens_per_step = PACK_FILL * model.token_budget * packs_per_step
    # An epoch's last pack may be far from full, but holds cells of no other epoch.
    steps = math.ceil(cut.tokens / (PACK_FILL * model.token_budget)) / packs_per_step
    size = CHECKPOINT_BYTES * parameters
    engines = []
    for engine_config, is_configured in engine_configs(config, cluster):
        reshards, memory = memory_of(engine_config, cluster, parameters)
        step = step_time(engine_config, cluster, parameters, cut.attended, reshards=reshards)
        saves = saving(engine_config.training, parameters, cluster.gpus, step.seconds, disk)
        seconds = step.seconds / (1 - saves.share)
        rate = tokens_per_step / cluster.gpus / step.seconds
        gpu_hours = steps * seconds / 3600 * cluster.gpus
        of_run = training.num_train_steps * seconds / 3600 * cluster.gpus
        engines.append(
            EnginePlan(
                engine=engine_name(engine_config, cluster.gpus),
                is_configured=is_configured,
                memory=memory,
                fits=memory.total <= room(cluster),
                largest_micro_batch=largest_micro_batch(engine_config, cluster, parameters),
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
        vocab_size=model.vocab_size,
        num_parameters=parameters,
        flops_per_token=flops,
        attended=cut.attended,
        corpus=lengths.source,
        cells=cut.cells,
        tokens=cut.tokens,
        micro_batch_tokens=model.token_budget,
        accumulation=training.gradient_accumulation_steps,
        tokens_per_step=tokens_per_step,
        cells_per_step=cut.cells / steps,
        steps_per_epoch=steps,
        num_train_steps=training.num_train_steps,
        checkpoint_bytes=size,
        disk_bytes=kept_checkpoints(training) * size + MODEL_BYTES * parameters,
        cache_bytes=bytes_per_token * lengths.tokens + (4 + 3 * 4) * lengths.cells,
        engines=engines,
        remedies=remedies(config, cluster, parameters),
    )
