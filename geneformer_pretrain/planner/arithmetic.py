"""FLOPs and collectives of a model, counted from its configuration; `model.memory` counts parameters."""

from dataclasses import dataclass

from geneformer_pretrain.config.model import ModelConfig

Shapes = list[tuple[int, int]]
"""Rows and columns of tensors; vectors have one column."""


def layer_shapes(model: ModelConfig) -> Shapes:
    """List the parameters of one encoder layer."""
    h, f = model.hidden_size, model.intermediate_size
    attention, norm = [(h, h), (h, 1)], [(h, 1), (h, 1)]
    return [*(4 * attention), (f, h), (f, 1), (h, f), (h, 1), *(2 * norm)]


def root_shapes(model: ModelConfig) -> Shapes:
    """List the parameters outside of the layers; the decoder shares the word embeddings and has a bias of its own."""
    h = model.hidden_size
    norm = [(h, 1), (h, 1)]
    embeddings = [(model.vocab_size, h), (model.max_position_embeddings, h), (model.type_vocab_size, h)]
    return [*embeddings, *norm, (h, h), (h, 1), *norm, (model.vocab_size, 1)]


def size(shapes: Shapes, group: int = 1) -> int:
    """Count the elements of tensors, rows padded to a multiple of `group` as FSDP2 does before it shards them."""
    return sum(-(-rows // group) * group * columns for rows, columns in shapes)


@dataclass(frozen=True)
class ShardingTraffic:
    """Collectives of one step of a sharding engine over the ranks that share one copy of the weights.

    Attributes
    ----------
    gathers, scatters
        Number of all-gathers of weights and of reduce-scatters of gradients.
    gathered, scattered
        Elements of the whole tensors that they gather and scatter, padding included.
    """

    gathers: int
    gathered: int
    scatters: int
    scattered: int


def sharding_traffic(
    model: ModelConfig, group: int, *, micro_batches: int, reshards: bool, pads: bool = True
) -> ShardingTraffic:
    """Count the collectives of a step.

    Layers and the rest are gathered once, or, if they are resharded, in each micro-batch: layers twice. Gradients are
    scattered in each micro-batch.

    Parameters
    ----------
    pads
        True for FSDP2, which shards whole rows: 256 rows over 512 ranks travel as 512.
    """
    padding = group if pads else 1
    root, layer = size(root_shapes(model), padding), size(layer_shapes(model), padding)
    layers = model.num_hidden_layers
    once = 1 + layers, root + layers * layer
    if reshards:
        gathers, gathered = micro_batches * (1 + 2 * layers), micro_batches * (root + 2 * layers * layer)
    else:
        gathers, gathered = once
    return ShardingTraffic(gathers, gathered, micro_batches * once[0], micro_batches * once[1])


def layer_flops(model: ModelConfig) -> float:
    """Count the FLOPs a token of all layers' matrix products with weights, forward and backward.

    Two for each multiply-add, and the backward as twice the forward: 3 x layers x 2 (4 H^2 + 2 H F).
    """
    h, f = model.hidden_size, model.intermediate_size
    return 3 * model.num_hidden_layers * 2 * (4 * h * h + 2 * h * f)


def attention_flops(model: ModelConfig, attended: float) -> float:
    """Count the FLOPs a token of attention, forward and backward: 3 x layers x 4 H L.

    Parameters
    ----------
    attended
        L, tokens that an average token attends to: sum(n^2) / sum(n) over the cells' lengths n.
    """
    return 3 * model.num_hidden_layers * 4 * model.hidden_size * attended


def head_flops(model: ModelConfig, mlm_probability: float) -> float:
    """Count the FLOPs a token of the head, which sees the masked share m alone: 3 x 2 m (H^2 + H V)."""
    h = model.hidden_size
    return 3 * 2 * mlm_probability * (h * h + h * model.vocab_size)


def flops_per_token(model: ModelConfig, mlm_probability: float, attended: float) -> float:
    """Count the model FLOPs of one token, forward and backward; recomputation is not among them."""
    return layer_flops(model) + attention_flops(model, attended) + head_flops(model, mlm_probability)
