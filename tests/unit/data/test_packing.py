"""Plans: every cell once, within budget, by the stated rule; the stream resumes at any pack."""

import itertools
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.data import packing as planning
from geneformer_pretrain.data import stream as streaming
from geneformer_pretrain.data.packing import BatchShape, default_max_cells, masked_capacity, pack_cells, permutation
from geneformer_pretrain.data.stream import PackStream
from tests.users import as_other_user, public_folder

ROOT = Path(__file__).resolve().parents[3]


def lognormal_lengths(num_cells: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.exp(generator.normal(np.log(900), 0.557, num_cells)).clip(200, 2048).astype(np.int32)


def shape_of(token_budget: int = 256, seq_length: int = 64, max_cells: int = 12) -> BatchShape:
    return BatchShape(token_budget, seq_length, max_cells, 128)


def oracle_packs(order: list[int], lengths: np.ndarray, shape: BatchShape, group: int, spare: int) -> list[list[int]]:
    """The packing rule, with lists."""
    budget = shape.token_budget
    unread = [(cell, min(int(lengths[cell]), shape.seq_length)) for cell in order]
    left: list[tuple[int, int]] = []
    packs = []
    while unread or left:
        new = []
        while unread and len(left) + len(new) < 2 * group * shape.max_cells:
            if sum(n for _, n in left + new) >= group * budget + max(budget, spare * shape.seq_length):
                break
            new.append(unread.pop(0))
        pool = left + sorted(new, key=lambda item: -item[1])
        number = group
        if not unread:
            tokens = sum(n for _, n in pool)
            number = min(group, max(math.ceil(tokens / budget), math.ceil(len(pool) / shape.max_cells)))
        made: list[list[tuple[int, int]]] = [[] for _ in range(number)]
        left = []
        for cell, length in pool:
            fits = [p for p in made if sum(n for _, n in p) + length <= budget and len(p) < shape.max_cells]
            if fits:
                min(fits, key=lambda p: sum(n * n for _, n in p)).append((cell, length))
            else:
                left.append((cell, length))
        packs += [[cell for cell, _ in pack] for pack in made]
    return packs


lengths_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=150).map(
    lambda lengths: np.array(lengths, np.int32)
)
shapes = st.builds(shape_of, st.sampled_from([128, 256, 384]), st.sampled_from([20, 64, 100]), st.integers(1, 12))


@given(lengths_strategy, shapes, st.integers(0, 2**40), st.integers(0, 9))
@settings(max_examples=100)
@pytest.mark.parametrize(("group", "spare"), [(planning.GROUP_PACKS, planning.SPARE_CELLS), (3, 2)])
def test_packs_follow_the_rule(group, spare, lengths, shape, seed, epoch):
    order = permutation(len(lengths), seed, epoch)
    expected = oracle_packs(order.tolist(), lengths, shape, group, spare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "GROUP_PACKS", group)
        patch.setattr(planning, "SPARE_CELLS", spare)
        plan = pack_cells(order, lengths, shape)
    packs = [plan.pack(i).tolist() for i in range(plan.num_packs)]
    assert packs == expected
    assert Counter(itertools.chain(*packs)) == Counter(range(len(lengths)))
    for pack in packs:
        assert np.minimum(lengths[pack], shape.seq_length).sum() <= shape.token_budget
        assert 1 <= len(pack) <= shape.max_cells


@given(st.integers(1, 50), st.integers(1, 9))
@settings(max_examples=30)
def test_without_packing_a_pack_is_the_next_cells(num_cells, micro_batch_size):
    order = permutation(num_cells, 1, 0)
    expected = [order[i : i + micro_batch_size].tolist() for i in range(0, num_cells, micro_batch_size)]
    lengths = np.full(num_cells, 10, np.int32)
    plan = pack_cells(order, lengths, shape_of(max_cells=micro_batch_size), packing=False)
    assert [plan.pack(i).tolist() for i in range(plan.num_packs)] == expected


