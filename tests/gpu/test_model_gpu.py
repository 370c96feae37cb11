"""The packed, compiled BF16 model on a GPU against stock BERT in float32."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM

# Warnings of compilers and of Transformer Engine are not ours to mend.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

CONFIG = {
    "vocab_size": 25426,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "relu",
    "max_position_embeddings": 2048,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
}
TOKENS, LENGTH, MASKED, SEGMENTS = 4096, 1024, 1024, 24


def stock_model():
    torch.manual_seed(0)
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG)).cuda()
    for parameter in stock.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return stock


def our_model(stock, compile_blocks, dtype=torch.bfloat16):
    """FP32 weights of `stock`, computing in `dtype`."""
    ours = BertForMaskedLM(BertConfig(**CONFIG)).cuda()
    names = set(ours.state_dict())
    ours.load_state_dict({name: value for name, value in stock.state_dict().items() if name in names})
    ours.bert.embeddings.compute_dtype = dtype
    if compile_blocks:
        ours.compile_embeddings_and_head()
        for layer in ours.bert.encoder.layer:
            layer.compile_in_place()
    return ours


def pack(lengths, seed):
    """A pack of constant shape as the loader makes it, and the same cells padded, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    used = sum(lengths)
    tail = [min(LENGTH, TOKENS - start) for start in range(used, TOKENS, LENGTH)]
    segments = [*lengths, *tail]
    ids = torch.randint(2, CONFIG["vocab_size"], (TOKENS,), generator=generator)
    ids[used:] = 0
    ends = torch.tensor([0, *segments]).cumsum(0)
    index = torch.randperm(used, generator=generator)[: 1 + used // 7].sort().values
    labels = torch.full((MASKED,), -100)
    labels[: len(index)] = ids[index]
    packed = {
        "input_ids": ids.int(),
        "position_ids": torch.cat([torch.arange(n) for n in segments]).int(),
        "cu_seqlens": torch.cat([ends, ends[-1:].repeat(SEGMENTS + 1 - len(ends))]).int(),
        "masked_index": torch.nn.functional.pad(index, (0, MASKED - len(index))).int(),
        "labels": labels.int(),
    }
    flat_labels = torch.full((TOKENS,), -100)
    flat_labels[index] = ids[index]
    rows = torch.tensor(lengths).cumsum(0).tolist()
    starts = [0, *rows[:-1]]
    pad = torch.nn.utils.rnn.pad_sequence
    padded = {
        "input_ids": pad([ids[a:b] for a, b in zip(starts, rows, strict=True)], batch_first=True),
        "labels": pad([flat_labels[a:b] for a, b in zip(starts, rows, strict=True)], True, -100),
        "attention_mask": pad([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True),
    }
    return (
        {**{k: v.cuda() for k, v in packed.items()}, "max_seqlen": LENGTH},
        {k: v.cuda() for k, v in padded.items()},
    )


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model):
    named = getattr(model, "canonical_parameters", model.named_parameters)()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def assert_as_near_as_stock_bf16(output, found, stock, padded):
    """Loss and gradients are about as near to float32 as those of stock BERT cast to BF16."""
    stock.zero_grad()
    expected = stock(**padded)
    expected.loss.backward()
    reference = gradients(stock)
    half = copy.deepcopy(stock).bfloat16()
    half.zero_grad()
    half(**padded).loss.backward()
    stock_bf16 = gradients(half)
    assert_close(output.loss, expected.loss, atol=0.01, rtol=2e-3)
    scale = max(gradient.norm() for gradient in reference.values())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if reference[name].norm() > 1e-4 * scale:  # a key bias has no gradient but rounding
            limit = 2 * relative_error(stock_bf16[name], reference[name]) + 0.05
            assert relative_error(gradient, reference[name]) < limit, name


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("compile_blocks", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lengths", [[1024, 900, 1, 700, 30], [1] * 20, [1024] * 4, [5] * 20], ids=str)
def test_bf16_matches_float32_stock(lengths, compile_blocks, kernel):
    torch._dynamo.reset()
    stock = stock_model()
    packed, padded = pack(lengths, seed=len(lengths))
    ours = our_model(stock, compile_blocks)
    if kernel == "triton":
        from geneformer_pretrain.kernels.adapters import TritonAttention, TritonFused

        ours.set_attention(TritonAttention())
        ours.set_fused_kernels(TritonFused())
    output = ours(**packed)
    output.loss.backward()
    assert_as_near_as_stock_bf16(output, gradients(ours), stock, padded)


def test_float32_on_gpu_matches_stock():
    stock = stock_model()
    packed, padded = pack([300, 40, 1], seed=3)
    expected = stock(**padded).loss
    assert_close(our_model(stock, False, torch.float32)(**packed).loss, expected, atol=1e-4, rtol=1e-4)


def test_padded_logits_in_bf16():
    stock = stock_model().eval()
    _, padded = pack([300, 40, 1], seed=3)
    ours = our_model(stock, False).eval()
    valid = padded["attention_mask"].bool()
    with torch.no_grad():
        found = ours(padded["input_ids"], padded["attention_mask"]).logits[valid]
        expected = stock(padded["input_ids"], padded["attention_mask"]).logits[valid]
    assert relative_error(found, expected) < 0.02


def test_one_compilation_serves_all_packs():
    torch._dynamo.reset()
    ours = our_model(stock_model(), compile_blocks=True)
    ours(**pack([100, 200], seed=0)[0]).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate([[1], [1024] * 4, [7] * 20, [500, 500, 1]]):
            ours(**pack(lengths, seed)[0]).loss.backward()


def test_dropout_depends_on_the_seed_alone():
    torch._dynamo.reset()
    stock = stock_model()
    ours = our_model(stock, compile_blocks=True)
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.1
    packed, _ = pack([300, 40, 1], seed=3)

    def loss(seed):
        torch.manual_seed(seed)
        return ours(**packed).loss_sum.item()

    first, second = loss(1), loss(2)
    assert first != second
    assert loss(1) == first
