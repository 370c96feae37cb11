"""Transformer Engine layers, BF16 and FP8, against stock BERT in float32."""

import pytest
import torch
from test_model_gpu import CONFIG, our_model, pack, relative_error, stock_model
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM

te = pytest.importorskip("transformer_engine.pytorch")
pytestmark = pytest.mark.gpu


def te_model(stock):
    model = BertForMaskedLM(BertConfig(**CONFIG), use_te_layers=True).cuda()
    weights = dict(stock.named_parameters())
    with torch.no_grad():
        for name, parameter in model.canonical_parameters():
            parameter.copy_(weights[name])
    model.bert.embeddings.compute_dtype = torch.bfloat16
    return model


def compare(model, stock, packed, padded, loss_tolerance, gradient_tolerance):
    expected = stock(**padded)
    expected.loss.backward()
    output = model(**packed)
    output.loss.backward()
    assert_close(output.loss, expected.loss, atol=loss_tolerance, rtol=loss_tolerance)
    for name, parameter in model.canonical_parameters():
        reference = stock.get_parameter(name).grad
        if reference.norm() < 1e-6 * len(reference) ** 0.5:
            continue
        assert parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, reference) < gradient_tolerance, name


def test_bf16_matches_float32_stock():
    stock = stock_model()
    compare(te_model(stock), stock, *pack([1024, 900, 1, 700, 30], seed=5), 5e-3, 0.03)


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_fp8_is_near_float32_stock(recipe):
    from transformer_engine.common import recipe as recipes

    stock = stock_model()
    model = te_model(stock)
    packed, padded = pack([1024, 900, 1, 700, 30], seed=5)
    with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
        for _ in range(3):  # delayed scaling has to see amaxes first
            model(**packed).loss.backward()
        model.zero_grad()
    with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
        compare(model, stock, packed, padded, 0.03, 0.25)


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
