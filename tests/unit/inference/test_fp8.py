"""FP8 forward passes on a CPU: bounds, rounding, accuracy by a reference in float64, and refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.inference import fp8
from geneformer_pretrain.inference import model as loading
from modeling_bert_te import BertForMaskedLM
from tests.unit.inference.fp8_reference import Fp8Reference
from tests.unit.inference.worlds import MAX_TOKENS, gene_set, make_cells, write_model

SPECIAL = 2


def build(activation="relu"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=82,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_act=activation,
        max_position_embeddings=MAX_TOKENS,
        layer_norm_eps=1e-12,
        initializer_range=0.05,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.bert.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def pack(cells):
    lengths = [len(cell) for cell in cells]
    return {
        "input_ids": torch.tensor([token for cell in cells for token in cell]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def quantize(model):
    kernels = [Fp8Reference(layer) for layer in fp8.take_linear_layers(model, SPECIAL, MAX_TOKENS)]
    for layer, each in zip(model.bert.encoder["layer"].children(), kernels, strict=True):
        layer.set_fused_kernels(each)
    return kernels


@torch.no_grad()
def hidden(model, cells):
    return model.bert(**pack(cells)).last_hidden_state


@given(st.integers(1, 70), st.integers(0, 2**31), st.floats(-3, 3), st.floats(0, 4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_nothing_exceeds_its_bound(width, seed, log_size, outliers, is_aligned):
    """Of LayerNorms and linear layers of any weights, for inputs that aim at the bounds too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        wide = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return 10**log_size * wide * (outliers * wide).exp()

    norm = nn.LayerNorm(width, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(draw(width))
        norm.bias.copy_(draw(width))
    weight, bias = draw(5, width), draw(5)
    x = draw(6, width)
    if is_aligned:  # one element alone, and the direction of a row
        x[0] = torch.eye(width)[norm.weight.abs().argmax()]
        x[1:] = weight * norm.weight
    with torch.no_grad():
        x = norm(x)
    element, length = fp8.norm_bounds(norm)
    assert x.abs().max() <= element * (1 + 1e-9)
    assert x.norm(dim=1).max() <= length * (1 + 1e-9)
    scale = fp8.scale_for(element)
    assert math.log2(scale).is_integer()
    assert 224 < element * scale <= 448
    low = (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() / scale
    bound = fp8.linear_bound(weight, bias, length)
    for each in (x, low):
        # What is too small for E4M3's relative precision is rounded by up to 2**-10.
        tiny = width**0.5 * 2**-10 / scale * weight.norm(dim=1).max() if each is low else 0.0
        assert F.linear(each, weight, bias).abs().max() <= (bound + tiny) * (1 + 1e-9)


def test_scale_of_zeros():
    assert fp8.scale_for(0.0) == 1.0


def test_a_rounded_weight_keeps_the_product_with_a_typical_input():
    torch.manual_seed(0)
    weight, typical = torch.randn(64, 256), 1 + torch.randn(256)
    scale = fp8.scale_for(weight.abs().max().item())
    plain = (weight * scale).to(torch.float8_e4m3fn).float() / scale
    rounded = fp8.round_weight(weight, scale, typical).float() / scale
    before, after = (((weight - each) @ typical).abs() for each in (plain, rounded))
    assert after.square().mean().sqrt() < before.square().mean().sqrt() / 5
    assert (after <= before).all()
    # Weights are still hardly farther from the original ones.
    assert (rounded - weight).norm() < 1.01 * (plain - weight).norm()


def test_a_weight_without_typical_input_is_rounded_to_nearest():
    weight = torch.randn(8, 16)
    found = fp8.round_weight(weight, 64.0, torch.zeros(16))
    assert torch.equal(found.float(), (weight * 64).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_embeddings_are_near_those_in_float32(activation):
    model = build(activation=activation)
    cells = make_cells(12)
    exact = hidden(model, cells)
    kernels = quantize(model)
    found = hidden(model, cells)
    assert not torch.equal(found, exact)
    lengths = [len(cell) for cell in cells]
    means = [torch.stack([each.mean(0) for each in x.split(lengths)]) for x in (exact, found)]
    assert F.cosine_similarity(*means).min() > 0.9995
    assert F.cosine_similarity(exact, found).min() > 0.995
    # Casts of a layer: inputs of the projections, with ReLU of both others too.
    assert [len(each.largest) for each in kernels] == [4 if activation == "relu" else 2] * 3
    assert min(min(each.largest) for each in kernels) > 1  # far from what is too small


@torch.no_grad()
def test_each_scale_is_of_the_norm_before_it():
    model = build()
    norms = [model.bert.embeddings.LayerNorm]
    for layer in model.bert.encoder["layer"].children():
        norms += [layer.attention["output"].LayerNorm, layer.output.LayerNorm]
    for place, norm in enumerate(norms):
        norm.weight.fill_(4.0**place)
        norm.bias.fill_(-(4.0**place) / 8)
    values = [layer.attention["self"].value for layer in model.bert.encoder["layer"].children()]
    for value in values:
        value.weight.copy_(torch.eye(64))
        value.bias.fill_(-0.5)
    for place, layer in enumerate(fp8.take_linear_layers(model, SPECIAL, MAX_TOKENS)):
        of_first, of_second = (4.0 ** (2 * place + half) for half in (0, 1))
        # Norms of 64 features: elements up to 8 g + g / 8, of a 2-norm up to 8 g + 8 g / 8, rounded up by 1 / 16.
        assert layer.qkv.scale.item() == 2.0 ** math.floor(math.log2(448 / (8.125 * of_first)))
        assert layer.project.scale.item() == 2.0 ** math.floor(math.log2(448 / (9 * 17 / 16 * of_first + 0.5)))
        assert layer.expand.scale.item() == 2.0 ** math.floor(math.log2(448 / (8.125 * of_second)))
        for each in (layer.qkv, layer.project, layer.expand, layer.contract):
            assert each.scale * each.inverse_scale == 1
            assert 224 < each.weight.float().abs().max() <= 448


def test_weights_that_were_cast_are_not_there_to_be_used():
    model = build()
    quantize(model)
    weights = [layer.intermediate["dense"].weight for layer in model.bert.encoder["layer"].children()]
    assert sum(weight.numel() for weight in weights) == 0
    model.set_fused_kernels(None)
    with pytest.raises(RuntimeError):
        hidden(model, make_cells(1))


def test_results_depend_on_the_model_alone():
    cells = make_cells(6)
    models = [build(), build()]
    for model in models:
        quantize(model)
    hidden(models[0], cells[3:])
    assert torch.equal(hidden(models[0], cells), hidden(models[1], cells))


def test_a_cpu_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--dtype fp8: needs a Hopper GPU such as H100 or H200, not a CPU; leave"):
        loading.load_model(folder, dtype="fp8", device=torch.device("cpu"))


def test_other_machines_and_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "is_hopper", lambda device: True)
    folder = write_model(tmp_path / "model")
    config = transformers.BertConfig.from_pretrained(folder)
    for name, size, message in (
        ("intermediate_size", 40, "has intermediate_size=40, and FP8 needs multiples of 16; leave it out"),
        ("hidden_size", 4112, "has hidden_size=4112, and the kernels take 4096 at most; leave it out"),
    ):
        values = {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": gene_set().vocab_size, name: size}
        other = transformers.BertConfig(**{**config.to_dict(), **values})
        transformers.BertForMaskedLM(other).save_pretrained(tmp_path / name)
        gene_set().write(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            loading.load_model(tmp_path / name, dtype="fp8", device=torch.device("cpu"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Triton, which is not installed; pip install triton, or leave it out"):
        loading.load_model(folder, dtype="fp8", device=torch.device("cpu"))
