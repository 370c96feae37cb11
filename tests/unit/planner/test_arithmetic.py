"""Counts of parameters and FLOPs against the real model and torch's own counter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.model.memory import num_parameters
from geneformer_pretrain.planner.arithmetic import flops_per_token, layer_shapes, root_shapes, size
from geneformer_pretrain.planner.lengths import simulated
from modeling_bert_te import BertConfig, BertForMaskedLM
from tests.unit.planner.conftest import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(configs: dict[str, Config], name: str) -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**configs[name].model.architecture()))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(configs[name].model) == count
    layers = configs[name].model.num_hidden_layers * size(layer_shapes(configs[name].model))
    assert size(root_shapes(configs[name].model)) + layers == count


@pytest.mark.parametrize(("name", "millions"), [("10m", 47.9), ("106m", 666), ("4b", 18_437)])
def test_flops_are_those_of_the_documentation(configs: dict[str, Config], name: str, millions: float) -> None:
    lengths = simulated("lognormal", 2048).quantiles()
    attended = (lengths.astype(float) ** 2).sum() / lengths.sum()
    assert flops_per_token(configs[name].model, 0.15, attended) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_flops_are_those_that_torch_counts(configs: dict[str, Config]) -> None:
    """Forward and backward of stock BERT over cells of several lengths, with a head on the masked tokens alone.

    A token attends to the tokens of its own cell: sum(n^2) products in all, not (sum n)^2 nor length times batch.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig as StockConfig
    from transformers import BertForMaskedLM as StockModel

    small = replace(
        configs["10m"].model,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        vocab_size=100,
    )
    stock = StockModel(StockConfig(**small.architecture(), attn_implementation="eager"))
    lengths, masked = np.array([48, 5, 17]), 3
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            hidden = stock.bert(torch.arange(2, 2 + length)[None]).last_hidden_state
            stock.cls(hidden[:, :masked]).sum().backward()
    tokens = lengths.sum()
    expected = tokens * flops_per_token(small, len(lengths) * masked / tokens, (lengths**2).sum() / tokens)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)
