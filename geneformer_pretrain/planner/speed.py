"""Time of a training step by a model with few constants.

A micro-batch costs its matrix products, its attention, the passes over activations between them, and the loss; a step
costs the update and what communication adds. Over the measured runs of one to four GPUs the model is within 5%; fitted
to the runs of two models, it is within 12% for the third (tests/unit/planner/test_measured.py); on other GPUs, and
between nodes, it is a guess.
"""

from dataclasses import dataclass

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError, require
from geneformer_pretrain.kernels.select import FLASH_HEAD_SIZES, MIN_CAPABILITY, SMALLER_SHARED_MEMORY
from geneformer_pretrain.model.resolve import MAX_GRAPH_WIDTH
from geneformer_pretrain.planner.arithmetic import attention_flops, head_flops, layer_flops, sharding_traffic
from geneformer_pretrain.planner.measured import Card
from geneformer_pretrain.planner.rates import FITTED, Rates

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
        require(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            f"--gpus {self.gpus} is no multiple of --gpus-per-node {self.gpus_per_node}: nodes must be full.",
        )

    @property
    def nodes(self) -> int:
        """Nodes that hold all GPUs."""
        return -(-self.gpus // self.gpus_per_node)

    def bus(self, group: int, rates: Rates, rings: int = 1) -> float:
        """Return the bytes per second with which a ring of `group` neighbouring GPUs passes data on.

        Parameters
        ----------
        rings
            Rings that share a node's network: a collective over whole nodes has all of it for itself.
        """
        link = rates.link_share * self.card.link_gbps * 1e9
        if group <= self.gpus_per_node and rings == 1:
            return link
        network = rates.network_share * self.network_gbps / 8 * 1e9 * self.gpus_per_node / rings
        return min(link, network)


def check_card(config: Config, cluster: Cluster) -> None:
    """Raise ConfigError for a precision that the planner or the GPU does not have, and for heads without a kernel."""
    require(config.data.packing, "plan sizes packed runs; data.packing=false is the slow reference path.")
    require(
        config.training.compute_dtype.value != "float32",
        "plan sizes runs in BF16 and FP8; leave training.compute_dtype=auto.",
    )
    model, training = config.model, config.training
    if training.use_fp8 and cluster.card.fp8_tflops is None:
        raise ConfigError(
            f"{cluster.card.name} has no FP8: set training.use_fp8=false model.use_te_layers=false for BF16."
        )
    if config.fp8_by_kernels:
        runs = MIN_CAPABILITY[0] <= cluster.card.capability < SMALLER_SHARED_MEMORY[0]
        if not runs or model.fused_kernels is Kernel.torch:
            raise ConfigError(
                f"{cluster.card.name}: FP8 with PyTorch layers needs compute capability 9 or 10 and "
                "model.fused_kernels=auto or triton; set model.use_te_layers=true, or training.use_fp8=false for BF16."
            )
    head_size = model.hidden_size // model.num_attention_heads
    require(
        head_size in FLASH_HEAD_SIZES,
        f"model.hidden_size={model.hidden_size} and model.num_attention_heads={model.num_attention_heads} make heads "
        f"of size {head_size}; attention needs multiples of 8 up to 256. Change one of them.",
    )


def replays_graphs(config: Config, cluster: Cluster) -> bool:
    """Return True where a run launches a micro-batch as one CUDA graph."""
    training, model = config.training, config.model
    if training.use_fsdp2 or training.use_nvfsdp or model.use_te_layers or training.recompute_every_n_layers:
        return False
    if training.cuda_graphs is not None:
        return training.cuda_graphs
    return model.hidden_size <= MAX_GRAPH_WIDTH and cluster.nodes == 1


def compute_seconds(config: Config, card: Card, attended: float, *, graphs: bool, rates: Rates = FITTED) -> float:
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
    matrix = rates.matrix_fp8 * (card.fp8_tflops or 0) * 1e12 if fp8 else rates.matrix_bf16 * peak
    attention = (rates.attention_hopper if card.is_hopper else rates.attention_elsewhere) * peak
    width, inner = rates.passes_width, rates.passes_inner
    if config.fp8_by_kernels:
        width += rates.passes_kernels_width
    elif fp8:
        width, inner = width + rates.passes_fp8_width, inner + rates.passes_fp8_inner
    passes = 2 * layers * (width * model.hidden_size + inner * model.intermediate_size)
    loss = 2 * rates.passes_logits * training.mlm_probability * model.vocab_size
    of_token = (
        again * layer_flops(model) / matrix
        + again * attention_flops(model, attended) / attention
        + head_flops(model, training.mlm_probability) / (rates.matrix_bf16 * peak)
        + (again * passes + loss) / (card.memory_tbps * 1e12)
    )
    of_host = layers * (rates.graph_layer_seconds if graphs else rates.eager_layer_seconds)
    return max(model.token_budget * of_token, of_host)


def communication_seconds(
    config: Config, cluster: Cluster, num_parameters: int, *, reshards: bool, compute: float, rates: Rates = FITTED
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
        seconds = 2 * (gpus - 1) / gpus * gradients / cluster.bus(gpus, rates)
        # On one node, gradients are summed after the backward; between nodes beside it.
        return seconds if cluster.nodes == 1 else max(rates.slowing * seconds, seconds - rates.hiding * compute)
    group = training.shard_group_size or gpus
    traffic = sharding_traffic(
        config.model,
        group,
        micro_batches=training.gradient_accumulation_steps,
        reshards=reshards,
        pads=training.use_fsdp2,
    )
    # Weights are gathered in BF16, gradients reduced in FP32.
    seconds = (group - 1) / group * (2 * traffic.gathered + 4 * traffic.scattered) / cluster.bus(group, rates)
    if group > cluster.gpus_per_node:
        seconds += (traffic.gathers + traffic.scatters) * group / cluster.gpus_per_node * rates.hop_seconds
    replicas = gpus // group
    if replicas > 1:
        bus = cluster.bus(gpus, rates, rings=min(group, cluster.gpus_per_node))
        seconds += 2 * (replicas - 1) / replicas * gradients / group / bus
    launches = rates.sharded_layer_seconds * traffic.scatters
    return launches + max(rates.slowing * seconds, seconds - rates.hiding * compute)


def modelled_seconds(
    config: Config, cluster: Cluster, num_parameters: int, attended: float, *, reshards: bool, rates: Rates = FITTED
) -> float:
    """Return the seconds of a step by the model alone."""
    training = config.training
    graphs = replays_graphs(config, cluster)
    compute = training.gradient_accumulation_steps * compute_seconds(
        config, cluster.card, attended, graphs=graphs, rates=rates
    )
    shards = training.use_fsdp2 or training.use_nvfsdp
    owned = num_parameters / (training.shard_group_size or cluster.gpus) if shards else num_parameters
    update = owned * rates.update_bytes / (rates.update_bandwidth * cluster.card.memory_tbps * 1e12)
    added = communication_seconds(config, cluster, num_parameters, reshards=reshards, compute=compute, rates=rates)
    return compute + update + added + rates.step_seconds
