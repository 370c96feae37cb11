"""Time of a training step: a model with few constants, fitted to the measured runs and corrected by the nearest one.

A micro-batch costs its matrix products, its attention, the passes over activations between them, and the loss; a step
costs the update and what communication adds. Rates are shares of the GPU's datasheet. Over the measured runs of one to
four GPUs the model alone is within 10% (tests/unit/test_planner.py); on other GPUs, and between nodes, it is a guess.
"""

from dataclasses import dataclass

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError, require
from geneformer_pretrain.model.resolve import MAX_GRAPH_WIDTH
from geneformer_pretrain.planner.arithmetic import attention_flops, head_flops, layer_flops, sharding_traffic
from geneformer_pretrain.planner.lengths import simulated
from geneformer_pretrain.planner.measured import SEQ_LENGTH, Card, Measurement, measured_like

MATRIX_BF16, MATRIX_FP8 = 0.69, 0.70
"""Shares of the peak that matrix products with weights reach."""
ATTENTION_HOPPER, ATTENTION_ELSEWHERE = 0.23, 0.30
"""Shares of the BF16 peak that attention reaches: this project's kernels on Hopper, FlashAttention elsewhere."""
PASSES_WIDTH, PASSES_INNER = 13.5, 3.4
"""Passes over activations of widths H and F, forward and backward, per layer."""
PASSES_FP8_WIDTH, PASSES_FP8_INNER = 28, 14
"""The same for casts to FP8."""
PASSES_LOGITS = 8
"""Passes over the logits of the masked tokens."""
UPDATE_BYTES, UPDATE_BANDWIDTH = 38, 0.85
"""Bytes a parameter that AdamW, the gradient norm and casts move, and their share of the memory's bandwidth."""
STEP_SECONDS = 1e-3
"""Launches, gaps between kernels and small kernels of a step."""
EAGER_LAYER_SECONDS = 4e-3
"""Time in which the host launches forward and backward of a layer one kernel after the other; less is not possible."""
SHARDED_LAYER_SECONDS = 0.3e-3
"""Launching the collectives of a sharded layer."""
LINK_SHARE, NETWORK_SHARE = 0.2, 0.7
"""Shares of the bandwidths between GPUs and between nodes that collectives reach; the second is not measured."""
HOP_SECONDS = 10e-6
"""Delay of a ring's message from one node to the next; not measured."""
SLOWING = 0.35
"""Time that a collective beside the compute adds, as a share of its own: both want multiprocessors and memory."""
HIDING = 0.9
"""Share of the compute beside which collectives can run."""
PACK_FILL = 0.997
"""Share of the token budget that packing fills."""


