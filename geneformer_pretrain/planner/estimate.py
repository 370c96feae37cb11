"""Time of a step: measured where it was, else the model's, corrected by the nearest measured run of the same layers."""

from dataclasses import dataclass

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.model.memory import num_parameters
from geneformer_pretrain.planner.lengths import simulated
from geneformer_pretrain.planner.measured import Measurement, card, measured_like
from geneformer_pretrain.planner.rates import FITTED, Rates
from geneformer_pretrain.planner.speed import Cluster, modelled_seconds

SAME_LENGTHS = 0.1
"""Difference of the tokens that a token attends to, up to which lengths count as those of a measured run: 3% of 106m's
time."""


def attended_by(row: Measurement) -> float:
    """Return the tokens that an average token of a measured run attends to."""
    sample = simulated(row.lengths, row.architecture["seq_length"]).quantiles().astype(float)
    return float((sample**2).sum() / sample.sum())


def modelled_measurement(row: Measurement, config: Config, rates: Rates = FITTED) -> float:
    """Return the seconds that the model gives for a measured run, by the run's own model, cells and shape.

    Parameters
    ----------
    config
        Any configuration: what the row does not say is read from it.
    """
    own = row.applied_to(config)
    cluster = Cluster(row.gpu, card(row.gpu), row.gpus)
    parameters = num_parameters(own.model)
    return modelled_seconds(own, cluster, parameters, attended_by(row), reshards=row.reshard_after_forward, rates=rates)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and where they come from.

    Attributes
    ----------
    is_measured
        True if a run of this model, shape, engine and precision on as many of these GPUs of one node was measured.
    basis
        The measured run, or what is missing, in words.
    """

    seconds: float
    is_measured: bool
    basis: str


def step_time(
    config: Config,
    cluster: Cluster,
    num_parameters: int,
    attended: float,
    *,
    reshards: bool,
    rows: list[Measurement] | None = None,
) -> StepTime:
    """Return the time of a step: the model's, times what the nearest measured run took by the model.

    Near is first the same engine, then vocabulary and longest cell, the number of GPUs, recomputation, micro-batch and
    lengths; of equals, the newest.

    Parameters
    ----------
    rows
        Measured runs of the same layers, precision and GPU; None: all that are known.
    """
    seconds = modelled_seconds(config, cluster, num_parameters, attended, reshards=reshards)
    rows = measured_like(config, cluster.gpu) if rows is None else rows
    if not rows:
        return StepTime(seconds, False, f"estimated, these layers in this precision were not measured on {cluster.gpu}")
    model, training = config.model, config.training
    engine = "fsdp2" if training.use_fsdp2 else "nvfsdp" if training.use_nvfsdp else "ddp"
    own_kernels = Kernel.torch not in (model.attention_kernel, model.fused_kernels)

    def differences(row: Measurement) -> tuple[float, ...]:
        return (
            row.engine != engine,
            any(getattr(model, key) != value for key, value in row.architecture.items()),
            abs(row.gpus - cluster.gpus),
            row.recompute_every_n_layers != training.recompute_every_n_layers,
            abs(row.micro_batch_size - model.micro_batch_size),
            engine == "fsdp2" and row.reshard_after_forward != reshards,
            abs(attended_by(row) / attended - 1) > SAME_LENGTHS,
        )

    nearest = min(reversed(rows), key=differences)
    corrected = seconds * (nearest.step_ms or 0) / 1e3 / modelled_measurement(nearest, config)
    is_measured = (
        not any(differences(nearest))
        and cluster.nodes == 1  # as all measured runs
        and training.gradient_accumulation_steps == 1
        and training.shard_group_size is None
        and own_kernels
        and training.cuda_graphs is not False
    )
    basis = f"{'measured' if is_measured else 'estimated from'} {nearest}"
    if not own_kernels:
        basis += "; PyTorch's kernels, which the configuration asks for, are slower, by how much is not modelled"
    return StepTime(corrected, is_measured, basis)