@pytest.mark.parametrize(("token_budget", "fill"), [(16384, 0.995), (32768, 0.9975), (65536, 0.998)])
def test_fill(token_budget, fill):
    lengths = lognormal_lengths(100_000)
    shape = BatchShape.create(lengths, micro_batch_size=token_budget // 2048, seq_length=2048, mlm_probability=0.15)
    plan = pack_cells(permutation(len(lengths), 0, 0), lengths, shape)
    assert lengths.sum(dtype=np.int64) / (plan.num_packs * token_budget) >= fill


@pytest.mark.parametrize("token_budget", [16384, 65536])
@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_ranks_side_by_side_have_equal_work(token_budget, ranks):
    """Sums of squared lengths, which attention costs: the slowest of the ranks against their mean."""
    lengths = lognormal_lengths(100_000)
    shape = BatchShape.create(lengths, micro_batch_size=token_budget // 2048, seq_length=2048, mlm_probability=0.15)
    order = permutation(len(lengths), 0, 0)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    plan = pack_cells(order, lengths, shape)
    cost = np.add.reduceat(lengths[plan.cells].astype(np.int64) ** 2, plan.pack_start[:-1])
    whole_groups = cost[: plan.num_packs // 32 * 32]
    steps = whole_groups[: len(whole_groups) // ranks * ranks].reshape(-1, ranks)
    assert (steps.max(1) / steps.mean(1)).mean() < (1.03 if ranks > 32 else 1.005)
    # No cell waits for longer than two groups.
    group = 32 * token_budget / lengths.mean()
    assert (np.arange(len(position)) - position[plan.cells]).max() < 2 * group


def test_fill_with_many_short_cells():
    """Half of the cells of the real corpus are short: the limit of cells must not close packs early."""
    generator = np.random.default_rng(1)
    lengths = np.exp(generator.normal(np.log(255), 1.25, 100_000)).clip(10, 2048).astype(np.int32)
    shape = BatchShape.create(lengths, micro_batch_size=8, seq_length=2048, mlm_probability=0.15)
    plan = pack_cells(permutation(len(lengths), 0, 0), lengths, shape)
    assert lengths.sum(dtype=np.int64) / (plan.num_packs * 16384) >= 0.995


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5), st.none() | st.integers(1, 20))
@settings(max_examples=100)
def test_permutation_holds_every_cell_once_and_is_reproducible(num_cells, seed, epoch, block):
    order = permutation(num_cells, seed, epoch, block)
    assert order.dtype == np.uint32
    assert sorted(order.tolist()) == list(range(num_cells))
    assert (order == permutation(num_cells, seed, epoch, block)).all()


def test_permutation_is_uniform():
    """Every order of 4 cells equally often: chi-square with 23 degrees of freedom, five sigma."""
    counts = Counter(tuple(permutation(4, seed, epoch).tolist()) for seed in range(60) for epoch in range(80))
    assert len(counts) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 23 + 5 * (2 * 23) ** 0.5


def test_orders_stay_as_they_are_from_version_to_version():
    assert permutation(10, 42, 3).tolist() == [5, 7, 1, 9, 0, 6, 4, 8, 3, 2]
    assert permutation(40, 42, 3, 2).tolist()[:10] == [35, 3, 39, 28, 32, 38, 5, 30, 20, 31]


def test_block_shuffle_reads_within_windows():
    windows = permutation(100_000, 5, 0, shuffle_block_cells=100)[: 62 * 1600].reshape(62, 1600)
    assert all(len(np.unique(window // 100)) == 16 for window in windows)
    # The blocks of a window come from all over the corpus, and its cells are mixed.
    assert np.median(windows.std(axis=1)) > 20_000
    assert np.median([len(np.unique(part // 100)) for part in windows.reshape(620, 160)]) == 16
    assert (permutation(100_000, 5, 1, 100) != permutation(100_000, 5, 0, 100)).mean() > 0.99


def test_shape_constants():
    lengths = np.full(1000, 500, np.int32)
    shape = BatchShape.create(lengths, micro_batch_size=8, seq_length=2048, mlm_probability=0.15)
    assert shape.token_budget == 16384
    assert shape.masked_capacity == 2944  # 2457.6 + 8 * 45.7 = 2823.3, in multiples of 128
    assert shape.max_cells == 66  # 1.5 * 16384 / 500 = 49.2
    assert shape.num_segments == 66 + 8
    sizes = {"micro_batch_size": 2, "seq_length": 64, "mlm_probability": 0.15}
    assert BatchShape.create(lengths, max_cells=100, **sizes).max_cells == 100
    assert BatchShape.create(lengths, max_cells=10_000_000, **sizes).max_cells == 128  # cells of one token
    assert masked_capacity(256, 1.0) == 256
    assert masked_capacity(100, 1.0) == 128
    assert default_max_cells(np.ones(9, np.int32), 64, 128) == 128
    # Truncated lengths count: the mean is 64.
    assert default_max_cells(np.full(9, 1000, np.int32), 64, 128) == 3 + 16
    padded = BatchShape.create(lengths, micro_batch_size=3, seq_length=50, mlm_probability=0.15, packing=False)
    assert (padded.token_budget, padded.max_cells) == (150, 3)
    unmasked = BatchShape.create(lengths, micro_batch_size=8, seq_length=2048, mlm_probability=0)
    assert unmasked.masked_capacity == 0


def stream_of(lengths: np.ndarray, **changes) -> PackStream:
    arguments = {"fingerprint": "f", "seed": 7, "shape": shape_of(), "packing": True, "plan_dir": None}
    return PackStream(lengths, **(arguments | changes))


def located(stream: PackStream, packs: range) -> list[tuple[int, list[int]]]:
    return [(epoch, cells.tolist()) for epoch, cells in map(stream.locate, packs)]


@given(lengths_strategy, st.booleans(), st.none() | st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_stream_resumes_at_any_pack(lengths, packing, block, data):
    options = {"packing": packing, "shuffle_block_cells": block}
    uninterrupted = stream_of(lengths, **options)
    epoch_packs = [uninterrupted.plan(epoch).num_packs for epoch in range(4)]
    total = sum(epoch_packs)
    reference = located(uninterrupted, range(total))
    assert [sum(epoch == e for epoch, _ in reference) for e in range(4)] == epoch_packs
    for epoch in range(4):
        seen = itertools.chain(*(cells for e, cells in reference if e == epoch))
        assert Counter(seen) == Counter(range(len(lengths)))

    pack = data.draw(st.integers(0, total - 1))
    state = uninterrupted.state_at(pack)
    assert state["epoch"] == reference[pack][0]
    resumed = stream_of(lengths, **options, **state)
    assert located(resumed, range(pack, total)) == reference[pack:]
    assert resumed.state_at(pack) == state


def test_resuming_never_plans_earlier_epochs(monkeypatch):
    lengths = np.full(100, 30, np.int32)
    state = stream_of(lengths).state_at(100)
    planned = []

    def record(num_cells: int, seed: int, epoch: int, block: int | None) -> np.ndarray:
        planned.append(epoch)
        return permutation(num_cells, seed, epoch, block)

    monkeypatch.setattr(streaming, "permutation", record)
    stream_of(lengths, **state).locate(100)
    assert planned == [state["epoch"]]
    assert state["epoch"] > 5
    with pytest.raises(ValueError, match=rf"pack 0 lies before pack {state['epoch_first_pack']}"):
        stream_of(lengths, **state).locate(0)


def test_memory_holds_two_epochs_of_a_large_corpus(monkeypatch):
    monkeypatch.setattr(streaming, "MAX_CELLS_IN_MEMORY", 0)
    stream = stream_of(np.full(100, 30, np.int32))
    reference = located(stream_of(np.full(100, 30, np.int32)), range(60))
    assert located(stream, range(60)) == reference
    assert len(stream._plans) == 2
    assert located(stream, range(30)) == reference[:30]


def test_the_next_epoch_of_a_large_corpus_is_planned_ahead(monkeypatch):
    lengths = np.full(100, 30, np.int32)
    reference = located(stream_of(lengths), range(40))
    first_of_next = next(pack for pack, (epoch, _) in enumerate(reference) if epoch == 1)
    monkeypatch.setattr(streaming, "MIN_CELLS_FOR_PLAN_FILES", 0)
    planned, may_plan = [], threading.Event()

    def record(num_cells: int, seed: int, epoch: int, block: int | None) -> np.ndarray:
        planned.append((epoch, threading.current_thread().name))
        assert epoch == 0 or may_plan.wait(timeout=60)
        return permutation(num_cells, seed, epoch, block)

    monkeypatch.setattr(streaming, "permutation", record)
    stream = stream_of(lengths)
    half = first_of_next // 2
    assert located(stream, range(half)) == reference[:half]
    assert [epoch for epoch, _ in planned] == [0]
    assert located(stream, range(half, first_of_next)) == reference[half:first_of_next]  # does not wait
    may_plan.set()
    assert located(stream, range(first_of_next, 40)) == reference[first_of_next:]
    assert planned[1:3] == [(1, "planner"), (2, "planner")]


@pytest.mark.parametrize("lasts", [False, True])
def test_a_plan_that_cannot_be_made_ahead_is_tried_again_when_it_is_needed(monkeypatch, caplog, lasts):
    lengths = np.full(100, 30, np.int32)
    reference = located(stream_of(lengths), range(40))
    first_of_next = next(pack for pack, (epoch, _) in enumerate(reference) if epoch == 1)
    monkeypatch.setattr(streaming, "MIN_CELLS_FOR_PLAN_FILES", 0)
    stream = stream_of(lengths)
    stream.locate(0)
    tried = []

    def fail(*arguments) -> np.ndarray:
        tried.append(threading.current_thread().name)
        if lasts or len(tried) == 1:
            raise OSError("no space left")
        return permutation(*arguments)

    monkeypatch.setattr(streaming, "permutation", fail)
    assert located(stream, range(first_of_next)) == reference[:first_of_next]
    with pytest.raises(OSError, match="no space left") if lasts else nullcontext():
        assert located(stream, range(first_of_next, first_of_next + 3)) == reference[first_of_next : first_of_next + 3]
    assert tried == ["planner", "MainThread"]
    assert [record.getMessage() for record in caplog.records] == [
        "cannot plan epoch 1 ahead (no space left); that is tried again when it begins"
    ]


def test_without_a_thread_to_be_had_an_epoch_is_planned_when_it_begins(monkeypatch, caplog):
    lengths = np.full(100, 30, np.int32)
    reference = located(stream_of(lengths), range(40))
    monkeypatch.setattr(streaming, "MIN_CELLS_FOR_PLAN_FILES", 0)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    assert located(stream_of(lengths), range(40)) == reference
    assert "cannot plan epoch 1 ahead (can't start new thread)" in caplog.text


def test_truncation_is_counted():
    stream = stream_of(np.array([64, 65, 100, 1], np.int32))
    assert (stream.num_truncated, stream.dropped_tokens) == (2, 37)


@pytest.fixture
def disk(monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "MIN_CELLS_FOR_PLAN_FILES", 0)
    return tmp_path / "plans"


def epochs_on_disk(disk: Path) -> set[int]:
    return {int(path.name.split(".")[0]) for path in disk.glob("*/*.npy")}


def test_plans_on_disk_are_pruned(disk, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_CELLS_IN_MEMORY", 0)
    lengths = np.full(100, 30, np.int32)
    reference = located(stream_of(lengths), range(80))
    stream = stream_of(lengths, plan_dir=disk)
    assert located(stream, range(80)) == reference
    next_one = reference[-1][0] + 1
    stream.plan(next_one)  # which may be on its way
    assert epochs_on_disk(disk) == {next_one - 2, next_one - 1, next_one}
    assert not list(disk.glob("*/*.tmp"))


def test_plans_that_another_run_uses_are_not_deleted_under_it(disk, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_CELLS_IN_MEMORY", 0)
    lengths = np.full(100, 30, np.int32)
    behind, ahead = (stream_of(lengths, plan_dir=disk) for _ in range(2))
    behind.plan(0)
    for epoch in range(8):
        ahead.plan(epoch)
    assert epochs_on_disk(disk) == {0, 5, 6, 7}
    behind.plan(6)
    behind.plan(7)  # lets go of epoch 0
    ahead.plan(8)
    assert epochs_on_disk(disk) == {6, 7, 8}


def test_a_folder_of_plans_that_cannot_be_written_to(disk, caplog):
    lengths = np.full(100, 30, np.int32)
    first = located(stream_of(lengths, plan_dir=disk), range(3))
    disk.rename(disk.parent / "elsewhere")
    disk.touch()  # a file in its place
    assert located(stream_of(lengths, plan_dir=disk), range(3)) == first
    assert "data.cache_dir: the plan of epoch 0 cannot be kept" in caplog.text


def use_plans_of_another_user(cache: Path, reference: list[tuple[int, list[int]]], new_epoch: int, may: bool) -> None:
    streaming.MIN_CELLS_FOR_PLAN_FILES = 0
    stream = stream_of(np.full(100, 30, np.int32), plan_dir=cache / "plans")
    assert located(stream, range(12)) == reference
    assert isinstance(stream.plan(0).cells, np.memmap)
    # A new plan is kept for all where the folder's permissions allow it.
    assert isinstance(stream.plan(new_epoch).cells, np.memmap) == may


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_two_users_share_a_folder_of_plans(disk, mode):
    with public_folder() as cache:
        cache.chmod(mode)
        stream = stream_of(np.full(100, 30, np.int32), plan_dir=cache / "plans")
        reference = located(stream, range(12))
        new_epoch = reference[-1][0] + 5
        as_other_user(use_plans_of_another_user, cache, reference, new_epoch, mode == 0o777)
        assert isinstance(stream.plan(new_epoch).cells, np.memmap)


def test_digest_of_the_first_packs():
    lengths = lognormal_lengths(2000)
    shape = BatchShape.create(lengths, micro_batch_size=2, seq_length=2048, mlm_probability=0.15)
    stream = stream_of(lengths, shape=shape)
    assert stream.first_packs_digest(5) == stream_of(lengths, shape=shape).first_packs_digest(5)
    others = [stream.first_packs_digest(6), stream_of(lengths, shape=shape, seed=8).first_packs_digest(5)]
    assert len({stream.first_packs_digest(5), *others}) == 3


def test_plans_on_disk_are_mapped_not_made_again(disk, monkeypatch):
    lengths = np.full(100, 30, np.int32)
    first = located(stream_of(lengths, plan_dir=disk), range(5))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "permutation", None)
        stream = stream_of(lengths, plan_dir=disk)
        assert located(stream, range(5)) == first
        assert isinstance(stream.plan(0).cells, np.memmap)
    for other in ({"seed": 8}, {"fingerprint": "g"}, {"packing": False}, {"shape": shape_of(384)}):
        stream_of(lengths, plan_dir=disk, **other).locate(0)
    stream_of(lengths, plan_dir=disk, shuffle_block_cells=5).locate(0)
    assert len(list(disk.iterdir())) == 6


def test_damaged_plan_is_named(disk):
    lengths = np.full(100, 30, np.int32)
    stream_of(lengths, plan_dir=disk).locate(0)
    (path,) = disk.glob("*/0.cells.npy")
    content = path.read_bytes()
    swapped = content[:-8] + content[-4:] + content[-8:-4]
    for damage in (content[:-40], b"", swapped):
        path.write_bytes(damage)
        with pytest.raises(RuntimeError, match=r"0\.cells\.npy.*delete the folder"):
            stream_of(lengths, plan_dir=disk).locate(0)


def test_processes_share_one_plan(disk):
    """Several processes start at once; one plans, all give the same packs."""
    script = (
        "import sys, numpy as np\n"
        "from geneformer_pretrain.data import packing as plan, stream as streaming\n"
        "streaming.MIN_CELLS_FOR_PLAN_FILES = 0\n"
        "made = []\n"
        "make = streaming.PackStream._make\n"
        "streaming.PackStream._make = lambda self, epoch: (made.append(epoch), make(self, epoch))[1]\n"
        "shape = plan.BatchShape(256, 64, 12, 128)\n"
        "stream = streaming.PackStream(np.full(20_000, 30, np.int32), 'f', 7, shape, True, sys.argv[1])\n"
        "print(len(made), [stream.locate(p)[1].tolist() for p in (0, 50)], len(made))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(disk)], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted(output.strip()[-1] for output in outputs) == ["0", "0", "1"]
    assert len({output.strip()[:-1] for output in outputs}) == 1


def test_threads_share_a_stream():
    lengths = lognormal_lengths(500)
    shape = BatchShape.create(lengths, micro_batch_size=2, seq_length=2048, mlm_probability=0.15)
    reference = located(stream_of(lengths, shape=shape), range(500))
    stream = stream_of(lengths, shape=shape)
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(stream.locate, range(500)))
    assert [(epoch, cells.tolist()) for epoch, cells in results] == reference


def test_a_small_corpus_has_many_epochs():
    assert stream_of(np.full(10, 30, np.int32)).locate(5000)[0] > 1000
