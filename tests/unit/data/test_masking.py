"""Masks: against an oracle in plain integers, their frequencies, and what they may depend on."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.data.masking import MASK_STREAM, MaskRule, epoch_key, mask_cell, mask_segments

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def oracle_mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def oracle_mask(tokens: list[int], cell: int, epoch: int, rule: MaskRule) -> tuple[list[int], list[int]]:
    """The definition, one position at a time, in Python's integers."""
    key = 1
    for value in (rule.seed, epoch, cell):
        key = oracle_mix((key + value + GOLDEN) % WORD)
    masked, labels = list(tokens), [-100] * len(tokens)
    for position, token in enumerate(tokens):
        first = oracle_mix((key + (position + 1) * GOLDEN) % WORD)
        if token < rule.num_special_tokens or first / WORD >= rule.probability:
            continue
        labels[position] = token
        second = oracle_mix((first + GOLDEN) % WORD)
        if second / WORD < 0.8:
            masked[position] = rule.mask_token_id
        elif second / WORD < 0.9:
            num_genes = rule.vocab_size - rule.num_special_tokens
            masked[position] = rule.num_special_tokens + (second % 2**32) * num_genes // 2**32
    return masked, labels


def run_kernel(
    cells_tokens: list[np.ndarray], cells: list[int], epoch: int, rule: MaskRule, capacity: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    input_ids = np.concatenate(cells_tokens).astype(np.int32)
    cu_seqlens = np.cumsum([0, *map(len, cells_tokens)]).astype(np.int32)
    masked_index, labels = np.full(capacity, 7, np.int32), np.full(capacity, 7, np.int32)
    count = mask_segments(
        input_ids, cu_seqlens, np.array(cells, np.int64), epoch_key(MASK_STREAM, rule.seed, epoch),
        rule.select_below, rule.vocab_size, rule.num_special_tokens, rule.mask_token_id, masked_index, labels,
    )  # fmt: skip
    return input_ids, masked_index, labels, count


@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    cells=st.lists(st.integers(0, 2**32), min_size=1, max_size=4),
    probability=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    num_special_tokens=st.integers(0, 4),
    data=st.data(),
)
@settings(max_examples=60)
def test_kernel_and_numpy_agree_with_the_oracle(seed, epoch, cells, probability, num_special_tokens, data):
    rule = MaskRule(seed, probability, 50, num_special_tokens, 1)
    tokens = [np.array(data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=40))) for _ in cells]
    input_ids, masked_index, labels, count = run_kernel(tokens, cells, epoch, rule, 200)
    start = 0
    flat_labels = np.full(len(input_ids), -100)
    flat_labels[masked_index[:count]] = labels[:count]
    for cell_tokens, cell in zip(tokens, cells, strict=True):
        expected, expected_labels = oracle_mask(cell_tokens.tolist(), cell, epoch, rule)
        masked, numpy_labels = mask_cell(cell_tokens, cell, epoch, rule)
        assert masked.tolist() == expected
        assert numpy_labels.tolist() == expected_labels
        assert input_ids[start : start + len(expected)].tolist() == expected
        assert flat_labels[start : start + len(expected)].tolist() == expected_labels
        start += len(expected)
    assert (np.diff(masked_index[:count]) > 0).all()
    assert (masked_index[count:] == 0).all()
    assert (labels[count:] == -100).all()


def test_frequencies_within_five_sigma():
    rule = MaskRule(seed=3, probability=0.15, vocab_size=1000, num_special_tokens=4, mask_token_id=1)
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 1000, 2000) for _ in range(500)]
    input_ids, masked_index, labels, count = run_kernel(tokens, list(range(500)), 0, rule, 10**6)
    original = np.concatenate(tokens)

    def close(successes: int, trials: int, probability: float) -> bool:
        sigma = math.sqrt(trials * probability * (1 - probability))
        return abs(successes - trials * probability) < 5 * sigma

    chosen = masked_index[:count]
    assert (labels[:count] == original[chosen]).all()
    assert (original[chosen] >= 4).all()
    assert close(count, int((original >= 4).sum()), 0.15)
    untouched = np.setdiff1d(np.arange(len(original)), chosen)
    assert (input_ids[untouched] == original[untouched]).all()

    becomes = input_ids[chosen]
    replaced = becomes == 1
    kept = becomes == original[chosen]
    randomised = becomes[~replaced & ~kept]
    assert close(int(replaced.sum()), count, 0.8)
    assert close(int(kept.sum()), count, 0.1 + 0.1 / 996)
    assert close(len(randomised), count, 0.1 * 995 / 996)
    assert randomised.min() >= 4
    histogram = np.bincount(randomised - 4, minlength=996)
    expected = len(randomised) / 996
    chi_square = ((histogram - expected) ** 2 / expected).sum()
    assert abs(chi_square - 995) < 5 * math.sqrt(2 * 995)
    # Neighbouring positions, and the same position of neighbouring cells, are selected independently.
    selected = np.zeros((500, 2000), bool)
    selected.reshape(-1)[chosen] = True
    probability = count / selected.size
    assert close(int((selected[:, 1:] & selected[:, :-1]).sum()), selected[:, 1:].size, probability**2)
    assert close(int((selected[1:] & selected[:-1]).sum()), selected[1:].size, probability**2)


def test_each_of_seed_epoch_and_cell_changes_the_mask():
    tokens = np.arange(10, 1010)

    def labels(seed: int, epoch: int, cell: int) -> tuple[int, ...]:
        return tuple(mask_cell(tokens, cell, epoch, MaskRule(seed, 0.15, 2000, 2, 1))[1])

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    assert len({labels(*key) for key in keys}) == len(keys)


def test_masks_stay_as_they_are_from_version_to_version():
    tokens = np.arange(2, 122)
    masked, labels = mask_cell(tokens, cell=5, epoch=2, rule=MaskRule(42, 0.15, 25426, 2, 1))
    positions = np.flatnonzero(labels != -100)
    assert dict(zip(positions.tolist(), masked[positions].tolist(), strict=True)) == {
        9: 1, 10: 1, 23: 1, 25: 1, 31: 1, 34: 1, 35: 1,
        45: 47, 47: 1, 48: 1, 50: 1, 57: 1, 69: 1, 93: 1, 96: 1,
        101: 1, 103: 4154, 104: 1, 111: 1, 112: 1,
    }  # fmt: skip


def test_overflow_is_counted_in_full_and_writes_nothing_beyond_the_capacity():
    rule = MaskRule(0, 1.0, 100, 2, 1)
    _, masked_index, labels, count = run_kernel([np.full(30, 9), np.full(30, 9)], [0, 1], 0, rule, 40)
    assert count == 60
    assert len(masked_index) == len(labels) == 40
