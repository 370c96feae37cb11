"""Use of exchangeable kernels; hooks, adapters and autocast see what they see in stock BERT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM, Dropout, FlashAttention, hashed
from tests.unit.model.pairs import SIZES, gradients, make_cells, make_pair, packed_arguments


class PlainKernels:
    """The fused kernels, written out; counts its calls."""

    def __init__(self):
        names = ("residual_norm", "linear", "linear_with_residual", "feed_forward", "linear_cross_entropy")
        self.calls = dict.fromkeys(names, 0)

    def residual_norm(self, x, b, residual, weight, bias, eps, dropout):
        self.calls["residual_norm"] += 1
        # The residual that the last product returned, not the one it was given.
        assert residual is self.residual
        assert b is not None
        assert not dropout
        return F.layer_norm(residual + x + b, weight.shape, weight, bias, eps)

    def linear(self, x, weight):
        self.calls["linear"] += 1
        return F.linear(x, weight)

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
        "linear": layers,
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
    """A linear layer with a residual connection, whose gradient it adds to in place."""

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
        qkv, self.residual = AddsInPlace.apply(x, weight, bias)
        return qkv, self.residual

    def feed_forward(self, x, expand, bias, contract):
        hidden, self.residual = AddsInPlace.apply(x, expand, bias)
        return F.linear(hidden.relu(), contract), self.residual


HALVES = [
    f"{half}{part}" for half in ("attention.output", "output") for part in ("", ".dense", ".dropout", ".LayerNorm")
]


@pytest.mark.parametrize(
    "name", ["attention.self", "attention.self.query", "intermediate.dense", "activation", *HALVES]
)
def test_hooks_see_the_same_with_fused_kernels(name):
    batch = packed_arguments(*make_cells([5, 3]))
    results = []
    for kernels in (None, InPlaceKernels()):
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


def test_hooked_patched_and_replaced_linear_layers_are_called():
    """The layer's ReLU is fused with it elsewhere."""
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


class Sees(torch.nn.Module):
    """Calls what it wraps, and counts."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, 0

    def forward(self, *args):
        self.calls += 1
        return self.base(*args)


PARTS = [
    "attention.self", "attention.self.key", "attention.output", "attention.output.dense", "attention.output.dropout",
    "attention.output.LayerNorm", "intermediate.dense", "activation", "output", "output.dense", "output.dropout",
    "output.LayerNorm",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_whatever_part_is_replaced_is_called(part):
    ours, _ = make_pair()
    ours.set_fused_kernels(InPlaceKernels())
    batch = packed_arguments(*make_cells([5, 3]))
    expected = ours(**batch).loss
    name = f"bert.encoder.layer.1.{part}"
    replacement = Sees(ours.get_submodule(name))
    ours.set_submodule(name, replacement)
    assert_close(ours(**batch).loss, expected)
    assert replacement.calls == 1


@pytest.mark.filterwarnings("default")  # dynamo has its own
@pytest.mark.parametrize("kernels", [None, PlainKernels()], ids=["torch", "fused"])
def test_compiled_blocks_are_whole_graphs_and_change_nothing(kernels, monkeypatch):
    """Graph breaks would cost what compilation gains; a check that is traced might cause them."""
    compiled = []

    def compile(function, dynamic):
        assert not dynamic
        compiled.append(function)
        return torch._dynamo.optimize("eager", nopython=True)(function)

    monkeypatch.setattr(torch, "compile", compile)
    ours, _ = make_pair()
    plain = copy.deepcopy(ours)
    for model in (ours, plain):
        model.set_fused_kernels(kernels)
    # One exact call per cell reads lengths from the device: no part of a graph. GPUs have kernels.
    attention = FlashAttention()
    monkeypatch.setattr(FlashAttention, "__call__", lambda self, qkv, prepared, dropout, bias=None: qkv.sum(1))
    for model in (ours, plain):
        model.set_attention(attention)
    ours.compile_embeddings_and_head()
    for layer in ours.bert.encoder["layer"]:
        layer.compile_in_place()
    assert len(compiled) == 2 + SIZES["num_hidden_layers"]
    for seed in (1, 2):
        batch = packed_arguments(*make_cells([5, 3], seed))
        batch["labels"], batch["masked_index"] = (batch[name][-6:] for name in ("labels", "masked_index"))
        results = []
        for model in (ours, plain):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters())])
        assert_close(*results)


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
