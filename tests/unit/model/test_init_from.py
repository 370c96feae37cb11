"""Published models as starting points: read as stock classes save them, refused key by key, rows matched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model.init_from import BIAS, POSITIONS, WORDS, PublishedStart, load_published
from modeling_bert_te import BertForMaskedLM

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def stock(kind: str = "BertForMaskedLM", **changes: Any) -> Any:
    """A stock model none of whose parameters has its initial value."""
    torch.manual_seed(1)
    model = getattr(transformers, kind)(BertConfig(**{**ARCHITECTURE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def start(path: Path, changes: dict[str, Any] | None = None, **options: Any) -> tuple[BertForMaskedLM, PublishedStart]:
    """Build this project's model and start it from `path`."""
    architecture = {**ARCHITECTURE, **(changes or {})}
    torch.manual_seed(2)
    model = BertForMaskedLM(BertConfig(**architecture)).eval()
    report = load_published(dict(model.canonical_parameters()), architecture, path, seed=7, **options)
    return model, report


def logits(model: Any) -> torch.Tensor:
    """Logits of the masked-language-model head on fixed cells."""
    ids = torch.randint(2, 50, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = model(input_ids=ids)
    return output.prediction_logits if "prediction_logits" in output else output.logits


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("form", ["safetensors", "several files", "bin", "file"])
def test_logits_are_those_of_the_stock_model(tmp_path: Path, kind: str, form: str) -> None:
    model = stock(kind)
    model.save_pretrained(tmp_path, max_shard_size="10KB" if form == "several files" else "1GB")
    path = tmp_path
    if form == "several files":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if form == "file":
        path = tmp_path / "model.safetensors"
    ours, report = start(path)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    assert report.lines == [f"Starting from the weights of {path}."]


@pytest.mark.parametrize(("kind", "prefix"), [("BertModel", ""), ("BertForSequenceClassification", "bert.")])
def test_without_a_head_the_encoder_starts_and_the_head_keeps_its_values(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    model = stock(kind)
    model.save_pretrained(tmp_path)
    ours, report = start(tmp_path)
    torch.manual_seed(2)
    fresh = BertForMaskedLM(BertConfig(**ARCHITECTURE))
    weights = load_file(tmp_path / "model.safetensors")
    for name, parameter in ours.named_parameters():
        if name.startswith("cls."):
            assert torch.equal(parameter, dict(fresh.named_parameters())[name])
        else:
            assert torch.equal(parameter, weights[prefix + name.removeprefix("bert.")])
    assert report.missing == tuple(name for name in dict(fresh.named_parameters()) if name.startswith("cls."))
    assert "no masked-language-model head" in report.lines[-1]


def test_half_precision_is_widened(tmp_path: Path) -> None:
    model = stock().half()
    model.save_pretrained(tmp_path)
    ours, _ = start(tmp_path)
    assert ours.bert.embeddings.word_embeddings.weight.dtype == torch.float32
    assert torch.equal(ours.bert.embeddings.word_embeddings.weight, model.get_input_embeddings().weight.float())


# Other vocabularies and lengths


def test_rows_are_matched_and_new_tokens_start_near_the_mean(tmp_path: Path) -> None:
    model = stock()
    model.save_pretrained(tmp_path)
    rows = np.concatenate([[0, 1], np.arange(49, 9, -1), np.full(2_000, -1)]).astype(np.int32)
    ours, report = start(tmp_path, {"vocab_size": len(rows)}, rows=rows)
    words, bias = ours.bert.embeddings.word_embeddings.weight.detach(), ours.head.bias.detach()
    old_words, old_bias = model.get_input_embeddings().weight.detach(), model.cls.predictions.bias.detach()
    known = torch.from_numpy(rows[:42].astype(np.int64))
    assert torch.equal(words[:42], old_words[known])
    assert torch.equal(bias[:42], old_bias[known])
    new = words[42:] - old_words.mean(0)
    assert abs(float(new.mean())) < 1e-3
    assert float(new.std()) == pytest.approx(0.02, rel=0.02)
    assert len(torch.unique(new[:, 0])) > 1_900
    torch.testing.assert_close(bias[42:], old_bias.mean().expand(2_000))
    assert (report.num_matched, report.num_tokens) == (42, 2_042)
    assert "42 of 2,042 tokens have its embeddings; 2,000 new ones" in report.lines[1]
    again, _ = start(tmp_path, {"vocab_size": len(rows)}, rows=rows)
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, words)


def test_positions_are_extended_on_request(tmp_path: Path) -> None:
    model = stock()
    model.save_pretrained(tmp_path)
    longer = {"max_position_embeddings": 80}
    with pytest.raises(
        ConfigError, match=r"max_position_embeddings: 32 there, 80 here; training\.init_extend_positions"
    ):
        start(tmp_path, longer)
    ours, report = start(tmp_path, longer, extend_positions=True)
    old = model.bert.embeddings.position_embeddings.weight
    assert torch.equal(ours.bert.embeddings.position_embeddings.weight, torch.cat([old, old, old[:16]]))
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    assert report.positions == (32, 80)
    assert "extended from 32 to 80" in report.lines[1]


# Refusals


def test_each_key_that_differs_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    stock(**sizes, intermediate_size=48, max_position_embeddings=64).save_pretrained(tmp_path)
    torch.manual_seed(2)
    model = BertForMaskedLM(BertConfig(**ARCHITECTURE))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError) as caught:
        load_published(dict(model.canonical_parameters()), ARCHITECTURE, tmp_path, seed=0)
    assert str(caught.value).splitlines() == [
        f"training.init_from: {tmp_path} does not fit this run:",
        "  model.vocab_size: 60 there, 50 here; with data.gene_set, genes are matched by id, else set "
        "model.vocab_size=60",
        "  model.hidden_size: 32 there, 16 here; set model.hidden_size=32",
        "  model.max_position_embeddings: 64 there, 32 here; set model.max_position_embeddings=64",
        "  model.num_hidden_layers: 3 there, 2 here; set model.num_hidden_layers=3",
        "  model.intermediate_size: 48 there, 24 here; set model.intermediate_size=48",
        "  model.num_attention_heads: 4 there, 2 here; set model.num_attention_heads=4",
        "  model.hidden_act: gelu there, relu here; set model.hidden_act=gelu",
    ]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("tie_word_embeddings", False),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path: Path, key: str, value: object) -> None:
    stock().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConfigError, match=f"{key} in its config.json is {value!r}"):
        start(tmp_path)


