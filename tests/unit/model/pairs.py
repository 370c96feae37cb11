"""Our model beside stock BERT, and cells for both."""

import torch
import transformers

from modeling_bert_te import BertConfig, BertForMaskedLM

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def make_pair(**overrides):
    """Our model and stock BERT with the same weights, without dropout."""
    values = {
        **SIZES,
        "hidden_act": "relu",
        "max_position_embeddings": 2048,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        **overrides,
    }
    torch.manual_seed(0)
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**values))
    for parameter in stock.parameters():  # no bias left at zero, no LayerNorm at one
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours = BertForMaskedLM(BertConfig(**values))
    names = set(ours.state_dict())
    ours.load_state_dict({name: value for name, value in stock.state_dict().items() if name in names}, strict=True)
    return ours, stock


def make_cells(lengths, seed=1):
    """Padded input_ids, attention_mask and labels, [B, S] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, SIZES["vocab_size"], shape, generator=generator) * mask
    selected = (torch.rand(shape, generator=generator) < 0.3) & mask.bool()
    selected[0, 0] = True
    return ids, mask, torch.where(selected, ids, -100)


def packed_arguments(ids, mask, labels, unused_segments=3, unused_labels=5):
    """The same cells packed, with unused entries in cu_seqlens and labels as the loader leaves them."""
    valid = mask.bool()
    flat_labels = labels[valid]
    index = (flat_labels != -100).nonzero().squeeze(1)
    ends = mask.sum(1).cumsum(0)
    return {
        "input_ids": ids[valid].int(),
        "position_ids": torch.arange(ids.shape[1]).expand(ids.shape)[valid].int(),
        "cu_seqlens": torch.cat([torch.zeros(1), ends, ends[-1:].repeat(unused_segments)]).int(),
        "max_seqlen": ids.shape[1],
        "masked_index": torch.cat([index, torch.zeros(unused_labels, dtype=torch.long)]).int(),
        "labels": torch.cat([flat_labels[index], torch.full((unused_labels,), -100)]).int(),
    }


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
