"""Transformer Engine layers, BF16 and FP8, against stock BERT in float32."""

import warnings

import pytest
import torch

from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.gpu.test_model_gpu import (
    CONFIG,
    assert_as_near_as_stock_bf16,
    assert_fp8_is_near_stock,
    gradients,
    our_model,
    pack,
    relative_error,
    stock_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    te = pytest.importorskip("transformer_engine.pytorch")


def te_model(stock):
    model = BertForMaskedLM(BertConfig(**CONFIG), use_te_layers=True).cuda()
    weights = dict(stock.named_parameters())
    with torch.no_grad():
        for name, parameter in model.canonical_parameters():
            parameter.copy_(weights[name])
    model.bert.embeddings.compute_dtype = torch.bfloat16
    return model


def test_bf16_matches_float32_stock():
    stock = stock_model()
    model = te_model(stock)
    packed, padded = pack([1024, 900, 1, 700, 30], seed=5)
    output = model(**packed)
    output.loss.backward()
    assert_as_near_as_stock_bf16(output, gradients(model), stock, padded)


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_fp8_is_near_float32_stock(recipe):
    from transformer_engine.common import recipe as recipes

    stock = stock_model()
    model = te_model(stock)
    packed, padded = pack([1024, 900, 1, 700, 30], seed=5)
    for _ in range(3):  # delayed scaling has to see amaxes first
        with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
            loss = model(**packed).loss
        loss.backward()
    model.zero_grad()
    with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
        output = model(**packed)
    output.loss.backward()
    assert_fp8_is_near_stock(output, gradients(model), stock, padded)


def test_names_and_values_convert_exactly(tmp_path):
    stock = stock_model()
    model = te_model(stock)
    model.save_pretrained(tmp_path)
    plain = BertForMaskedLM.from_pretrained(tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path, use_te_layers=True)
    for name, parameter in stock.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter.cpu())
    for name, parameter in again.canonical_parameters():
        assert torch.equal(parameter.cpu(), stock.get_parameter(name).cpu()), name


def test_padded_calls_agree_with_pytorch_layers():
    stock = stock_model().eval()
    _, padded = pack([300, 40, 1], seed=3)
    ours, with_te = our_model(stock, False).eval(), te_model(stock).eval()
    valid = padded["attention_mask"].bool()
    with torch.no_grad():
        expected = ours(padded["input_ids"], padded["attention_mask"]).logits[valid]
        found = with_te(padded["input_ids"], padded["attention_mask"]).logits[valid]
    assert relative_error(found, expected) < 0.02
