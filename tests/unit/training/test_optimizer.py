"""The update against plain AdamW with the mean loss, and the learning-rate schedules."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from torch.testing import assert_close

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.training import LrSchedule
from geneformer_pretrain.training.optimizer import build_optimizer, clip_and_step, learning_rate

TRAINING = replace(load_config("l0_sanity").training, weight_decay=0.1, learning_rate=1e-2)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))


def loss_sum(model, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 11, (5,), generator=generator)
    return (model(ids) * torch.randn(5, 8, generator=generator)).sum() * 30


def state_of(model, optimizer):
    tensors = [p.detach() for p in model.parameters()]
    for p in model.parameters():
        tensors += [optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")]
    return copy.deepcopy(tensors)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_update_equals_adamw_with_mean_loss_and_clipping(max_norm):
    """Independent reference: unfused AdamW, gradients of the mean, PyTorch's own clipping."""
    ours, reference = make_model(), make_model()
    optimizer = build_optimizer(ours, TRAINING)
    decayed = [p for p in reference.parameters() if p.ndim >= 2]
    others = [p for p in reference.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=TRAINING.learning_rate,
        betas=(TRAINING.adam_beta1, TRAINING.adam_beta2),
        eps=TRAINING.adam_eps,
        weight_decay=TRAINING.weight_decay,
        foreach=False,
    )
    for step in range(5):
        count = 7 + step
        loss_sum(ours, step).backward()
        norm = clip_and_step(optimizer, torch.tensor(1.0 / count), max_norm)
        optimizer.zero_grad(set_to_none=True)
        (loss_sum(reference, step) / count).backward()
        clip = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm or math.inf)
        plain.step()
        plain.zero_grad()
        assert_close(norm, clip)
        assert norm > 0.5  # otherwise nothing was clipped
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradient_that_is_not_finite_changes_nothing(bad):
    model = make_model()
    optimizer = build_optimizer(model, TRAINING)
    for step in range(2):
        loss_sum(model, step).backward()
        clip_and_step(optimizer, torch.tensor(0.1), 1.0)
        optimizer.zero_grad(set_to_none=True)
    before = state_of(model, optimizer)
    loss_sum(model, 2).backward()
    model[1].weight.grad[3, 4] = bad
    norm = clip_and_step(optimizer, torch.tensor(0.1), 1.0)
    assert not torch.isfinite(norm)
    assert_close(state_of(model, optimizer), before, rtol=0, atol=0)

    optimizer.zero_grad(set_to_none=True)
    loss_sum(model, 3).backward()
    clip_and_step(optimizer, torch.tensor(0.1), 1.0)
    assert optimizer.state[model[1].weight]["step"] == 3
    assert not torch.equal(model[1].weight, before[1])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_decay_spares_biases_and_layer_norm():
    model = make_model()
    optimizer = build_optimizer(model, TRAINING)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def reference_rates(scheduler_class, steps, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=TRAINING.learning_rate)
    scheduler = scheduler_class(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_equal_those_of_pytorch_after_warmup():
    peak, warmup, steps = TRAINING.learning_rate, 4, 20
    after = steps - warmup
    expected = {
        LrSchedule.constant: [peak] * after,
        LrSchedule.linear: reference_rates(LinearLR, after, start_factor=1.0, end_factor=1e-12, total_iters=after),
        LrSchedule.cosine: reference_rates(CosineAnnealingLR, after, T_max=after),
    }
    for schedule, rates in expected.items():
        config = replace(TRAINING, lr_schedule=schedule, warmup_steps=warmup, num_train_steps=steps)
        ours = [learning_rate(step, config) for step in range(steps)]
        assert ours[:warmup] == pytest.approx([peak / 4, peak / 2, peak * 3 / 4, peak])
        assert ours[warmup:] == pytest.approx(rates, abs=1e-9), schedule


def test_schedule_without_warmup_and_with_nothing_else():
    start = replace(TRAINING, lr_schedule=LrSchedule.linear, warmup_steps=0, num_train_steps=10)
    assert learning_rate(0, start) == TRAINING.learning_rate
    only_warmup = replace(start, warmup_steps=10)
    assert learning_rate(9, only_warmup) == TRAINING.learning_rate
    assert learning_rate(0, replace(start, warmup_steps=None, num_train_steps=40)) == TRAINING.learning_rate / 4