@dataclass(frozen=True)
class Cluster:
    """GPUs and how they are connected.

    Attributes
    ----------
    gpu
        Short name of the card.
    gpus, gpus_per_node
        All GPUs of the run, and those of a full node.
    network_gbps
        Gb/s of network that each GPU has to other nodes.
    """

    gpu: str
    card: Card
    gpus: int
    gpus_per_node: int = 8
    network_gbps: float = 400.0

    def __post_init__(self) -> None:
        for option in ("gpus", "gpus_per_node"):
            value = getattr(self, option)
            require(value > 0, f"--{option.replace('_', '-')} {value}: it must be positive.")
        require(self.network_gbps > 0, f"--network {self.network_gbps}: it must be positive.")
        require(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            f"--gpus {self.gpus} is no multiple of --gpus-per-node {self.gpus_per_node}: nodes must be full.",
        )

    @property
    def nodes(self) -> int:
        """Nodes that hold all GPUs."""
        return -(-self.gpus // self.gpus_per_node)

    def bus(self, group: int, rings: int = 1) -> float:
        """Return the bytes per second with which a ring of `group` neighbouring GPUs passes data on.

        Parameters
        ----------
        rings
            Rings that share a node's network: a collective over whole nodes has all of it for itself.
        """
        link = LINK_SHARE * self.card.link_gbps * 1e9
        if group <= self.gpus_per_node and rings == 1:
            return link
        network = NETWORK_SHARE * self.network_gbps / 8 * 1e9 * self.gpus_per_node / rings
        return min(link, network)


def check_card(config: Config, cluster: Cluster) -> None:
    """Raise ConfigError for a precision that the planner, or the GPU, does not have."""
    require(config.data.packing, "plan sizes packed runs; data.packing=false is the slow reference path.")
    require(
        config.training.compute_dtype.value != "float32",
        "plan sizes runs in BF16 and FP8; leave training.compute_dtype=auto.",
    )
    if config.training.use_fp8 and cluster.card.fp8_tflops is None:
        raise ConfigError(
            f"{cluster.card.name} has no FP8: set training.use_fp8=false model.use_te_layers=false for BF16."
        )


def replays_graphs(config: Config, cluster: Cluster) -> bool:
    """Return True where a run launches a micro-batch as one CUDA graph."""
    training, model = config.training, config.model
    if training.use_fsdp2 or training.use_nvfsdp or model.use_te_layers or training.recompute_every_n_layers:
        return False
    if training.cuda_graphs is not None:
        return training.cuda_graphs
    return model.hidden_size <= MAX_GRAPH_WIDTH and cluster.nodes == 1


def compute_seconds(config: Config, card: Card, attended: float, *, graphs: bool) -> float:
    """Return the seconds of one micro-batch's forward and backward.

    Parameters
    ----------
    attended
        Tokens that an average token attends to.
    """
    model, training = config.model, config.training
    peak, fp8 = card.bf16_tflops * 1e12, training.use_fp8
    every, layers = training.recompute_every_n_layers, model.num_hidden_layers
    again = 1 + (-(-layers // every) / layers / 3 if every else 0)  # A forward is a third of forward and backward.
    matrix = MATRIX_FP8 * (card.fp8_tflops or 0) * 1e12 if fp8 else MATRIX_BF16 * peak
    attention = (ATTENTION_HOPPER if card.is_hopper else ATTENTION_ELSEWHERE) * peak
    width = PASSES_WIDTH + (PASSES_FP8_WIDTH if fp8 else 0)
    inner = PASSES_INNER + (PASSES_FP8_INNER if fp8 else 0)
    passes = 2 * layers * (width * model.hidden_size + inner * model.intermediate_size)
    loss = 2 * PASSES_LOGITS * training.mlm_probability * model.vocab_size
    of_token = (
        again * layer_flops(model) / matrix
        + again * attention_flops(model, attended) / attention
        + head_flops(model, training.mlm_probability) / (MATRIX_BF16 * peak)
        + (again * passes + loss) / (card.memory_tbps * 1e12)
    )
    of_host = 0.0 if graphs else EAGER_LAYER_SECONDS * layers
    return max(model.token_budget * of_token, of_host)


def communication_seconds(
    config: Config, cluster: Cluster, num_parameters: int, *, reshards: bool, compute: float
) -> float:
    """Return the seconds that collectives add to a step.

    Volumes of rings over n ranks: (n-1)/n of the data for all-gather and reduce-scatter, twice that for all-reduce.

    Parameters
    ----------
    reshards
        True if weights are gathered for the forward and again for the backward of each micro-batch.
    compute
        Seconds of forward and backward of all micro-batches of a step.
    """
    training, gpus = config.training, cluster.gpus
    if gpus == 1:
        return 0.0
    gradients = 4.0 * num_parameters
    if not (training.use_fsdp2 or training.use_nvfsdp):
        seconds = 2 * (gpus - 1) / gpus * gradients / cluster.bus(gpus)
        # On one node, gradients are summed after the backward; between nodes beside it.
        return seconds if cluster.nodes == 1 else max(SLOWING * seconds, seconds - HIDING * compute)
    group = training.shard_group_size or gpus
    traffic = sharding_traffic(
        config.model,
        group,
        micro_batches=training.gradient_accumulation_steps,
        reshards=reshards,
        pads=training.use_fsdp2,
    )
    weight = 2 if training.use_fsdp2 else 4  # FSDP2 gathers BF16, nvFSDP FP32; both reduce FP32.
    seconds = (group - 1) / group * (weight * traffic.gathered + 4 * traffic.scattered) / cluster.bus(group)
    if group > cluster.gpus_per_node:
        seconds += (traffic.gathers + traffic.scatters) * group / cluster.gpus_per_node * HOP_SECONDS
    replicas = gpus // group
    if replicas > 1:
        bus = cluster.bus(gpus, rings=min(group, cluster.gpus_per_node))
        seconds += 2 * (replicas - 1) / replicas * gradients / group / bus
    launches = SHARDED_LAYER_SECONDS * traffic.scatters
    return launches + max(SLOWING * seconds, seconds - HIDING * compute)


def modelled_seconds(
    config: Config, cluster: Cluster, num_parameters: int, attended: float, *, reshards: bool
) -> float:
    """Return the seconds of a step by the model alone."""
    training = config.training
    graphs = replays_graphs(config, cluster)
    compute = training.gradient_accumulation_steps * compute_seconds(config, cluster.card, attended, graphs=graphs)
    shards = training.use_fsdp2 or training.use_nvfsdp
    owned = num_parameters / (training.shard_group_size or cluster.gpus) if shards else num_parameters
    update = owned * UPDATE_BYTES / (UPDATE_BANDWIDTH * cluster.card.memory_tbps * 1e12)
    added = communication_seconds(config, cluster, num_parameters, reshards=reshards, compute=compute)
    return compute + update + added + STEP_SECONDS


def modelled_measurement(row: Measurement, config: Config, card: Card, num_parameters: int) -> float:
    """Return what the model gives for a measured run of the same model as `config`."""
    sample = simulated(row.lengths, 2048).quantiles()
    attended = float((sample.astype(float) ** 2).sum() / sample.sum())
    cluster = Cluster(row.gpu, card, row.gpus)
    return modelled_seconds(
        row.applied_to(config), cluster, num_parameters, attended, reshards=row.reshard_after_forward
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and where they come from.

    Attributes
    ----------
    is_measured
        True if this engine was measured with this model, layers, precision and number of GPUs on this card.
    basis
        The measured run, or what is missing, in words.
    """

    seconds: float
    is_measured: bool
    basis: str


def step_time(config: Config, cluster: Cluster, num_parameters: int, attended: float, *, reshards: bool) -> StepTime:
    """Return the time of a step: the model's, times what the nearest measured run took by the model.

    Near is first the same engine, then the number of GPUs, recomputation and micro-batch; of equals, the newest.
    """
    seconds = modelled_seconds(config, cluster, num_parameters, attended, reshards=reshards)
    rows = measured_like(config, cluster.gpu)
    if not rows:
        return StepTime(seconds, False, f"estimated, this model with these layers was not measured on {cluster.gpu}")
    training = config.training
    engine = "fsdp2" if training.use_fsdp2 else "nvfsdp" if training.use_nvfsdp else "ddp"
    if cluster.gpus == 1:
        engine = "ddp"

    def nearness(row: Measurement) -> tuple[bool, float, bool, float, str]:
        return (
            row.engine == engine,
            -abs(row.gpus - cluster.gpus),
            row.recompute_every_n_layers == training.recompute_every_n_layers,
            -abs(row.micro_batch_size - config.model.micro_batch_size),
            row.date,
        )

    nearest = max(rows, key=nearness)
    measured = (nearest.step_ms or 0) / 1e3
    corrected = seconds * measured / modelled_measurement(nearest, config, cluster.card, num_parameters)
    is_measured = (
        (nearest.engine, nearest.gpus) == (engine, cluster.gpus)
        and nearest.recompute_every_n_layers == training.recompute_every_n_layers
        and training.shard_group_size is None
        and config.model.seq_length == SEQ_LENGTH
        and Kernel.torch not in (config.model.attention_kernel, config.model.fused_kernels)
    )
    return StepTime(corrected, is_measured, f"{'measured' if is_measured else 'estimated from'} {nearest}")
