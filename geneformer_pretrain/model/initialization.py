"""Initial weights that depend on the seed and on each parameter's name alone.

So they are the same for every engine, layer kind and number of ranks.
"""

import hashlib

import torch
from torch import nn

from modeling_bert_te import canonical_name


@torch.no_grad()
def initialize_weights(module: nn.Module, prefix: str, seed: int, initializer_range: float, padding_row: int) -> None:
    """BERT's initialisation: matrices normal(0, initializer_range), biases 0, LayerNorm weights 1.

    The row of the padding token in the word embeddings is zero. Values are drawn on the CPU by a generator
    seeded with a hash of (seed, parameter name).

    Parameters
    ----------
    module
        The model or a part of it; holds its weights in full, on any device.
    prefix
        What stands before this part's parameter names in the whole model, such as "bert.embeddings".
    """
    for name, parameter in ((canonical_name(n), p) for n, p in module.named_parameters(prefix)):
        if name.endswith("LayerNorm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = torch.empty(parameter.shape, device="cpu").normal_(0.0, initializer_range, generator=generator)
            if name.endswith("word_embeddings.weight"):
                values[padding_row] = 0.0
            parameter.copy_(values)
