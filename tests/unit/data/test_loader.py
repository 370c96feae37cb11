"""Micro-batches: layout, agreement of packed and padded, independence of ranks and threads, errors."""

import itertools
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.data.batch import BatchBuilder, PackedBatch, PaddedBatch, build_batches, unpack
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.data.masking import MaskRule, mask_cell
from geneformer_pretrain.data.packing import BatchShape
from geneformer_pretrain.data.stream import PackStream

RULE = MaskRule(seed=7, probability=0.15, vocab_size=200, num_special_tokens=2, mask_token_id=1)
OPTIONS = {"vocab_size": 200, "pad_token_id": 0, "mask_rule": RULE}


@dataclass
class MemoryCorpus:
    """A corpus in memory, in record batches whose values buffer begins with tokens of nobody."""

    cells: list[np.ndarray]
    token_dtype: np.dtype = field(default_factory=lambda: np.dtype(np.int64))
    offset_dtype: np.dtype = field(default_factory=lambda: np.dtype(np.int32))
    rows_per_batch: int = 7
    fingerprint: str = "memory"

    def __post_init__(self) -> None:
        self.num_cells = len(self.cells)
        self.lengths = np.array([len(cell) for cell in self.cells], np.int32)
        self.batches = []
        first_cells = list(range(0, self.num_cells, self.rows_per_batch))
        for first in first_cells:
            rows = self.cells[first : first + self.rows_per_batch]
            values = np.concatenate([[99, 99, 99], *rows]).astype(self.token_dtype)
            offsets = (3 + np.cumsum([0, *map(len, rows)])).astype(self.offset_dtype)
            self.batches.append((values, offsets))
        self.batch_first_cell = np.array([*first_cells, self.num_cells], np.int64)
        self.batch_values = np.array([values.ctypes.data for values, _ in self.batches], np.uint64)
        self.batch_offsets = np.array([offsets.ctypes.data for _, offsets in self.batches], np.uint64)

    def cell(self, index: int) -> np.ndarray:
        return self.cells[index].astype(np.int64)

    def describe_cell(self, index: int) -> str:
        return f"memory, row {index}"


def corpus_of(lengths: list[int], **options) -> MemoryCorpus:
    generator = np.random.default_rng(sum(lengths))
    return MemoryCorpus([generator.integers(1, 200, length) for length in lengths], **options)


def shape_for(corpus: MemoryCorpus, packing: bool = True, micro_batch_size: int = 4) -> BatchShape:
    return BatchShape.create(
        corpus.lengths,
        micro_batch_size=micro_batch_size,
        seq_length=64,
        mlm_probability=0.15,
        packing=packing,
    )


def stream_for(corpus: MemoryCorpus, shape: BatchShape, packing: bool = True) -> PackStream:
    return PackStream(corpus.lengths, corpus.fingerprint, 7, shape, packing)


def loader_for(
    corpus: MemoryCorpus,
    packing: bool = True,
    packs: Iterable[int] = range(10),
    num_workers: int = 0,
    prefetch: int | None = None,
    **changes,
) -> Loader:
    shape = shape_for(corpus, packing)
    builder = BatchBuilder(corpus, shape, **(OPTIONS | {"packing": packing} | changes))
    return Loader(builder, stream_for(corpus, shape, packing), packs, num_workers, prefetch)


def events_of(batch: PackedBatch | PaddedBatch) -> dict[tuple[int, int], tuple[int, int]]:
    """(cell, position) -> (token, label) of every place that is not padding."""
    events = {}
    if isinstance(batch, PaddedBatch):
        for row, cell in enumerate(batch.cells.tolist()):
            for position in range(int(batch.attention_mask[row].sum())):
                token, label = batch.input_ids[row, position], batch.labels[row, position]
                events[cell, position] = (int(token), int(label))
        return events
    labels = torch.full_like(batch.parts.input_ids, -100)
    labels[batch.parts.masked_index[: batch.num_masked].long()] = batch.parts.labels[: batch.num_masked]
    for segment, cell in enumerate(batch.cells.tolist()):
        start, end = batch.parts.cu_seqlens[segment : segment + 2].tolist()
        for position in range(end - start):
            events[cell, position] = (int(batch.parts.input_ids[start + position]), int(labels[start + position]))
    return events


