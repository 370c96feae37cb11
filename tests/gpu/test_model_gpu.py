"""The packed, compiled BF16 model on a GPU against stock BERT in float32."""

import copy

import pytest
import torch
import transformers
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM, FlashAttention, _attention_by_cell

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


def assert_fp8_is_near_stock(output, found, stock, padded):
    """Compare the loss of a packed call in FP8, and gradients by name, with those of stock BERT in float32."""
    expected = stock(**padded)
    expected.loss.backward()
    assert_close(output.loss, expected.loss, atol=0.03, rtol=0.01)
    reference = gradients(stock)
    scale = max(gradient.norm() for gradient in reference.values())
    for name, gradient in found.items():
        if reference[name].norm() > 1e-4 * scale:
            assert relative_error(gradient, reference[name]) < 0.3, name


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


def attention_arguments(dtype, head_size, lengths=(300, 1, 64, 129)):
    """QKV [T, 3, A, D] with gradients, and what all layers share, with empty cells at the end."""
    bounds = torch.tensor([0, *lengths, 0, 0], device="cuda").cumsum(0).int()
    qkv = torch.randn(sum(lengths), 3, 2, head_size, device="cuda", dtype=dtype, requires_grad=True)
    return qkv, (bounds, max(lengths), False)


@pytest.mark.parametrize("head_size", [16, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 5e-3)], ids=str)
def test_memory_efficient_attention_equals_one_call_per_cell(dtype, tolerance, head_size):
    """In FP32, and on GPUs before Ampere, which FlashAttention does not run on: that is pretended here."""
    qkv, prepared = attention_arguments(dtype, head_size)
    found = FlashAttention()(qkv, prepared, 0.0)
    expected = _attention_by_cell(*qkv.unbind(1), prepared[0], 0.0)
    assert_close(found, expected, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, qkv, grad)[0] for out in (found, expected)]
    assert_close(*gradients, atol=2 * tolerance, rtol=tolerance)
    with torch.no_grad():
        assert torch.equal(FlashAttention()(qkv, prepared, 0.0), found)


def test_memory_efficient_attention_reads_nothing_on_the_host():
    qkv, prepared = attention_arguments(torch.float32, 64)
    FlashAttention()(qkv, prepared, 0.1).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        FlashAttention()(qkv, prepared, 0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_of_memory_efficient_attention_keeps_the_mean():
    qkv, prepared = attention_arguments(torch.float32, 16, (64,))
    with torch.no_grad():
        expected = FlashAttention()(qkv, prepared, 0.0)
        outputs = torch.stack([FlashAttention()(qkv, prepared, 0.5) for _ in range(2000)])
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    assert_close(outputs.mean(0), expected, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("head_size", [20, 264])
def test_half_precision_with_head_sizes_that_flash_attention_refuses(head_size):
    qkv, (bounds, longest, _) = attention_arguments(torch.bfloat16, head_size)
    found = FlashAttention()(qkv, FlashAttention().prepare(bounds, longest, len(qkv)), 0.0)
    assert_close(found, _attention_by_cell(*qkv.unbind(1), bounds, 0.0))


@pytest.mark.parametrize("head", ["cpu", "disk", 0])
@pytest.mark.parametrize("embeddings", ["cpu", 0])
def test_a_model_split_between_devices(tmp_path, embeddings, head):
    """Hooks of accelerate move inputs and weights; the vocabulary projection's weight belongs to the embeddings."""
    pytest.importorskip("accelerate")
    stock = stock_model().eval()
    our_model(stock, False, torch.float32).save_pretrained(tmp_path / "model")
    layers = {f"bert.encoder.layer.{number}": 0 for number in range(CONFIG["num_hidden_layers"])}
    model = BertForMaskedLM.from_pretrained(
        tmp_path / "model",
        device_map={"bert.embeddings": embeddings, **layers, "cls": head},
        offload_folder=tmp_path / "offloaded",
    )
    _, padded = pack([300, 40, 1], seed=3)
    valid = padded["attention_mask"].bool()
    with torch.no_grad():
        found, expected = (m(**padded) for m in (model, stock))
    assert_close(found.logits[valid].cuda(), expected.logits[valid], atol=1e-3, rtol=1e-3)
    assert_close(found.loss.cuda(), expected.loss, atol=1e-4, rtol=1e-4)
