"""Parameters and FLOPs of a model, counted from its configuration."""

from geneformer_pretrain.config.model import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """Count the parameters of the model; the decoder shares the word embeddings and has a bias of its own."""
    h, f = model.hidden_size, model.intermediate_size
    norm = 2 * h
    embeddings = (model.vocab_size + model.max_position_embeddings + model.type_vocab_size) * h + norm
    attention = 4 * (h * h + h)
    feed_forward = h * f + f + f * h + h
    head = h * h + h + norm + model.vocab_size
    return embeddings + model.num_hidden_layers * (attention + feed_forward + 2 * norm) + head


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
