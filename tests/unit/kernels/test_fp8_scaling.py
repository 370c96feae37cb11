"""Delayed scaling against its rule, written out tensor by tensor and step by step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.kernels import fp8_scaling
from geneformer_pretrain.kernels.fp8_scaling import LINEARS, DelayedScaling, backward_slot, forward_slots

CPU = torch.device("cpu")
MAXIMA = st.one_of(st.just(0.0), st.just(math.inf), st.floats(2.0**-90, 2.0**90, width=32))


@settings(max_examples=30, deadline=None)
@given(st.lists(MAXIMA, min_size=1, max_size=12), st.sampled_from(["forward", "backward"]), st.integers(0, 3))
def test_a_scale_fits_the_largest_of_the_last_steps(steps, direction, linear):
    """1024 steps count, of which four are enough here: the newest is among them from the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_scaling, "HISTORY", 4)
        scaling = DelayedScaling(2, CPU)
        layer = scaling.layer(1)
        slot = forward_slots(linear)[1] if direction == "forward" else backward_slot(linear)
        largest_number = 448.0 if direction == "forward" else 57344.0
        scale, seen = 1.0, []
        for value in steps:
            getattr(layer, f"{direction}_maxima")[slot] = value
            scaling.update()
            seen.append(0.0 if value == math.inf else value)
            largest = max(seen[-4:])
            if largest > 0:
                scale = largest_number / largest
            found = getattr(layer, f"{direction}_scales")
            assert found[slot].item() == pytest.approx(scale, rel=1e-6)
            assert not getattr(layer, f"{direction}_maxima").any()
            others = torch.ones_like(found)
            others[slot] = found[slot]
            assert torch.equal(found, others)
    assert torch.equal(scaling.layer(0).forward_scales, torch.ones(12))


def test_state_is_transformer_engines():
    """Names and shapes of `fp8_meta` of its linear layers; what is written there is in use."""
    scaling = DelayedScaling(2, CPU)
    state = dict(scaling.state())
    assert len(state) == 2 * len(LINEARS) * 4
    prefix = "bert.encoder.layer.1.attention.output.dense"
    assert state[f"{prefix}.scaling_fwd.scale"].shape == (3,)
    assert state[f"{prefix}.scaling_fwd.amax_history"].shape == (1024, 3)
    assert state[f"{prefix}.scaling_bwd.scale"].shape == (2,)
    assert state[f"{prefix}.scaling_bwd.amax_history"].shape == (1024, 2)
    assert all(tensor.is_contiguous() for tensor in state.values())
    state[f"{prefix}.scaling_fwd.scale"].copy_(torch.tensor([2.0, 3.0, 4.0]))
    of_input, of_weight = forward_slots(1)
    scales = scaling.layer(1).forward_scales
    assert (scales[of_input], scales[of_weight]) == (2.0, 3.0)


def test_a_restored_history_goes_on():
    """A run of six steps is the same as one of three whose state goes to another for three more."""

    def train(scaling, steps):
        for step in steps:
            scaling.layer(0).backward_maxima[0] = 2.0**-step
            scaling.update()

    whole, first, second = (DelayedScaling(1, CPU) for _ in range(3))
    train(whole, range(6))
    train(first, range(3))
    for (_, target), (_, source) in zip(second.state(), first.state(), strict=True):
        target.copy_(source)
    train(second, range(3, 6))
    for (name, found), (_, wanted) in zip(second.state(), whole.state(), strict=True):
        assert torch.equal(found, wanted), name