lengths_strategy = st.lists(st.integers(1, 100), min_size=1, max_size=60)
dtypes = st.sampled_from([np.uint16, np.int16, np.int32, np.int64]).map(np.dtype)


@given(lengths_strategy, dtypes, st.sampled_from([np.int32, np.int64]).map(np.dtype), st.integers(1, 9))
@settings(max_examples=60)
def test_layout_of_a_packed_batch(lengths, token_dtype, offset_dtype, rows):
    corpus = corpus_of(lengths, token_dtype=token_dtype, offset_dtype=offset_dtype, rows_per_batch=rows)
    shape = shape_for(corpus)
    stream = stream_for(corpus, shape)
    builder = BatchBuilder(corpus, shape, **OPTIONS)
    for batch in build_batches(builder, stream, range(stream.plan(0).num_packs)):
        assert batch.max_seqlen == 64
        assert batch.buffer.dtype == torch.int32
        assert len(batch.parts.input_ids) == len(batch.parts.position_ids) == shape.token_budget == 256
        assert len(batch.parts.cu_seqlens) == shape.num_segments + 1
        assert len(batch.parts.masked_index) == len(batch.parts.labels) == shape.masked_capacity
        assert all(part.data_ptr() % 128 == batch.buffer.data_ptr() % 128 for part in batch.parts)

        segments = batch.parts.cu_seqlens.numpy()
        lengths_of_segments = np.diff(segments)
        assert segments[0] == 0
        assert segments[-1] == 256
        assert lengths_of_segments.max() <= 64
        used = int((lengths_of_segments > 0).sum())
        assert (lengths_of_segments[:used] > 0).all()  # only the unused entries at the end are empty
        expected_positions = np.concatenate([np.arange(n) for n in lengths_of_segments])
        assert (batch.parts.position_ids.numpy() == expected_positions).all()

        assert batch.num_cells == len(batch.cells)
        assert batch.num_tokens == segments[batch.num_cells]
        assert (batch.parts.input_ids[batch.num_tokens :] == 0).all()
        expected_labels, expected_index = [], []
        for segment, cell in enumerate(batch.cells.tolist()):
            start, end = segments[segment : segment + 2]
            masked, labels = mask_cell(corpus.cell(cell)[:64], cell, batch.epoch, RULE)
            assert (batch.parts.input_ids.numpy()[start:end] == masked).all()
            positions = np.flatnonzero(labels != -100)
            expected_index += (start + positions).tolist()
            expected_labels += labels[positions].tolist()
        assert batch.num_masked == len(expected_labels)
        padding = shape.masked_capacity - batch.num_masked
        assert batch.parts.masked_index.tolist() == expected_index + [0] * padding
        assert batch.parts.labels.tolist() == expected_labels + [-100] * padding


@given(lengths_strategy, st.integers(1, 5))
@settings(max_examples=20)
def test_packed_and_padded_agree_over_an_epoch(lengths, micro_batch_size):
    corpus = corpus_of(lengths)
    collected = []
    for packing in (True, False):
        shape = shape_for(corpus, packing, micro_batch_size if not packing else 4)
        stream = stream_for(corpus, shape, packing)
        builder = BatchBuilder(corpus, shape, **OPTIONS, packing=packing)
        events = {}
        for batch in build_batches(builder, stream, range(stream.plan(0).num_packs)):
            found = events_of(batch)
            assert batch.num_tokens == len(found)
            assert batch.num_masked == sum(label != -100 for _, label in found.values())
            events |= found
            if not packing:
                width = max(min(len(corpus.cells[cell]), 64) for cell in batch.cells)
                assert batch.input_ids.shape == batch.labels.shape == (batch.num_cells, width)
                assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
                assert (batch.labels[batch.attention_mask == 0] == -100).all()
        collected.append(events)
    assert collected[0] == collected[1]
    assert len(collected[0]) == sum(min(length, 64) for length in lengths)


