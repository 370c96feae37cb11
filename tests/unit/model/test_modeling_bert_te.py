"""The model against stock Hugging Face BERT in float32."""

import importlib.util
import weakref

import pytest
import torch
import transformers
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.unit.model.pairs import SIZES, gradients, make_cells, make_pair, packed_arguments

LENGTHS = [[7], [1], [3, 1, 9, 4], [1, 1, 1], [5, 40, 2, 17, 33, 1, 8], [700, 1]]


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


def test_logits_of_chosen_positions_alone():
    ours, _ = make_pair()
    packed = packed_arguments(*make_cells([4, 9, 30]))
    del packed["labels"]
    index = packed.pop("masked_index")
    whole, some = ours(**packed), ours(**packed, masked_index=index)
    assert len(index) > 5
    assert_close(some.logits, whole.logits[index.long()])
    assert some.loss is None


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
    with pytest.raises(ValueError, match="cu_seqlens"):
        ours(ids, max_seqlen=9)
    with pytest.raises(ValueError, match="input_ids is missing"):
        ours(attention_mask=mask)
