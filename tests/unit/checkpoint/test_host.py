"""Copies of tensors in host memory."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.checkpoint.host import HostBuffers
from geneformer_pretrain.checkpoint.shards import Shards, TensorInfo
from geneformer_pretrain.checkpoint.store import CheckpointStore
from tests.checkpoints import tensors_of

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


def draw_piece(dtype: torch.dtype, shape: list[int], transposed: bool, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return values.t() if transposed and len(shape) == 2 else values


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.booleans()), min_size=1, max_size=8),
    st.booleans(),
    st.integers(0, 99),
)
def test_copies_are_equal_and_lie_apart(kinds: list[tuple[torch.dtype, list[int], bool]], borrow: bool, seed: int):
    pieces = [draw_piece(*kind, seed + number) for number, kind in enumerate(kinds)]
    shards = {
        str(number): Shards(TensorInfo((9, *piece.shape), piece.dtype), {(3, *[0] * piece.ndim): piece})
        for number, piece in enumerate(pieces)
    }
    copied = HostBuffers().copy(shards, borrow=borrow)
    ranges = []
    for (name, copy), piece in zip(copied.items(), pieces, strict=True):
        assert copy.info == shards[name].info
        ((offset, values),) = copy.pieces.items()
        assert offset == (3, *[0] * piece.ndim)
        assert (values.dtype, values.shape, values.is_contiguous()) == (piece.dtype, piece.shape, True)
        assert torch.equal(values.double(), piece.double())
        assert (values.data_ptr() == piece.data_ptr()) == (borrow and piece.is_contiguous()) or not piece.numel()
        if values.numel():
            ranges.append((values.data_ptr(), values.data_ptr() + values.nbytes))
    ranges.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


def test_memory_is_used_again_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last_n=1)
    addresses = []
    for step in (1, 2):
        store.save(step, tensors_of(step), {}, blocking=False)
        store.wait()
        addresses.append(store._host._region.data_ptr())
    assert addresses[0] == addresses[1]
    assert len(store._host._region) >= sum(tensor.nbytes for tensor in tensors_of(0).values())
    store.save(3, tensors_of(3), {})
    assert not len(store._host._region), "a blocking save from host memory needs no copies"


def test_memory_is_asked_for_again_where_it_is_too_small() -> None:
    host = HostBuffers()
    for size in (4, 1000, 3):
        values = torch.arange(size, dtype=torch.float64)
        shards = {"values": Shards(TensorInfo((size,), values.dtype), {(0,): values})}
        copy = host.copy(shards, borrow=False)["values"].pieces[0,]
        assert torch.equal(copy, values)
        assert len(host._region) == math.ceil(8 * size / 64) * 64
