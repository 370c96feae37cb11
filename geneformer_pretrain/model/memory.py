"""Estimates peak GPU memory from the architecture (docs/performance.md compares), and names settings that reduce it."""

from dataclasses import dataclass

from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.packing import masked_capacity

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a parameter: FP32 weight, FP32 gradient, AdamW's two FP32 moments."""


def num_parameters(model: ModelConfig) -> int:
    """Count the parameters of a model.

    Word, position and token-type embeddings with LayerNorm; per layer four projections, the feed-forward layer and two
    LayerNorms; the head's dense layer, LayerNorm and output bias.
    """
    h, f = model.hidden_size, model.intermediate_size
    embeddings = (model.vocab_size + model.max_position_embeddings + model.type_vocab_size + 2) * h
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 4 * h
    return embeddings + model.num_hidden_layers * layer + h * h + 3 * h + model.vocab_size


def layer_activations(config: Config, itemsize: int) -> int:
    """Count the bytes a token that one encoder layer keeps for the backward.

    PyTorch layers keep its input, query, key and value, the attention's output, both sums before LayerNorm, the
    first half's output, each of width H, and the activation of width F; dropout masks are computed again. In FP8, what
    matrix products keep is counted in one byte, and neither of a layer's inputs is kept besides. Transformer Engine
    keeps the activation twice and its input once.
    """
    h, f = config.model.hidden_size, config.model.intermediate_size
    if config.fp8_by_kernels:
        return 15 * h + f
    if config.training.use_fp8:
        return 15 * h + 3 * f
    return itemsize * (8 * h + f)


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one GPU at the moment of a step that takes most, by part.

    Attributes
    ----------
    weights, optimizer
        FP32 weights and AdamW's two moments that this rank owns.
    gradients
        FP32 gradients that are there at that moment.
    working
        Weights in the compute dtype, or gathered from other ranks, and gradients on their way to their owners.
    activations
        Kept for the backward, embeddings included.
    logits
        Scores over the vocabulary, for the masked tokens alone.
    """

    weights: int
    optimizer: int
    gradients: int
    working: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.optimizer + self.gradients + self.working + self.activations + self.logits


def peak_memory(
    config: Config,
    world_size: int,
    num_parameters: int,
    itemsize: int,
    with_graphs: bool = False,
    reshards: bool = True,
) -> PeakMemory:
    """Estimate the memory of one GPU by part, without what PyTorch and the CUDA context hold besides.

    The larger of two moments counts: the start of the backward, when all activations are there, and its end, when
    all gradients are.

    Parameters
    ----------
    world_size
        Number of ranks.
    num_parameters
        Parameters of the whole model.
    itemsize
        Bytes of the compute dtype.
    with_graphs
        True if micro-batches are replayed: several ranks then copy gradients into one buffer.
    reshards
        True if a sharding engine frees gathered weights between forward and backward.
    """
    model, training = config.model, config.training
    layers, every = model.num_hidden_layers, training.recompute_every_n_layers
    recomputed = -(-layers // every) if every else 0
    kept = layers - recomputed + bool(recomputed)  # Recomputed layers come back one at a time.
    shards = training.use_fsdp2 or training.use_nvfsdp
    owned = -(-num_parameters // (training.shard_group_size or world_size)) if shards else num_parameters

    tokens = model.token_budget
    of_input = itemsize * model.hidden_size * tokens
    activations = kept * layer_activations(config, itemsize) * tokens + (recomputed + 2) * of_input
    if model.use_te_layers:  # The activation function is a kernel of its own: its input and output, with gradients.
        activations += 2 * itemsize * model.intermediate_size * tokens
    logits = masked_capacity(tokens, training.mlm_probability) * model.vocab_size * itemsize

    root = (model.vocab_size + model.max_position_embeddings) * model.hidden_size
    weights_of_layer = (num_parameters - root) // layers
    # What is cast stays for the backward: a copy in BF16, or one in FP8; Transformer Engine keeps two of these.
    copies = 1 if config.fp8_by_kernels else 2 if training.use_fp8 or itemsize < WEIGHT else 0
    working = copies * (root + kept * weights_of_layer)
    if shards:
        # The gradients of two layers as they come and in FP32, on their way to their owners.
        reduced = 2 * (itemsize + GRADIENT) * weights_of_layer
        # Two layers and the root are gathered at a time, or everything.
        gathered = root + (2 if reshards else layers) * weights_of_layer
        working = reduced + itemsize * gathered
        if training.use_nvfsdp:  # It keeps shards of what it gathers.
            working += itemsize * owned if itemsize < WEIGHT else 0
        if training.use_fp8:  # Under FSDP2, Transformer Engine casts again for the backward and keeps no copies.
            working += (copies if training.use_nvfsdp or config.fp8_by_kernels else 0) * kept * weights_of_layer

    gradients = GRADIENT * owned
    # Gradients are there from the start where DDP or nvFSDP keep buffers, and from the second micro-batch on.
    buffers = world_size > 1 and not training.use_fsdp2
    early = gradients if buffers or training.gradient_accumulation_steps > 1 else 0
    late = 2 * gradients if with_graphs and world_size > 1 else gradients
    if early + working + activations + logits >= late:
        return PeakMemory(WEIGHT * owned, MOMENTS * owned, early, working, activations, logits)
    return PeakMemory(WEIGHT * owned, MOMENTS * owned, late, 0, 0, 0)


def estimate_peak(
    config: Config,
    world_size: int,
    num_parameters: int,
    itemsize: int,
    with_graphs: bool = False,
    reshards: bool = True,
) -> int:
    """Estimate the peak memory of one GPU in bytes: the total of `peak_memory`, whose parameters these are."""
    return peak_memory(config, world_size, num_parameters, itemsize, with_graphs, reshards).total


def remedies(config: Config) -> list[str]:
    """List settings with which a step takes less memory, first those that a run can change without starting anew."""
    model, training = config.model, config.training
    found = []
    if training.recompute_every_n_layers != 1:
        found.append("training.recompute_every_n_layers=1 (or 2: half of the layers)")
    if not (training.use_fsdp2 or training.use_nvfsdp):
        found.append("several GPUs and training.use_fsdp2=True")
    elif training.reshard_after_forward is not True:
        found.append("training.reshard_after_forward=True")
    if model.micro_batch_size > 1:
        found.append(f"for a new run a model.micro_batch_size below {model.micro_batch_size}")
    return found
