"""Ways in which Hugging Face users load, wrap and call the model: each row of docs/huggingface.md is executed.

What works is compared with stock BERT; what is refused has to raise the message that the table has.
"""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.unit.model.pairs import make_cells, make_pair

# Those of transformers, accelerate, peft and torch.ao about themselves.
pytestmark = pytest.mark.filterwarnings("default")

DOCS = Path(__file__).parents[3] / "docs/huggingface.md"
LAYERS = {"bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk", "bert.encoder.layer.2": "disk"}
ON_DISK = {"bert.embeddings": "disk", **LAYERS, "cls": "disk"}


def rows(heading):
    """The table under a heading: (code, other cell) each."""
    section = DOCS.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(.+)` \| ?(.*?) ?\|$", section, flags=re.MULTILINE)
    assert len(found) == section.count("\n| `") > 0
    return found


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours, stock = make_pair(max_position_embeddings=64)
    return ours.eval(), stock.eval()


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    pair[0].save_pretrained(path)
    return path


@pytest.fixture
def run(pair, folder, tmp_path):
    """Evaluate a row's code for one of the two classes."""

    def run(code, model):
        ids, mask, labels = make_cells([5, 8, 2])
        names = {"folder": folder, "scratch": tmp_path, "mlm": model, "ids": ids, "mask": mask, "labels": labels}
        names |= {"BertForMaskedLM": type(model), "BertConfig": BertConfig, "on_disk": ON_DISK}
        for name in ("accelerate", "peft", "torchao.quantization"):
            if f"{name}." in code:
                names[name.split(".")[0]] = __import__(name) if "." in name else pytest.importorskip(name)
        return eval(code, names | {"copy": copy, "pickle": pickle, "torch": torch})

    return run


def flat(output, mask):
    """The tensors of an output: those over padded cells [B, S, ...] at tokens."""
    if isinstance(output, torch.Tensor):
        return [output[mask] if output.shape[:2] == mask.shape else output]
    parts = output.values() if isinstance(output, dict) else output
    return [x for part in parts for x in flat(part, mask)]


@pytest.mark.parametrize("code", [code for code, _ in rows("Loading and wrapping")])
@torch.no_grad()
def test_loading_and_wrapping(code, run, pair):
    if "torchao" in code:
        pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    ids, mask, _ = make_cells([5, 8, 2])
    model = copy.deepcopy(pair[0])
    made = run(code, model)
    made = made if isinstance(made, torch.nn.Module) else model
    if "random" in dict(rows("Loading and wrapping"))[code]:
        made.load_state_dict(pair[0].state_dict())
        made.eval()
    found, expected = made(ids, mask).logits[mask.bool()], pair[1](ids, mask).logits[mask.bool()]
    if "quantiz" in code:
        changed = [m for m in made.modules() if type(m).__module__.startswith("torch.ao") and hasattr(m, "scale")]
        changed += [p for p in made.parameters() if type(p).__module__.startswith("torchao")]
        assert len(changed) == 3 * 6 + 1
        assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    else:
        assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("code", [code for code, _ in rows("Calls")])
def test_calls(code, run, pair):
    ours, stock = (run(code, model) for model in pair)
    mask = make_cells([5, 8, 2])[1].bool()
    assert isinstance(ours, tuple) == isinstance(stock, tuple)
    if isinstance(stock, dict):
        assert list(ours) == list(stock)
    if code == "mlm(ids)":
        mask = torch.ones_like(mask)
    for found, expected in zip(flat(ours, mask), flat(stock, mask), strict=True):
        assert_close(found, expected, atol=2e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("code", "message"), rows("Refused"))
def test_refused(code, message, run, pair):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(code, copy.deepcopy(pair[0]))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(".")


def test_an_attention_is_taken_from_a_configuration(folder):
    config = transformers.BertConfig.from_pretrained(folder, attn_implementation="sdpa")
    assert BertForMaskedLM.from_pretrained(folder, config=config).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("targets", ["all-linear", ["query", "word_embeddings"]], ids=str)