def flat(batches) -> list[tuple[int, bytes]]:
    return [
        (batch.pack, batch.buffer[: 256 * 2].numpy().tobytes() + batch.parts.labels.numpy().tobytes())
        for batch in batches
    ]


def test_a_stream_taken_up_again_continues_across_an_epoch_end():
    corpus = corpus_of([5, 60, 100, 33, 2] * 12)
    with loader_for(corpus, packs=range(60), num_workers=2) as loader:
        batches = list(loader)
    assert batches[-1].epoch >= 2
    shape = shape_for(corpus)
    state = stream_for(corpus, shape).state_at(34)
    assert state["epoch"] >= 1
    stream = PackStream(corpus.lengths, corpus.fingerprint, 7, shape, True, **state)
    resumed = Loader(BatchBuilder(corpus, shape, **OPTIONS), stream, range(34, 60))
    assert flat(resumed) == flat(batches[34:])


def test_unmasked_batches_are_the_corpus():
    corpus = corpus_of([5, 60, 100, 33, 2] * 12)
    for packing in (True, False):
        masked, plain = (list(loader_for(corpus, packing, range(4), mask_rule=rule)) for rule in (RULE, None))
        for a, b in zip(masked, plain, strict=True):
            assert (b.num_masked, b.num_tokens) == (0, a.num_tokens)
            for (cell, position), (token, label) in events_of(b).items():
                assert (token, label) == (corpus.cells[cell][position], -100)
    shape = replace(shape_for(corpus), masked_capacity=0)
    batch = BatchBuilder(corpus, shape, vocab_size=200, pad_token_id=0).build(0, 0, np.array([0, 2]))
    assert len(batch.parts.labels) == len(batch.parts.masked_index) == 0
    assert batch.parts.cu_seqlens[:3].tolist() == [0, 5, 69]
    assert batch.parts.position_ids[:69].tolist() == [*range(5), *range(64)]


def test_batches_arrive_in_order_whatever_the_threads_do(monkeypatch):
    corpus = corpus_of([40] * 200)
    reference = flat(loader_for(corpus))
    build = BatchBuilder.build

    def build_slowly(self, pack, epoch, cells):
        time.sleep(0.02 if pack % 3 == 0 else 0)
        return build(self, pack, epoch, cells)

    monkeypatch.setattr(BatchBuilder, "build", build_slowly)
    with loader_for(corpus, num_workers=4) as loader:
        assert flat(loader) == reference
        assert next(loader, None) is None


def test_prefetch_is_bounded_and_works_ahead(monkeypatch):
    corpus = corpus_of([40] * 200)
    built = []
    build = BatchBuilder.build
    monkeypatch.setattr(
        BatchBuilder, "build", lambda self, pack, *rest: (built.append(pack), build(self, pack, *rest))[1]
    )
    with loader_for(corpus, packs=range(1000), num_workers=2, prefetch=3) as loader:
        assert next(loader).pack == 0
        deadline = time.monotonic() + 10
        while len(built) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(built) == [0, 1, 2, 3]


def test_close_ends_the_threads_promptly(monkeypatch):
    before = threading.active_count()
    corpus = corpus_of([40] * 200)
    built = []
    build = BatchBuilder.build

    def build_slowly(self, pack, epoch, cells):
        built.append(pack)
        time.sleep(0.05)
        return build(self, pack, epoch, cells)

    monkeypatch.setattr(BatchBuilder, "build", build_slowly)
    loader = loader_for(corpus, packs=range(10**6), num_workers=3, prefetch=50)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    assert len(built) < 25  # what was waiting is dropped, not built
    assert threading.active_count() == before
    assert next(loader, None) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_surfaces_at_its_batch(num_workers, monkeypatch):
    corpus = corpus_of([40] * 200)
    build = BatchBuilder.build

    def fail_at_five(self, pack, epoch, cells):
        if pack == 5:
            raise OSError("disk gone")
        return build(self, pack, epoch, cells)

    monkeypatch.setattr(BatchBuilder, "build", fail_at_five)
    with loader_for(corpus, num_workers=num_workers) as loader:
        assert [batch.pack for batch in itertools.islice(loader, 5)] == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match=r"disk gone"):
            next(loader)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("bad", "dtype"), [(200, np.uint16), (-1, np.int16), (2**33, np.int64), (65535, np.uint16)])
