"""The model against stock Hugging Face BERT in float32."""

import importlib.util
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM, Dropout, FlashAttention, hashed

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


LENGTHS = [[7], [1], [3, 1, 9, 4], [1, 1, 1], [5, 40, 2, 17, 33, 1, 8], [2048, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_and_every_gradient_equal_stock(lengths, layout):
    ours, stock = make_pair()
    ids, mask, labels = make_cells(lengths)
    expected = stock(input_ids=ids, attention_mask=mask, labels=labels)
    expected.loss.backward()
    if layout == "packed":
        output = ours(**packed_arguments(ids, mask, labels))
        assert output.num_labels == (labels != -100).sum()
        assert_close(output.loss_sum / output.num_labels, output.loss)
    else:
        output = ours(input_ids=ids, attention_mask=mask, labels=labels)
        valid = mask.bool()
        assert_close(output.logits[valid], expected.logits[valid], atol=2e-5, rtol=1e-5)
        assert output.prediction_logits is output.logits
        assert (output.logits[~valid] == 0).all()
    output.loss.backward()
    assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    reference = gradients(stock)
    found = gradients(ours)
    assert found.keys() == reference.keys() - {"cls.predictions.decoder.bias"}
    for name, gradient in found.items():
        assert_close(gradient, reference[name], atol=2e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_logits_equal_stock():
    ours, stock = make_pair()
    ids, mask, labels = make_cells([3, 1, 9, 4])
    packed = packed_arguments(ids, mask, labels)
    del packed["labels"], packed["masked_index"]
    expected = stock(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert_close(ours(**packed).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "swish", "gelu_new", "silu", "tanh"])
def test_other_activations(activation):
    ours, stock = make_pair(hidden_act=activation)
    ids, mask, labels = make_cells([6, 2])
    expected = stock(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert_close(ours(**packed_arguments(ids, mask, labels)).loss, expected, atol=1e-5, rtol=1e-5)


def test_hidden_states_position_and_token_types_equal_stock():
    ours, stock = make_pair()
    ids, mask, _ = make_cells([5, 8, 2])
    arguments = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.arange(8).expand(3, 8) % 2,
        "position_ids": torch.arange(8).flip(0)[None],
        "output_hidden_states": True,
    }
    ours.eval(), stock.eval()
    expected = stock(**arguments).hidden_states
    found = ours(**arguments).hidden_states
    assert len(found) == len(expected) == SIZES["num_hidden_layers"] + 1
    for a, b in zip(found, expected, strict=True):
        assert_close(a[mask.bool()], b[mask.bool()], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_configuration_decides_what_is_returned(tmp_path):
    stock = make_pair()[1]
    stock.save_pretrained(tmp_path)
    ids, mask, labels = make_cells([5, 8, 2])

    def results(**choices):
        classes = (BertForMaskedLM, transformers.BertForMaskedLM)
        models = [cls.from_pretrained(tmp_path, **choices) for cls in classes]
        return [model(ids, mask, labels=labels) for model in models]

    found, expected = results(output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == SIZES["num_hidden_layers"] + 1
    found, expected = results(return_dict=False)
    assert type(found) is type(expected) is tuple
    assert_close(found[0], expected[0])
    assert results()[0].hidden_states is None
    attentive = BertForMaskedLM.from_pretrained(tmp_path, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        attentive(ids)
    assert attentive(ids, output_attentions=False).logits is not None


@torch.no_grad()
def test_outputs_of_layers_are_freed_when_not_asked_for():
    ours, _ = make_pair()
    outputs, alive = [], []
    for layer in ours.bert.encoder["layer"].children():
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    ours.head.register_forward_pre_hook(lambda *_: alive.append([o() is not None for o in outputs]))
    ours(**packed_arguments(*make_cells([3, 5])))
    assert alive == [[False] * (SIZES["num_hidden_layers"] - 1) + [True]]


def test_padding_is_inert():
    """Neither the ids at padding nor its amount change a cell's output; holes in the mask are padding too."""
    ours, stock = make_pair()
    ids, mask, _ = make_cells([4, 9])
    mask[1, 3] = 0
    valid = mask.bool()
    other = torch.where(valid, ids, 77)
    assert_close(ours(ids, mask).logits[valid], ours(other, mask).logits[valid], atol=0, rtol=0)
    assert_close(ours(ids, mask).logits[valid], stock(ids, mask).logits[valid], atol=2e-5, rtol=1e-5)


def test_without_attention_mask_all_tokens_count():
    ours, stock = make_pair()
    ids, _, _ = make_cells([4, 9])
    assert_close(ours(ids).logits, stock(ids).logits, atol=2e-5, rtol=1e-5)


def test_cells_do_not_see_each_other():
    ours, _ = make_pair()
    ids, mask, labels = make_cells([6, 5, 7])
    packed = packed_arguments(ids, mask, labels)
    del packed["labels"], packed["masked_index"]
    before = ours(**packed).logits
    packed["input_ids"][6:11] = 50
    after = ours(**packed).logits
    unchanged = torch.ones(18, dtype=torch.bool)
    unchanged[6:11] = False
    assert_close(before[unchanged], after[unchanged], atol=0, rtol=0)
    assert not torch.allclose(before[~unchanged], after[~unchanged])


def test_dropout_follows_its_probabilities():
    """Hidden dropout zeroes its share of the embedding output; attention dropout keeps the mean."""
    config = BertConfig(**{**SIZES, "hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.5})
    model = BertForMaskedLM(config)
    model.train()
    ids = torch.randint(2, 101, (4, 128))
    embedded = model(ids, output_hidden_states=True).hidden_states[0]
    assert abs((embedded == 0).float().mean().item() - 0.25) < 0.02
    attention = model.bert.encoder.layer[0].attention["self"]
    x = torch.randn(64, SIZES["hidden_size"])
    bounds = torch.tensor([0, 64], dtype=torch.int32)
    prepared = model.bert.attention.prepare(bounds, 64, 64)
    mean = torch.stack([attention(x, prepared) for _ in range(300)]).mean(0)
    attention.eval()
    assert_close(mean, attention(x, prepared), atol=0.05, rtol=0.1)


class PlainKernels:
    """What surrounds the matrix products, written out; counts its calls. A layer that is watched makes other ones."""

    def __init__(self, watched=False):
        self.watched = watched
        self.calls = dict.fromkeys(("residual_norm", "linear_with_residual", "feed_forward", "linear_cross_entropy"), 0)

    def residual_norm(self, x, b, residual, weight, bias, eps, dropout):
        self.calls["residual_norm"] += 1
        # What the last product returned, not what it was given.
        assert self.watched or (residual is self.residual and b is not None)
        assert not dropout
        return F.layer_norm(residual + x + (0.0 if b is None else b), weight.shape, weight, bias, eps)

    def linear_with_residual(self, x, weight, bias):
        self.calls["linear_with_residual"] += 1
        self.residual = x.clone()
        return F.linear(x, weight, bias), self.residual

    def feed_forward(self, x, expand, bias, contract):
        self.calls["feed_forward"] += 1
        self.residual = x.clone()
        return F.linear(F.linear(x, expand, bias).relu(), contract), self.residual

    def linear_cross_entropy(self, x, weight, bias, labels):
        self.calls["linear_cross_entropy"] += 1
        return F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum")


def test_fused_kernels_are_given_what_they_need():
    ours, _ = make_pair()
    batch = packed_arguments(*make_cells([5, 3]))
    results = []
    given = PlainKernels()
    for kernels in (None, given):
        ours.set_fused_kernels(kernels)
        ours.zero_grad()
        loss = ours(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in ours.parameters())])
    for plain, fused in zip(*results, strict=True):
        assert_close(fused, plain, atol=1e-6, rtol=1e-4)
    layers = len(ours.bert.encoder["layer"])
    assert given.calls == {
        "residual_norm": 2 * layers,
        "linear_with_residual": layers,
        "feed_forward": layers,
        "linear_cross_entropy": 1,
    }


class AttentionThatComputesBiasGrad(FlashAttention):
    """Adds the sum of qkv's gradient to the gradient of the bias, as kernels do on the way."""

    computes_bias_grad = True

    def __call__(self, qkv, prepared, dropout, bias=None):
        assert bias is not None
        # Zeros whose gradient is qkv's: as if the bias were added here.
        return super().__call__(qkv + (bias - bias.detach()).view(qkv.shape[1:]), prepared, dropout)


def test_the_bias_of_attention_gets_its_gradient_once():
    ours, _ = make_pair()
    batch = packed_arguments(*make_cells([5, 3]))
    results = []
    for kernels, attention in ((None, FlashAttention()), (PlainKernels(), AttentionThatComputesBiasGrad())):
        ours.set_fused_kernels(kernels)
        ours.set_attention(attention)
        ours.zero_grad()
        ours(**batch).loss.backward()
        results.append({name: p.grad for name, p in ours.named_parameters()})
    for name, plain in results[0].items():
        assert_close(results[1][name], plain, atol=1e-6, rtol=1e-4)


class AddsInPlace(torch.autograd.Function):
    """A linear layer beside a residual connection, whose gradient it adds to in place."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x.view_as(x)

    @staticmethod
    def backward(ctx, grad, grad_residual):
        x, weight = ctx.saved_tensors
        grad_residual.data.addmm_(grad, weight)
        return grad_residual, grad.t() @ x, grad.sum(0)


class InPlaceKernels(PlainKernels):
    """Kernels that change gradients, as Triton's do."""

    def linear_with_residual(self, x, weight, bias):
        return AddsInPlace.apply(x, weight, bias)

    def feed_forward(self, x, expand, bias, contract):
        hidden, residual = AddsInPlace.apply(x, expand, bias)
        return F.linear(hidden.relu(), contract), residual


HALVES = [
    f"{half}{part}" for half in ("attention.output", "output") for part in ("", ".dense", ".dropout", ".LayerNorm")
]


@pytest.mark.parametrize(
    "name", ["attention.self", "attention.self.query", "intermediate.dense", "activation", *HALVES]
)
def test_hooks_see_the_same_with_fused_kernels(name):
    batch = packed_arguments(*make_cells([5, 3]))
    results = []
    for kernels in (None, InPlaceKernels(watched=True)):
        ours, _ = make_pair()
        ours.set_fused_kernels(kernels)
        module = ours.get_submodule(f"bert.encoder.layer.1.{name}")
        seen = []
        module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        module.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        module.register_full_backward_hook(lambda module, *grads, seen=seen: seen.extend(grads))
        loss = ours(**batch).loss
        loss.backward()
        assert len(seen) == 4
        results.append([loss, *seen, *(p.grad for p in ours.parameters())])
    assert_close(results[1], results[0], atol=1e-6, rtol=1e-4)


def test_what_wraps_or_watches_a_linear_layer_is_called():
    """Adapters and hooks on the layer whose ReLU is fused with it elsewhere."""
    ours, _ = make_pair()
    batch = packed_arguments(*make_cells([5, 3]))
    expected = ours(**batch).loss
    seen = []
    dense = ours.bert.encoder["layer"][1].intermediate["dense"]
    handle = dense.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(ours(**batch).loss, expected)
    assert (seen[0] < 0).any()  # before the activation
    handle.remove()

    unchanged, dense.forward = dense.forward, lambda x: 2 * unchanged(x)
    doubled = ours(**batch).loss
    assert (doubled - expected).abs() > 1e-4
    del dense.forward

    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    ours.bert.encoder["layer"][1].intermediate["dense"] = Doubled(dense)
    assert not torch.allclose(ours(**batch).loss, expected)


def test_autocast_reaches_every_matrix_product():
    ours, _ = make_pair()
    kinds = []
    with torch.autocast("cpu", torch.bfloat16):
        layer = ours.bert.encoder["layer"][0]
        layer.activation.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
        ours(**packed_arguments(*make_cells([5, 3])))
    assert kinds == [torch.bfloat16]


def lowbias32(x):
    """Wellons' hash, in Python's integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_hash_for_dropout_is_lowbias32():
    seed = 1_234_567_890
    found = hashed(torch.Size((300, 70)), torch.tensor([seed], dtype=torch.int32)).flatten()
    expected = [lowbias32(i ^ seed) for i in range(300 * 70)]
    assert (found.long() % 2**32).tolist() == expected


def test_dropout_of_compiled_code(monkeypatch):
    """The same share, scale and gradients as nn.Dropout; rows, columns and calls are independent."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    p, shape = 0.1, (1024, 512)
    dropout, x = Dropout(p), torch.full(shape, 3.0, requires_grad=True)
    torch.manual_seed(5)
    out = dropout(x)
    out.sum().backward()
    kept = out != 0
    assert_close(out[kept], torch.full_like(out[kept], 3.0 / (1 - p)))
    assert_close(x.grad, kept / (1 - p))
    sigma = (p * (1 - p)) ** 0.5
    deviation = (~kept).double() - p
    assert deviation.mean().abs() < 5 * sigma / kept.numel() ** 0.5
    for along in (0, 1):
        assert deviation.mean(along).abs().max() < 5.5 * sigma / shape[along] ** 0.5
    between_rows = (deviation @ deviation.T / shape[1] / sigma**2).fill_diagonal_(0)
    assert between_rows.abs().max() < 6 / shape[1] ** 0.5
    other = (dropout(x) == 0).double() - p
    assert (deviation * other).mean().abs() < 5 * sigma**2 / kept.numel() ** 0.5
    torch.manual_seed(5)
    assert torch.equal(dropout(x), out)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("recomputed", [(0,), (0, 1, 2)])
def test_recomputed_layers_keep_their_input_alone(recomputed):
    model = BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    batch = packed_arguments(*make_cells([40, 7, 1]))

    def run():
        saved = []

        def pack(x):
            saved.append(x)
            return x

        model.zero_grad()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch).loss
        random = torch.rand(1)
        loss.backward()
        weights = {p.data_ptr() for p in model.parameters()}
        return loss, gradients(model), random, sum(x.numel() for x in saved if x.data_ptr() not in weights)

    loss, grads, random, kept = run()
    for number in recomputed:
        model.bert.encoder["layer"][number].gradient_checkpointing = True
    loss_again, grads_again, random_again, kept_again = run()
    assert torch.equal(loss, loss_again)
    assert torch.equal(random, random_again)
    for name, gradient in grads.items():
        assert torch.equal(gradient, grads_again[name]), name
    per_layer = (kept - kept_again) / len(recomputed)
    assert per_layer > 10 * 48 * SIZES["hidden_size"]  # of more than 10 activations per token


def test_initialisation_is_berts():
    model = BertForMaskedLM(BertConfig(**{**SIZES, "hidden_size": 256, "vocab_size": 1000}))
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("word_embeddings.weight"):
            assert (parameter[0] == 0).all()
            assert abs(parameter[1:].std().item() - 0.02) < 0.001
        else:
            assert abs(parameter.std().item() - 0.02) < 0.003, name


def test_save_and_load_round_trip(tmp_path):
    ours, stock = make_pair()
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    ids, mask, _ = make_cells([4, 9])
    expected = stock(ids, mask).logits[mask.bool()]
    for folder in ("ours", "stock"):
        for model_class in (BertForMaskedLM, transformers.BertForMaskedLM, transformers.AutoModelForMaskedLM):
            model, info = model_class.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not info["missing_keys"], (folder, model_class)
            assert not info["unexpected_keys"], (folder, model_class)
            model.train()  # dropout is 0
            assert_close(model(ids, mask).logits[mask.bool()], expected, atol=2e-5, rtol=1e-5)


def test_from_pretrained_in_bfloat16(tmp_path):
    ours, _ = make_pair()
    ours.save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16, trust_remote_code=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids, mask, labels = make_cells([4, 9])
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    assert_close(output.loss.float(), ours(ids, mask, labels=labels).loss, atol=0.05, rtol=0.02)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_te_layers_without_transformer_engine_are_refused():
    with pytest.raises(ImportError, match="use_te_layers"):
        BertForMaskedLM(BertConfig(**SIZES), use_te_layers=True)


def test_unsupported_arguments_are_refused():
    ours, _ = make_pair()
    ids, mask, labels = make_cells([4, 9])
    packed = packed_arguments(ids, mask, labels)
    with pytest.raises(ValueError, match="output_attentions"):
        ours(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"stock transformers\.BertForMaskedLM, resize it there"):
        ours.resize_token_embeddings(200)
    assert ours(ids).logits.shape[-1] == SIZES["vocab_size"]
    with pytest.raises(TypeError, match="inputs_embeds"):
        ours(ids, inputs_embeds=torch.zeros(1))
    with pytest.raises(ValueError, match="tokens beyond position 2047; this model has 2048 positions"):
        ours(torch.full((1, 2049), 5))
    ends = torch.arange(2049)[None]
    assert ours(torch.full((1, 2049), 5), ends < 9).logits.isfinite().all()
    assert ours(torch.full((1, 2049), 5), ends > 2040, position_ids=(ends - 2041).clamp(min=0)).logits.isfinite().all()
    with pytest.raises(ValueError, match="attention_mask has the shape"):
        ours(ids, mask[:, None, None])
    with pytest.raises(ValueError, match="together"):
        ours(**{**packed, "masked_index": None})
    with pytest.raises(ValueError, match="position_ids"):
        ours(**{**packed, "position_ids": None})
    with pytest.raises(ValueError, match="cu_seqlens"):
        ours(ids, masked_index=packed["masked_index"])
