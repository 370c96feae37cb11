"""Parts of a job: cut by cost, shared, joined while they are made, and a folder that goes if nothing was made."""

import errno
import resource
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geneformer_pretrain.errors import OutputError
from geneformer_pretrain.inference.merging import MERGED, Merging
from geneformer_pretrain.inference.merging import write_part as write_part_of
from geneformer_pretrain.inference.parts import (
    CPU_PART_TOKENS,
    Job,
    Lock,
    Part,
    Writer,
    cut,
    part_tokens,
    remove,
    share,
    share_progress,
)
from geneformer_pretrain.inference.phases import Phases


@pytest.mark.parametrize(("size", "name"), [(1, "embed"), (2, "embed, rank 0 of 2")])
def test_progress_of_a_share_names_its_rank(monkeypatch, capsys, size, name):
    monkeypatch.setattr("geneformer_pretrain.console.PLAIN_INTERVAL", 0)
    monkeypatch.setattr("geneformer_pretrain.console.is_terminal", lambda number: False)
    for rank in range(size):
        with share_progress(SimpleNamespace(rank=rank, size=size), 3, "embed", "cell") as progress:
            progress.advance(3)
    printed = capsys.readouterr().err
    assert printed.startswith(f"{name}: 3 of 3 cells")
    assert printed.count("\n") == 1


def test_parts_on_a_cpu_are_a_minute_or_a_thousandth_at_most():
    cpu = torch.device("cpu")
    assert part_tokens(2**28, cpu, 10**8) == CPU_PART_TOKENS
    assert part_tokens(100, cpu, 10**8) == 100
    assert part_tokens(2**28, torch.device("cuda"), 10**8) == 2**28
    assert part_tokens(2**28, cpu, 10**10) == 10**7  # days of work are not thousands of files
    assert part_tokens(2**28, cpu, 10**13) == 2**28


@given(
    costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=60), part_cost=st.floats(1, 500), ranks=st.integers(1, 5)
)
def test_parts_hold_each_cell_once_and_cost_about_the_same(costs, part_cost, ranks):
    parts = cut(np.array(costs), part_cost, ranks)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == len(costs)
    assert all(part.last > part.first for part in parts)
    wanted = sum(costs) / (ranks * max(1, round(sum(costs) / part_cost / ranks)))
    assert max(sum(costs[part.first : part.last]) for part in parts) <= wanted + max(costs) + 1e-6
    shares = [share(parts, rank, ranks) for rank in range(ranks)]
    assert sorted((part for some in shares for part in some), key=lambda part: part.number) == parts


@given(
    copies=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any),
    part_cost=st.floats(1, 500),
    ranks=st.integers(1, 5),
)
def test_copies_are_shared_out_to_one(copies, part_cost, ranks):
    """A part may begin and end within a cell; so ranks differ by no more than a copy for each part."""
    cost = 7.0
    costs = np.array(copies) * cost + 1e-6
    parts = cut(costs, part_cost, ranks, copies=np.array(copies))
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == sum(copies)
    assert all(len(part) > 0 for part in parts)
    rounds = max(1, round(sum(costs) / part_cost / ranks))
    assert max(map(len, parts)) <= sum(copies) / (rounds * ranks) + 1.01


def test_equal_ranks_get_equal_parts():
    costs = np.tile(np.random.default_rng(0).random(7), 4)
    assert [part.last - part.first for part in cut(costs, 1e9, 4)] == [7, 7, 7, 7]


@given(
    costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=60), part_cost=st.floats(1, 500), ranks=st.integers(1, 5)
)
def test_the_last_parts_are_smaller_where_they_are_joined(costs, part_cost, ranks):
    plain, tapering = (cut(np.array(costs), part_cost, ranks, tapers=tapers) for tapers in (False, True))
    assert [part.first for part in tapering] == [0, *(part.last for part in tapering[:-1])]
    assert tapering[-1].last == len(costs)
    rounds = max(1, round(sum(costs) / part_cost / ranks))
    wanted = sum(costs) / (rounds * ranks)
    if rounds * ranks == 1:
        assert tapering == plain
        return
    sizes = [sum(costs[part.first : part.last]) for part in tapering]
    assert max(sizes) <= wanted + max(costs) + 1e-6
    assert sizes[-1] <= wanted / 8 + max(costs) + 1e-6


def test_ranks_have_as_much_to_do_when_parts_become_smaller():
    parts = cut(np.ones(4 * 5 * 80), 80, 4, tapers=True)
    assert [part.last - part.first for part in share(parts, 1, 4)] == [80, 80, 80, 80, 40, 20, 10, 10]
    assert {sum(part.last - part.first for part in share(parts, rank, 4)) for rank in range(4)} == {400}


def write_part(job, part):
    numbers = np.arange(part.first, part.last)
    vectors = np.stack([numbers, -numbers], 1).astype(np.float32)
    write_part_of(job.path(part), pa.table({"cell": numbers}), vectors)


