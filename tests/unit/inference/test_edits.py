"""Perturbed copies against a plain statement of the rules on Python lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.inference.edits import SPECIAL_ROW, Mode, Rule, find_copies, write_copies, write_originals
from geneformer_pretrain.inference.packs import NO_GENE, NOT_COMPARED, Shape, fill_tail, new_buffer, plan_packs

VOCAB = 40


def edited(mode, genes, perturbed, fraction, limit):
    """Genes of the copy, and of the original that it is compared with."""
    if mode is Mode.delete:
        return [gene for gene in genes if gene not in perturbed], genes
    if mode is Mode.overexpress:
        copy = [*perturbed, *(gene for gene in genes if gene not in perturbed)]
        overflow = max(0, len(copy) - limit)
        return copy[:limit], genes[: len(genes) - overflow]
    size = len(genes)
    step = int(np.floor(abs(fraction) * size + 0.5)) * (1 if fraction > 0 else -1)
    targets = sorted((min(max(genes.index(gene) - step, 0), size - 1), genes.index(gene)) for gene in perturbed)
    places = []
    for target, _ in targets:
        places.append(max(target, places[-1] + 1 if places else 0))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], size - len(places) + i)
    moved = dict(zip(places, (genes[old] for _, old in targets), strict=True))
    rest = iter(gene for gene in genes if gene not in perturbed)
    return [moved[place] if place in moved else next(rest) for place in range(size)], genes


@st.composite
def jobs(draw):
    added = draw(st.booleans())
    limit = draw(st.integers(6, 14))
    first = 4 if added else 2
    room = limit - 2 * added
    cells = draw(
        st.lists(
            st.lists(st.integers(first, VOCAB - 1), min_size=1, max_size=room, unique=True), min_size=1, max_size=5
        )
    )
    mode = draw(st.sampled_from(Mode))
    k = draw(st.integers(1, 3))
    sets = None
    anchor = None
    if draw(st.booleans()):
        genes = st.lists(st.integers(first, VOCAB - 1), min_size=k, max_size=k, unique=True)
        sets = np.array(draw(st.lists(genes, min_size=1, max_size=4)), np.int32)
    elif draw(st.booleans()):
        anchor = draw(st.sampled_from(cells[0]))
    fraction = draw(st.floats(-1, 1))
    return Rule(mode, sets, anchor, fraction, limit, int(added), VOCAB), cells


def expected_copies(rule, cells):
    """(cell, perturbed genes) in order."""
    for number, genes in enumerate(cells):
        if rule.sets is not None:
            wanted = [list(genes_of_set) for genes_of_set in rule.sets.tolist()]
        elif rule.anchor is not None:
            wanted = [[rule.anchor, gene] for gene in genes if gene != rule.anchor]
        else:
            wanted = [[gene] for gene in genes[rule.mode is Mode.overexpress :]]
        for perturbed in wanted:
            if rule.mode is Mode.overexpress or set(perturbed) <= set(genes):
                yield number, perturbed


@settings(max_examples=300)
@given(jobs())
def test_copies_and_rows(job):
    rule, cells = job
    wrapped = [[2, *genes, 3] if rule.added else genes for genes in cells]
    tokens = np.array([token for cell in wrapped for token in cell], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in wrapped])])
    copies = find_copies(rule, tokens, offsets)
    expected = list(expected_copies(rule, cells))
    assert list(zip(copies.cell.tolist(), copies.genes.tolist(), strict=True)) == expected
    shape = Shape(max(128, int(copies.lengths.sum())), max(1, len(copies)), 16)
    parts = [part.numpy() for part in shape.split(new_buffer(shape, pinned=False))]
    first_row = 1000 * np.arange(len(copies))
    chosen = np.arange(len(copies))
    count = write_copies(
        int(rule.mode), rule.fraction, rule.added, tokens, offsets, copies.cell, copies.genes, copies.positions,
        copies.lengths, first_row, chosen, *parts,
    )  # fmt: skip
    assert count == copies.lengths.sum()
    ids, positions, rows, ends = parts
    room = rule.limit - 2 * rule.added
    for number, (cell, perturbed) in enumerate(expected):
        genes = cells[cell]
        assert copies.positions[number].tolist() == [genes.index(gene) if gene in genes else -1 for gene in perturbed]
        copy, original = edited(rule.mode, genes, perturbed, rule.fraction, room)
        assert copies.cuts[number] == len(genes) - len(original)
        assert copies.unchanged[number] == (copy == genes)
        assert copies.empty[number] == (not copy)
        span = slice(ends[number], ends[number + 1])
        found, compared = ids[span].tolist(), rows[span].tolist()
        assert positions[span].tolist() == list(range(len(found)))
        if rule.added:
            assert (found[0], found[-1]) == (2, 3)
            assert (compared[0], compared[-1]) == (SPECIAL_ROW - first_row[number], NO_GENE)
            found, compared = found[1:-1], compared[1:-1]
        assert found == copy
        for gene, row in zip(found, compared, strict=True):
            assert gene in perturbed or gene in original
            if gene in perturbed:
                assert row == NOT_COMPARED
            else:
                assert row == first_row[number] + rule.added + genes.index(gene)


def test_originals_without_their_last_genes():
    tokens = np.array([2, 10, 11, 12, 13, 3, 2, 20, 21, 3], np.int32)
    offsets = np.array([0, 6, 10])
    shape = Shape(128, 3, 16)
    parts = [part.numpy() for part in shape.split(new_buffer(shape, pinned=False))]
    cell, cuts, first_row = np.array([0, 0, 1]), np.array([0, 2, 0]), np.array([0, 100, 200])
    count = write_originals(1, tokens, offsets, cell, cuts, first_row, np.array([1, 2, 0]), *parts)
    assert parts[0][:count].tolist() == [2, 10, 11, 3, 2, 20, 21, 3, 2, 10, 11, 12, 13, 3]
    assert parts[2][:4].tolist() == [SPECIAL_ROW - 100, 101, 102, SPECIAL_ROW - 103]
    assert parts[3][:4].tolist() == [0, 4, 8, 14]


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(50, 300),
    st.integers(1, 20),
)
def test_plans_hold_each_cell_once(lengths, budget, max_cells):
    lengths = np.array(lengths)
    order, ends = plan_packs(lengths, budget, max_cells)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    packs = np.split(order, ends[:-1])
    assert all(0 < len(pack) <= max_cells and lengths[pack].sum() <= budget for pack in packs)


def test_plans_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(255), 1.41, 16_000)), 16, 2048).astype(np.int64)
    _, ends = plan_packs(lengths, 131_072, 2048)
    assert lengths.sum() / (131_072 * (len(ends) - 1)) > 0.995


@pytest.mark.parametrize("filled", [0, 1, 16, 17, 128])
def test_tail_is_padding_in_short_segments(filled):
    shape = Shape(128, 4, 16)
    ids, positions, rows, ends = (part.numpy() for part in shape.split(new_buffer(shape, pinned=False)))
    ids[:], positions[:], ends[:2] = 7, -1, (0, filled)
    fill_tail(ids, positions, rows, ends, 1, filled, shape.longest)
    assert (ids[filled:] == 0).all()
    assert (rows[filled:] == NO_GENE).all()
    assert ends[-1] == 128
    sizes = np.diff(ends)[1:]
    assert sizes.min() >= 0
    assert sizes.max() <= 16
    expected = [j for size in sizes for j in range(size)]
    assert positions[filled:].tolist() == expected