def test_adapters_have_stock_outputs_and_gradients(pair, targets):
    peft = pytest.importorskip("peft")
    ids, mask, labels = make_cells([5, 8, 2])
    results = []
    for model in pair:
        config = peft.LoraConfig(r=4, target_modules=targets)
        adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
        adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        torch.manual_seed(1)
        for name in sorted(adapters):
            torch.nn.init.normal_(adapters[name], std=0.2)
        adapted.gradient_checkpointing_enable()
        output = adapted.train()(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        results.append((output.logits[mask.bool()], {name: p.grad for name, p in adapters.items()}))
        merged = adapted.merge_and_unload()(ids, mask).logits[mask.bool()]
        if targets == "all-linear":  # In tied embeddings, the adapter of one is merged into both.
            assert_close(merged, results[-1][0], atol=1e-4, rtol=1e-4)
    assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)
    assert (results[0][0] - pair[1](ids, mask).logits[mask.bool()]).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_does_what_it_does_with_stock(pair, tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    cells = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(*make_cells([5, 8, 2, 7, 3, 8]), strict=True)
    ]
    results = []
    for number, model in enumerate(pair):
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(number)), use_cpu=True, max_steps=4, per_device_train_batch_size=3, learning_rate=1e-3,
            gradient_checkpointing=checkpointing, report_to=[], save_steps=4, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(copy.deepcopy(model), arguments, train_dataset=cells)
        trainer.train()
        if number == 0:
            assert all(layer.gradient_checkpointing is checkpointing for layer in trainer.model.bert.encoder.layer)
        results.append((trainer.state.log_history[-1]["train_loss"], dict(trainer.model.named_parameters())))
    (loss, ours), (stock_loss, stock) = results
    assert loss == pytest.approx(stock_loss, rel=1e-4)
    for name, parameter in ours.items():
        assert_close(parameter, stock[name], atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    saved = transformers.BertForMaskedLM.from_pretrained(tmp_path / "0/checkpoint-4")
    assert_close(saved.bert.embeddings.word_embeddings.weight, ours["bert.embeddings.word_embeddings.weight"])


def test_output_embeddings_are_the_word_embeddings(pair):
    ours, stock = pair
    decoder = ours.get_output_embeddings()
    assert decoder.weight is ours.get_input_embeddings().weight
    assert_close(decoder.bias, stock.get_output_embeddings().bias)
    x = torch.randn(3, decoder.weight.shape[1])
    assert_close(decoder(x), stock.get_output_embeddings()(x))
    assert "cls.predictions.decoder.weight" not in ours.state_dict()
    clone = copy.deepcopy(ours)
    assert clone.get_output_embeddings().weight is clone.get_input_embeddings().weight


class Int8Weight(torch.Tensor):
    """A weight like torchao's: it knows linear layers, and nothing that would take it apart."""

    def __tensor_flatten__(self):
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.cat, torch.Tensor.to):
            raise NotImplementedError(function)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_weights_of_other_tensor_classes_stay_whole(pair):
    ids, mask, _ = make_cells([5, 8, 2])
    model = copy.deepcopy(pair[0])
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module._parameters["weight"] = module.weight.detach().as_subclass(Int8Weight)
    assert_close(model(ids, mask).logits, pair[0](ids, mask).logits)


def test_offloaded_weights_are_gone_after_the_call(folder, tmp_path):
    pytest.importorskip("accelerate")
    model = BertForMaskedLM.from_pretrained(folder, device_map=ON_DISK, offload_folder=tmp_path)
    for _ in range(2):
        assert {name[:20] for name, p in model.named_parameters() if not p.is_meta} == {"bert.encoder.layer.0"}
        with torch.no_grad():
            model(*make_cells([3, 2])[:2])
