"""Updates that are skipped for their gradient norm: the rule against a plain computation, and its bounds."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training import outliers
from geneformer_pretrain.training.optimizer import build_optimizer, clip_and_step
from geneformer_pretrain.training.outliers import HISTORY, MAX_IN_A_ROW, NormHistory

CPU = torch.device("cpu")


def decide(norms: Sequence[float], factor: float = 6.0, saved: Sequence[float] | None = None) -> list[bool]:
    history = NormHistory(factor, CPU, saved)
    return [bool(history.is_outlier(torch.tensor(norm))) for norm in norms]


def reference(norms: Sequence[float], factor: float) -> tuple[list[bool], list[float]]:
    """The formula of the documentation, step by step."""
    n, mean, variance, in_a_row, skipped = 0, 0.0, 0.0, 0, []
    for norm in norms:
        if not math.isfinite(norm) or norm <= 0:
            skipped.append(False)
            continue
        x = math.log(np.float32(norm))
        reach = factor * max(math.sqrt(variance), 0.1)
        skip = n >= 100 and x > mean + reach and in_a_row < 5
        if n >= 100:
            x = min(max(x, mean - reach), mean + reach)
        w = 1 / min(n + 1, 100)
        mean, variance = mean + w * (x - mean), (1 - w) * (variance + w * (x - mean) ** 2)
        n, in_a_row = n + 1, in_a_row + 1 if skip else 0
        skipped.append(skip)
    return skipped, [n, mean, variance, in_a_row]


@given(st.integers(0, 2**32 - 1), st.floats(2, 8))
@settings(max_examples=25)
def test_decisions_are_those_of_the_formula(seed: int, factor: float) -> None:
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(0, 0.3, 250)).astype(np.float32)
    norms[generator.integers(0, 250, 20)] *= np.exp(generator.uniform(0, 8, 20)).astype(np.float32)
    norms[generator.integers(0, 250, 6)] = [math.nan, math.inf, 0, 1e-30, 1e30, math.inf]
    history = NormHistory(factor, CPU)
    found = [bool(history.is_outlier(torch.tensor(norm))) for norm in norms]
    expected, state = reference(norms.tolist(), factor)
    assert found == expected
    assert history.state.tolist() == pytest.approx(state, rel=1e-9, abs=1e-12)


def test_mean_and_variance_of_the_first_steps_are_plain_ones() -> None:
    norms = np.exp(np.random.default_rng(0).normal(1, 0.5, HISTORY)).astype(np.float32)
    history = NormHistory(6.0, CPU)
    for norm in norms:
        history.is_outlier(torch.tensor(norm))
    logs = np.log(norms.astype(np.float64))
    assert history.state.tolist() == pytest.approx([HISTORY, logs.mean(), logs.var(), 0])


def test_the_first_steps_are_never_skipped() -> None:
    spikes = [1.0, 1e6] * (HISTORY // 2)
    assert not any(decide(spikes))
    calm = [1.0] * HISTORY
    assert decide([*calm, 1.8, 1e6])[-2:] == [False, True]  # within 6 x 0.1 of the log, and far beyond
    assert decide([*calm[1:], 1e6])[-1] is False


@pytest.mark.parametrize("jump", [3.0, 100.0, 1e6, 1e30])
def test_norms_that_stay_high_are_accepted(jump: float) -> None:
    """Not even a millionfold rise stops training: five are skipped in a row at most, and few in all."""
    skipped = decide([*np.exp(np.random.default_rng(0).normal(0, 0.1, 300)), *[jump] * 700])
    runs = "".join("x" if skip else " " for skip in skipped).split()
    assert 3 <= max(map(len, runs)) <= MAX_IN_A_ROW
    assert not any(skipped[:300] + skipped[350:])
    assert sum(skipped) < 40


def test_a_state_goes_on_where_it_was() -> None:
    norms = np.exp(np.random.default_rng(1).normal(0, 0.3, 300)).astype(np.float32)
    norms[[150, 200, 250]] *= 100
    history = NormHistory(6.0, CPU)
    first = [bool(history.is_outlier(torch.tensor(norm))) for norm in norms[:200]]
    assert first + decide(norms[200:], saved=history.state.tolist()) == decide(norms)
    assert sum(decide(norms)) == 3


def test_a_skipped_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "HISTORY", 3)
    training = load_config("l0_sanity").training
    model = torch.nn.Linear(5, 3)
    optimizer, history = build_optimizer(model, training), NormHistory(4.0, CPU)

    def update(size: float) -> tuple[float, list[torch.Tensor]]:
        optimizer.zero_grad(set_to_none=True)
        (model(torch.ones(2, 5)).sum() * size).backward()
        norm = clip_and_step(optimizer, torch.tensor(0.5), 1.0, history)
        state = [tensor for parameter in model.parameters() for tensor in optimizer.state[parameter].values()]
        return float(norm), copy.deepcopy([*(p.detach() for p in model.parameters()), *state])

    for _ in range(3):
        norm, before = update(1.0)
    large, after = update(100.0)
    assert large == pytest.approx(100 * norm)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    _, later = update(1.0)
    assert not torch.equal(later[0], before[0])
    assert history.state[0] == 5


@pytest.mark.parametrize("value", ["1", "0", "-3", "inf", "nan"])
def test_factors_that_would_skip_good_steps_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.skip_outlier_steps is .*; it must be at least 2"):
        load_config("10m", [f"training.skip_outlier_steps={value}"])
