"""The memory estimate and the advice of an error for want of memory.

tests/unit/planner/test_measured.py compares the estimate with measured peaks.
"""

from types import SimpleNamespace

import pytest
import torch

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import explain
from geneformer_pretrain.model.memory import estimate_peak, num_parameters, peak_memory, remedies
from geneformer_pretrain.model.resolve import resolve

GIB = 2**30
PARAMETERS = {name: num_parameters(load_config(name).model) for name in ("10m", "106m", "4b")}
FP8 = ("model.use_te_layers=true", "training.use_fp8=true")
PYTORCH = ("model.use_te_layers=false", "training.use_fp8=false")
FSDP2 = ("training.use_fsdp2=true",)
LAYER_OF_4B = 12 * 2560**2


def parts(name, *overrides, world_size=1, reshards=True):
    return peak_memory(load_config(name, list(overrides)), world_size, PARAMETERS[name], 2, reshards=reshards)


def estimate(name, *overrides, world_size=1, reshards=True):
    return estimate_peak(load_config(name, list(overrides)), world_size, PARAMETERS[name], 2, reshards=reshards) / GIB


def test_recomputing_lets_4b_train_in_80_gb():
    whole, half, none = (estimate("4b", *FP8, f"training.recompute_every_n_layers={n}") for n in (1, 2, 0))
    assert whole < half < 80e9 / GIB < none


def test_recomputing_every_nth_layer_keeps_the_others():
    # 36 layers of 61,440 bytes a token, and their weights in BF16, against 5,120 for an input; one recomputed layer is
    # there as well.
    tokens = 20_480
    saved = estimate("4b", *PYTORCH) - estimate("4b", *PYTORCH, "training.recompute_every_n_layers=3")
    assert saved * GIB == pytest.approx((11 * 61_440 - 12 * 5_120) * tokens + 11 * 2 * LAYER_OF_4B, rel=1e-3)


def test_sharding_divides_weights_and_optimizer_state():
    four, eight = (estimate("4b", *FSDP2, world_size=size) for size in (4, 8))
    assert (four - eight) * GIB == pytest.approx(12 * PARAMETERS["4b"] / 8, rel=0.01)
    assert estimate("4b", *FSDP2, "training.shard_group_size=4", world_size=8) == pytest.approx(four, rel=1e-6)
    assert estimate("4b", world_size=8) > estimate("4b", world_size=1)


def test_parts_are_counted_by_hand():
    one = parts("106m", *PYTORCH)
    parameters, tokens, width = PARAMETERS["106m"], 65_536, 768
    assert (one.weights, one.optimizer, one.gradients) == (4 * parameters, 8 * parameters, 0)
    assert one.activations == 2 * tokens * (12 * (8 * width + 3072) + 2 * width)
    assert one.logits == 2 * 25_426 * 10_624  # 15% of the tokens and 8 standard deviations, in 128s
    accumulating = parts("106m", *PYTORCH, "training.gradient_accumulation_steps=2")
    assert accumulating.gradients == 4 * parameters
    at_the_end = parts("4b", *PYTORCH, "model.micro_batch_size=1")
    assert (at_the_end.gradients, at_the_end.activations) == (4 * PARAMETERS["4b"], 0)
    for each in (one, accumulating, at_the_end):
        assert each.total == sum(vars(each).values())


def test_graphs_of_several_ranks_have_gradients_twice():
    small = load_config("4b", [*PYTORCH, "model.micro_batch_size=1"])
    parameters = PARAMETERS["4b"]
    peaks = {size: estimate_peak(small, size, parameters, 2, with_graphs=True) for size in (1, 2)}
    assert peaks[2] == (16 + 4) * parameters
    assert peaks[1] < peaks[2]


def test_weights_that_stay_gathered_are_counted():
    more = estimate("4b", *FSDP2, world_size=8, reshards=False)
    # All layers in BF16, of which two were counted before.
    assert (more - estimate("4b", *FSDP2, world_size=8)) * GIB == pytest.approx(34 * 2 * LAYER_OF_4B, rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "gib", "world_size", "reshards"),
    [
        ((), 139.8, 2, False),
        ((), 79.2, 2, True),  # 71 GiB would fit, but with too little to spare for an estimate
        ((), 79.2, 4, False),
        (("training.shard_group_size=2",), 79.2, 4, True),  # each GPU holds a half of the model, not a quarter
        (("training.reshard_after_forward=false",), 79.2, 2, False),
        (("training.reshard_after_forward=true",), 139.8, 2, True),
    ],
)
def test_weights_stay_gathered_where_memory_allows(overrides, gib, world_size, reshards, monkeypatch):
    gpu = SimpleNamespace(total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    world = World(0, 0, world_size, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert resolve(load_config("4b", [*FSDP2, *FP8, *overrides]), world).reshard_after_forward is reshards


@pytest.mark.parametrize(
    ("overrides", "advised", "not_advised"),
    [
        ((), ("recompute_every_n_layers=1", "use_fsdp2=True", "micro_batch_size below 10"), ("reshard",)),
        (FSDP2, ("reshard_after_forward=True", "micro_batch_size below 10"), ("use_fsdp2",)),
        ((*FSDP2, "training.reshard_after_forward=true"), ("recompute_every_n_layers=1",), ("reshard",)),
        (("training.recompute_every_n_layers=1", "model.micro_batch_size=1"), ("use_fsdp2",), ("recompute", "below")),
    ],
)
def test_lack_of_memory_says_what_to_change(overrides, advised, not_advised):
    given = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nException raised from malloc")
    text = explain(given, smaller=remedies(load_config("4b", list(overrides))))
    assert text.startswith("Out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. What needs less: ")
    for words in advised:
        assert words in text
    for words in not_advised:
        assert words not in text
