"""Initial weights: BERT's statistics, and nothing but seed and name decides them."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from geneformer_pretrain.model.initialization import initialize_weights
from modeling_bert_te import BertConfig, BertForMaskedLM

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


GOLDEN_QUERY = [0.0081552770, 0.0228056908, 0.0376541093, 0.0081021199]
GOLDEN_WORD = [0.0141282426, 0.0183722284, 0.0214324165, -0.0419532284]


def make_model(seed=0, std=0.02):
    config = BertConfig(vocab_size=400, **SIZES)
    with torch.device("meta"):
        model = BertForMaskedLM(config)
    model.to_empty(device="cpu")
    initialize_weights(model, "", seed, std, 0)
    return model.requires_grad_(False)


def test_every_weight_follows_bert():
    """Each kind of parameter as stock BERT initialises it; a forgotten one would keep garbage."""
    ours = dict(make_model().named_parameters())
    stock = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=400, **SIZES))
    compared = 0
    for name, expected in stock.named_parameters():
        if name not in ours:
            continue
        compared += 1
        parameter = ours[name]
        assert parameter.shape == expected.shape
        if expected.std() == 0:  # biases and LayerNorm
            assert_close(parameter, expected, rtol=0, atol=0, msg=name)
        else:
            values = parameter[1:] if "word_embeddings" in name else parameter
            assert abs(values.mean()) < 5 * 0.02 / values.numel() ** 0.5, name
            assert values.std() == pytest.approx(0.02, rel=0.2), name
    assert compared == len(ours)
    assert (ours["bert.embeddings.word_embeddings.weight"][0] == 0).all()


def test_normal_shape():
    weight = make_model(std=0.5).bert.embeddings.word_embeddings.weight[1:].flatten() / 0.5
    assert weight.std() == pytest.approx(1.0, rel=0.02)
    assert (weight.abs() < 1).float().mean() == pytest.approx(0.6827, abs=0.01)
    assert (weight.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.005)


def test_independent_of_order_and_of_everything_drawn_before():
    """A sharding engine fills one part after the other; the values stay the same."""
    expected = make_model().state_dict()
    torch.manual_seed(123)
    torch.rand(7)
    config = BertConfig(vocab_size=400, **SIZES)
    model = BertForMaskedLM(config)
    initialize_weights(model.cls, "cls", 0, 0.02, 0)
    for i in (1, 0):
        initialize_weights(model.bert.encoder.layer[i], f"bert.encoder.layer.{i}", 0, 0.02, 0)
    initialize_weights(model.bert.embeddings, "bert.embeddings", 0, 0.02, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_each_seed_and_each_name_its_own_values():
    first, second = make_model(0), make_model(1)
    drawn = {}
    for model in (first, second):
        for name, parameter in model.named_parameters():
            if parameter.std() > 0:
                drawn.setdefault(parameter.flatten()[64:68].numpy().tobytes(), []).append(name)
    assert all(len(names) == 1 for names in drawn.values()), drawn


def test_golden_values():
    """Runs of today are repeated by tomorrow's code."""
    model = make_model()
    query = model.bert.encoder.layer[1].attention["self"].query.weight[0, :4]
    word = model.bert.embeddings.word_embeddings.weight[1, :4]
    # Vector units of other CPUs may round the last bits differently.
    assert_close(query, torch.tensor(GOLDEN_QUERY), rtol=1e-5, atol=1e-7)
    assert_close(word, torch.tensor(GOLDEN_WORD), rtol=1e-5, atol=1e-7)