def test_tokens_outside_the_vocabulary_are_named(packing, bad, dtype):
    corpus = corpus_of([40] * 20)
    corpus.cells[13][17] = bad
    corpus = MemoryCorpus(corpus.cells, token_dtype=np.dtype(dtype))
    message = (
        rf"memory, row 13: token {bad} at position 17 is outside the vocabulary \[0, 200\)"
        r".*data\.vocab_path.*model\.vocab_size"
    )
    with pytest.raises(ValueError, match=message):
        list(loader_for(corpus, packing=packing))


@pytest.mark.parametrize("packing", [True, False])
def test_padding_inside_of_a_cell_is_an_error(packing):
    corpus = corpus_of([40] * 20)
    corpus.cells[13][30:] = OPTIONS["pad_token_id"]
    with pytest.raises(ValueError, match=r"memory, row 13: token \d+ at position 30 is padding.*without it"):
        list(loader_for(MemoryCorpus(corpus.cells), packing=packing))


def test_more_masked_tokens_than_room_is_an_error():
    corpus = corpus_of([40] * 20)
    shape = shape_for(corpus)
    small = BatchShape(shape.token_budget, shape.seq_length, shape.max_cells, 16)
    message = r"pack 0 of epoch 0 has \d+ masked tokens; there is room for 16"
    with pytest.raises(RuntimeError, match=message):
        next(Loader(BatchBuilder(corpus, small, **OPTIONS), stream_for(corpus, small), [0]))


def test_plans_that_do_not_fit_the_corpus_are_refused():
    corpus = corpus_of([40] * 20)
    shape = shape_for(corpus)
    builder = BatchBuilder(corpus, shape, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"pack 3 asks for cell 20, but the corpus has 20 cells"):
        builder.build(3, 0, np.array([1, 20]))
    with pytest.raises(RuntimeError, match=r"pack 3 asks for cell -1"):
        builder.build(3, 0, np.array([-1]))
    with pytest.raises(RuntimeError, match=r"memory, row 6: its length is not the one that pack 3"):
        builder.build(3, 0, np.arange(7))  # 7 x 40 tokens into 256
    with pytest.raises(RuntimeError, match=re.escape(f"room for {shape.max_cells}")):
        builder.build(3, 0, np.zeros(shape.max_cells + 1, np.int64))
    corpus.lengths[2] = 39
    with pytest.raises(RuntimeError, match=r"memory, row 2: its length"):
        builder.build(3, 0, np.array([2]))


def contents(batch):
    """What has the attributes input_ids and labels, in batches of either kind."""
    return batch.parts if isinstance(batch, PackedBatch) else batch


def test_moving_a_batch_keeps_its_parts():
    corpus = corpus_of([40] * 20)
    for packing in (True, False):
        batch = next(loader_for(corpus, packing=packing))
        moved = batch.to("meta", non_blocking=True)
        before, after = (contents(b) for b in (batch, moved))
        assert after.input_ids.device.type == after.labels.device.type == "meta"
        assert after.input_ids.shape == before.input_ids.shape
        assert moved.cells is batch.cells
    packed = next(loader_for(corpus))
    parts = unpack(packed.buffer.clone(), packed.shape)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, packed.parts, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [True, False])
def test_pinned_batches_reach_the_gpu_unharmed(packing):
    """Copies that are still under way keep their host memory, also when the host is far ahead."""
    corpus = corpus_of([60, 64, 13] * 400)
    reference = list(loader_for(corpus, packing=packing, packs=range(200)))
    with loader_for(corpus, packing=packing, packs=range(200), num_workers=2, pin_memory=True) as loader:
        moved = []
        torch.cuda._sleep(10**8)
        for batch in loader:
            assert contents(batch).input_ids.is_pinned()
            moved.append(batch.to("cuda", non_blocking=True))
    for ours, theirs in zip(moved, reference, strict=True):
        assert torch.equal(contents(ours).input_ids.cpu(), contents(theirs).input_ids)
        assert torch.equal(contents(ours).labels.cpu(), contents(theirs).labels)