def test_tensors_that_are_missing_misshapen_or_without_a_place_are_named(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["cls.predictions.transform.dense.bias"]
    weights["bert.encoder.layer.0.crossattention.self.query.weight"] = torch.ones(2)
    weights["bert.encoder.layer.1.output.dense.bias"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        start(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  cls.predictions.transform.dense.bias is missing there",
        "  bert.encoder.layer.0.crossattention.self.query.weight is there, but has no place here",
        "  bert.encoder.layer.1.output.dense.bias is [3] there, [16] here",
    ]


def test_row_numbers_of_another_model_are_refused(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 50 tokens, but its gene set names token 50: it is another model's"):
        start(tmp_path, rows=np.arange(1, 51))
    with pytest.raises(ConfigError, match="49 in the gene set, 50 here"):
        start(tmp_path, rows=np.arange(49))


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_what_cannot_be_read_is_explained(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            start(path)
        assert str(caught.value).startswith(f"training.init_from: {path} ")
        return str(caught.value)

    assert "no Hugging Face model: neither model.safetensors nor pytorch_model.bin" in refusal(tmp_path)
    assert "no Hugging Face model" in refusal(tmp_path / "absent")
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer" in refusal(tmp_path)
    pointer.write_bytes(b"x" * 50)
    assert "damaged or no safetensors file" in refusal(pointer)
    pointer.unlink()
    torch.save({"bert.x": Bomb(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    assert "refused to unpickle" in refusal(tmp_path)
    assert not (tmp_path / "executed").exists()
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert f"it has no matrix {WORDS}" in refusal(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert "geneformer-pretrain export" in refusal(tmp_path)


def test_constants_name_parameters() -> None:
    assert {WORDS, POSITIONS, BIAS} <= set(dict(BertForMaskedLM(BertConfig(**ARCHITECTURE)).canonical_parameters()))