@pytest.fixture
def job(tmp_path):
    (tmp_path / "parts").mkdir()
    return Job(tmp_path / "parts", {}, [Part(number, 3 * number, 3 * number + 3) for number in range(6)])


def test_parts_are_joined_in_order_while_they_are_made(job, tmp_path):
    with Merging(job, tmp_path / "out.parquet"):
        for number in (1, 0, 4, 2):
            write_part(job, job.parts[number])
        merged = job.folder / MERGED
        deadline = time.monotonic() + 20
        while not merged.exists() or merged.stat().st_size < 100:  # those at hand are in it before the last is made
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for number in (5, 3):
            threading.Timer(0.05, write_part, (job, job.parts[number])).start()
    joined = pq.read_table(tmp_path / "out.parquet")
    assert joined["cell"].to_pylist() == list(range(18))
    assert joined["embedding"].to_pylist() == [[number, -number] for number in range(18)]


def test_a_failure_leaves_no_output(job, tmp_path):
    def work():
        with Merging(job, tmp_path / "out.parquet"):
            write_part(job, job.parts[0])
            raise RuntimeError("the device burns")

    with pytest.raises(RuntimeError, match="the device burns"):
        work()
    assert not (tmp_path / "out.parquet").exists()


def test_a_part_that_finds_no_room_says_so(tmp_path):
    path, embeddings = tmp_path / "part.parquet", np.arange(40_000, dtype=np.float32).reshape(-1, 8)
    columns = pa.table({"cell": np.arange(len(embeddings))})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failure:
            write_part_of(path, columns, embeddings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())
    write_part_of(path, columns, embeddings)
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), embeddings)


def test_after_a_failure_the_parts_at_hand_are_not_joined(job, tmp_path, monkeypatch):
    for part in job.parts:
        write_part(job, part)
    begun, failed = threading.Event(), threading.Event()
    plain, joined = pq.ParquetFile.read, []

    def read(self):
        joined.append(self)
        begun.set()
        assert failed.wait(20)
        return plain(self)

    monkeypatch.setattr(pq.ParquetFile, "read", read)

    def work():
        with Merging(job, tmp_path / "out.parquet"):
            assert begun.wait(20)
            threading.Timer(0.2, failed.set).start()
            raise RuntimeError("the device burns")

    with pytest.raises(RuntimeError, match="the device burns"):
        work()
    assert len(joined) == 1


def test_a_part_that_cannot_be_joined_is_an_error_at_once(job, tmp_path):
    def work():
        with Merging(job, tmp_path / "out.parquet") as merging:
            job.path(job.parts[0]).write_text("no parquet")
            while True:
                merging.require_progress()
                time.sleep(0.01)

    with pytest.raises(pa.ArrowInvalid):
        work()
    assert not (tmp_path / "out.parquet").exists()


def test_a_new_folder_goes_unless_something_was_made(tmp_path):
    with Lock(tmp_path / "new"):
        (tmp_path / "new" / "scores").mkdir()
        with pytest.raises(OutputError, match="another process works on it"):
            Lock(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with Lock(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert (tmp_path / "new" / "result").exists()
    (tmp_path / "old").mkdir()
    with Lock(tmp_path / "old"):
        pass
    assert (tmp_path / "old").exists()


def test_phases():
    phases = Phases()
    time.sleep(0.02)
    phases.end("warm-up")
    phases.end("forward")
    assert phases.total("warm-up", "forward") >= 0.02
    assert set(phases.values) == {"warm_up_seconds", "forward_seconds"}
    assert phases.line.startswith("Seconds: warm-up 0.0, forward 0.0")


def test_forward_passes_end_together_and_what_each_rank_took_is_kept():
    phases = Phases()
    ranks = SimpleNamespace(size=2, gather=lambda own: (time.sleep(0.05), [own, (own[0] + 0.05, 0.3, 2.0)])[1])
    phases.end_forward(ranks, packs=0.7, writing=0.0)
    own, other = phases.values["forward_seconds_of_ranks"]
    assert own < other <= phases.total("forward")
    assert (phases.values["waited_for_packs_seconds"], phases.values["waited_for_writing_seconds"]) == (0.7, 2.0)
    assert phases.line == (
        "Seconds: forward 0.1 (ranks 0.0 to 0.1). Forward passes waited 0.7 for packs and 2.0 for writing at most."
    )


def test_waiting_for_the_write_before_is_counted():
    with Writer() as writer:
        writer.write(lambda: time.sleep(0.05))
        assert writer.waited < 0.04
        writer.write(lambda: time.sleep(0.05))
        first = writer.waited
        assert first > 0.04
    assert writer.waited > first + 0.04


def test_a_folder_is_deleted_and_of_a_link_only_the_link(tmp_path):
    results, link = tmp_path / "results", tmp_path / "link"
    (results / "deep").mkdir(parents=True)
    for number in range(30):
        (results / f"part-{number}.npy").touch()
    link.symlink_to(results)
    remove(link)
    assert not link.is_symlink()
    assert len(list(results.iterdir())) == 31
    remove(results)
    assert not results.exists()
    remove(results)  # gone already
