"""GPU memory of a training step, counted from the architecture; compared with measurements in docs/performance.md."""

from .config import Config
from .data.plan import masked_capacity

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a parameter: FP32 weight, FP32 gradient, AdamW's two FP32 moments."""


def layer_activations(config: Config, itemsize: int) -> int:
    """Bytes a token that one encoder layer keeps for the backward.

    PyTorch layers keep its input, query, key and value, the attention's output, both sums before LayerNorm, the
    first half's output, each of width H, and the activation of width F; dropout masks are computed again. In FP8, what
    the matrix products of Transformer Engine keep is counted in one byte, and the activation twice.
    """
    h, f = config.model.hidden_size, config.model.intermediate_size
    if config.training.use_fp8:
        return 15 * h + 3 * f
    return itemsize * (8 * h + f)


def estimate_peak(
    config: Config,
    world_size: int,
    num_parameters: int,
    itemsize: int,
    with_graphs: bool = False,
    reshards: bool = True,
) -> int:
    """Peak memory of one GPU in bytes, without what PyTorch and the CUDA context hold besides.

    The larger of two moments: the start of the backward, when all activations are there, and its end, when all
    gradients are.

    Parameters
    ----------
    world_size
        Number of processes.
    num_parameters
        Of the whole model.
    itemsize
        Bytes of the compute dtype.
    with_graphs
        Whether micro-batches are replayed: several ranks then copy gradients into one buffer.
    reshards
        Whether a sharding engine frees gathered weights between forward and backward.
    """
    model, training = config.model, config.training
    tokens, layers = model.token_budget, model.num_hidden_layers
    every = training.recompute_every_n_layers
    recomputed = -(-layers // every) if every else 0
    of_layer = layer_activations(config, itemsize) * tokens
    of_input = itemsize * model.hidden_size * tokens
    # Recomputed layers come back one at a time.
    activations = (layers - recomputed + bool(recomputed)) * of_layer + recomputed * of_input
    embeddings = 2 * of_input
    logits = masked_capacity(tokens, training.mlm_probability) * model.vocab_size * itemsize
    activations += embeddings + logits
    if model.use_te_layers:  # The activation function is a kernel of its own: its input and output, with gradients.
        activations += 2 * itemsize * model.intermediate_size * tokens

    in_layers = num_parameters - (model.vocab_size + model.max_position_embeddings) * model.hidden_size
    if training.use_fsdp2 or training.use_nvfsdp:
        owned = -(-num_parameters // (training.shard_group_size or world_size))
        # Two layers and the root are gathered at a time, or everything.
        gathered_layers = 2 if reshards else layers
        gathered_size = itemsize if training.use_fsdp2 else WEIGHT
        working = gathered_size * (num_parameters - in_layers + gathered_layers * in_layers // layers)
    else:
        owned = num_parameters
        working = itemsize * num_parameters if itemsize < WEIGHT else 0
    if training.use_fp8:
        working += 2 * in_layers  # by rows and by columns
    gradients = GRADIENT * owned
    # Gradients are there from the start where DDP keeps buckets, and from the second micro-batch on.
    early = gradients if world_size > 1 or training.gradient_accumulation_steps > 1 else 0
    start = early + working + activations
    end = 2 * gradients if with_graphs and world_size > 1 else gradients
    return (WEIGHT + MOMENTS) * owned + max(start, end)
