"""Checkpoints of several ranks: sharded, uneven and whole, across world sizes, and faults on one rank only."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from geneformer_pretrain.checkpoint import formats
from geneformer_pretrain.checkpoint import store as checkpoint
from geneformer_pretrain.checkpoint.manifest import read_manifest
from geneformer_pretrain.checkpoint.shards import Shards, TensorInfo
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.errors import CheckpointError, CheckpointSaveError
from tests.tiny import RunWorkers

# Names end in the dimension to shard; "even", "uneven" and "one" (an empty shard on rank 1) over two ranks.
SHAPES = {"even_0": (4, 3), "uneven_0": (5, 2), "one_0": (1, 3), "even_1": (3, 6), "uneven_1": (2, 7)}


def whole_tensors(step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint of `step` holds, whole."""
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["half_0"] = torch.randn(9, generator=generator).bfloat16()
    tensors["replicated"] = torch.randn(3, generator=generator)
    tensors["optimizer.step"] = torch.tensor(float(step))
    tensors["rng.cpu"] = torch.randint(0, 256, (11,), generator=generator, dtype=torch.uint8)
    return tensors


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in whole_tensors(0).items()}


def distributed(tensors: dict[str, torch.Tensor], turned: bool = False) -> dict[str, torch.Tensor]:
    """Shard as FSDP2 does, or along the other dimension if `turned`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name == "replicated":
            result[name] = distribute_tensor(tensor, mesh, [Replicate()])
        elif name[-2:] in ("_0", "_1"):
            dim = int(name[-1])
            result[name] = distribute_tensor(tensor, mesh, [Shard((dim + turned) % tensor.ndim)])
    return result


def assert_equal(got: dict[str, torch.Tensor], step: int) -> None:
    for name, expected in whole_tensors(step).items():
        tensor = got[name]
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def untouched(targets: dict[str, torch.Tensor]) -> bool:
    return all(not (t.to_local() if isinstance(t, DTensor) else t).any() for t in targets.values())


def load_all(rank: int, world_size: int, directory: Path, steps: list[int]) -> None:
    store = CheckpointStore(directory, keep_last_n=9)
    assert store.find_latest() == directory / f"step_{max(steps)}"
    for step in steps:
        plain = zeros()
        for targets in (plain, distributed(zeros()), distributed(zeros(), turned=True)):
            store.load(directory / f"step_{step}", targets)
            assert_equal(targets, step)


def load_and_save(rank: int, world_size: int, directory: Path) -> None:
    load_all(rank, world_size, directory, [9])
    store = CheckpointStore(directory, keep_last_n=9)
    store.save(10, whole_tensors(10), {"ranks": world_size})
    store.save(11, distributed(whole_tensors(11)), {"ranks": world_size})
    live = distributed(whole_tensors(12), turned=True)
    store.save(12, live, {"ranks": world_size}, blocking=False)
    for tensor in live.values():
        tensor.zero_()
    store.wait()


def test_any_checkpoint_on_any_number_of_ranks(tmp_path: Path, run_workers: RunWorkers) -> None:
    """1 -> 2 -> 1 -> 3 ranks, plain and sharded tensors into both kinds."""
    directory = tmp_path / "run"
    store = CheckpointStore(directory, keep_last_n=9)
    store.save(9, whole_tensors(9), {})
    run_workers(load_and_save, 2, directory)
    for step in (10, 11, 12):
        manifest = read_manifest(directory / f"step_{step}")
        assert (manifest["world_size"], manifest["state"]) == (2, {"ranks": 2})
        targets = zeros()
        store.load(directory / f"step_{step}", targets)
        assert_equal(targets, step)
        assert list(manifest["files"]) == ["rank_0.safetensors", "rank_1.safetensors"]
        saved = sum(file["size"] for file in manifest["files"].values())
        assert saved < 10_000, "each element is saved once"
    store.save(13, whole_tensors(13), {})
    run_workers(load_all, 3, directory, [10, 11, 12, 13])


def hybrid_pieces(rank: int, world_size: int) -> list[list[str]]:
    """Names of the pieces that each of 4 ranks, 2 replicas of 2 shards, saves."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found: list[str] = []
    for number in range(20):
        name = f"tensor_{number}"
        tensor = distribute_tensor(torch.arange(6.0), mesh, [Replicate(), Shard(0)])
        shards = Shards.to_save(name, tensor, rank, world_size)
        found += [f"{name}@{offset[0]}" for offset in shards.pieces]
        plain = Shards.to_save(f"plain_{number}", torch.ones(2), rank, world_size)
        found += [f"plain_{number}" for _ in plain.pieces]
    gathered: list[list[str]] = [[]] * world_size
    dist.all_gather_object(gathered, found)
    return gathered


def test_replicas_share_the_saving_and_nothing_is_saved_twice(run_workers: RunWorkers) -> None:
    by_rank = run_workers(hybrid_pieces, 4)[0]
    everything = [piece for pieces in by_rank for piece in pieces]
    assert len(everything) == len(set(everything)) == 20 * 2 + 20
    assert all(len(pieces) > 8 for pieces in by_rank)


# Pieces that no placement describes: rows cut anywhere, as Megatron-FSDP's flat buffers do; rank 2 of 3 has nothing.
CUTS: list[dict[tuple[int, ...], tuple[int, ...]]] = [
    {(0, 0): (3, 4), (3, 0): (1, 2)},
    {(3, 2): (1, 2), (4, 0): (3, 4)},
    {},
]


def pieces_of(whole: torch.Tensor, rank: int) -> Shards:
    pieces = {
        (row, column): whole[row : row + rows, column : column + columns].clone()
        for (row, column), (rows, columns) in CUTS[rank].items()
    }
    return Shards(TensorInfo(tuple(whole.shape), whole.dtype), pieces)


def test_uneven_pieces_and_ranks_without_any(tmp_path: Path) -> None:
    """Written by three ranks, read whole, cut the same way, and cut another way."""
    whole = {"a": torch.randn(7, 4), "b": torch.randn(7, 4).bfloat16(), "step": torch.tensor(3.0)}
    files = []
    for rank in range(3):
        held = {name: pieces_of(tensor, rank) for name, tensor in whole.items() if tensor.ndim}
        if rank == 1:
            held["step"] = Shards.of("step", whole["step"])
        files += formats.write_tensors(tmp_path, rank, held)
    assert files == ["rank_0.safetensors", "rank_1.safetensors"]
    saved = formats.open_tensors(tmp_path, {"format_version": 2, "files": dict.fromkeys(files)})
    assert {name: str(stored.info) for name, stored in saved.items()} == {
        "a": "float32[7, 4]",
        "b": "bfloat16[7, 4]",
        "step": "float32[]",
    }
    for name, tensor in whole.items():
        target = torch.zeros_like(tensor)
        saved[name].require_all(name, Shards.of(name, target))
        saved[name].copy_to(name, Shards.of(name, target))
        assert torch.equal(target, tensor)
    for rank in range(3):
        target = pieces_of(torch.zeros(7, 4), rank)
        saved["a"].copy_to("a", target)
        for offset, piece in pieces_of(whole["a"], rank).pieces.items():
            assert torch.equal(target.pieces[offset], piece)
    column = Shards(TensorInfo((7, 4), torch.float32), {(1, 1): torch.zeros(5, 2)})
    saved["a"].copy_to("a", column)
    assert torch.equal(column.pieces[1, 1], whole["a"][1:6, 1:3])
    half = {"a": saved["a"].pieces[:1]}
    with pytest.raises(ValueError, match="12 of the 28 elements of a"):
        type(saved["a"])(saved["a"].info, half["a"]).require_all("a", Shards.of("a", whole["a"]))


def raises(kind: type[Exception], action: Callable[[], object]) -> str:
    """Return the message of the error that `action` raises."""
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def folder_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def failing_rank(rank: int, world_size: int, directory: Path) -> None:
    """One rank's disk is full: all ranks raise, name it, keep the old checkpoint and can go on."""
    store = CheckpointStore(directory, keep_last_n=1)
    tensors = distributed(whole_tensors(1))
    store.save(1, tensors, {})

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in range(world_size):
        for blocking in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if rank == broken:
                    patch.setattr(formats, "write_safetensors", full_disk)

                def save(blocking: bool = blocking) -> None:
                    store.save(2, tensors, {}, blocking=blocking)
                    store.wait()

                message = raises(CheckpointSaveError, save)
            assert f"rank {broken}: OSError: [Errno 28] No space left on device" in message
            assert f"rank {1 - broken}" not in message
            dist.barrier()  # rank 0 cleans up after it has told the others
            assert folder_names(directory) == ["step_1"]
    # A fault before any file counts as well.
    message = raises(CheckpointSaveError, lambda: store.save(2, whole_tensors(2), {"x": object()} if rank else {}))
    assert message.startswith("rank 1: TypeError")
    message = raises(CheckpointSaveError, lambda: store.save(2 + rank, tensors, {}))
    assert "[2, 3]" in message
    dist.barrier()
    assert folder_names(directory) == ["step_1"]
    store.save(2, distributed(whole_tensors(2)), {})
    dist.barrier()
    assert folder_names(directory) == ["step_2"]
    targets = distributed(zeros())
    store.load(directory / "step_2", targets)
    assert_equal(targets, 2)


def test_an_error_on_one_rank_is_everyones(tmp_path: Path, run_workers: RunWorkers) -> None:
    run_workers(failing_rank, 2, tmp_path / "run")


def mismatches(rank: int, world_size: int, base: Path) -> None:
    message = raises(CheckpointError, lambda: CheckpointStore(base / f"of_rank_{rank}", keep_last_n=1))
    assert f"rank 1: training.checkpoint_dir: {base}/of_rank_1 is not the folder" in message
    assert f"rank 0 sees as {base}/of_rank_0." in message
    assert not (base / "of_rank_1").exists()

    store = CheckpointStore(base / "run", keep_last_n=2)
    for step in (1, 2):
        store.save(step, distributed(whole_tensors(step)), {})

    # A rank that sees an old state of the folder, as network file systems may show it.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checkpoint, "step_folders", lambda directory: [directory / "step_1"])
        message = raises(CheckpointError, store.find_latest)
    assert "step_2 is " in message
    assert "None on rank 1" in message

    store = CheckpointStore(base / "run", keep_last_n=2)
    targets = distributed(zeros())
    message = raises(CheckpointError, lambda: store.load(base / "run" / f"step_{1 + rank}", targets))
    assert "checkpoint step_1 is " in message

    if rank == 1:
        del targets["replicated"]
    message = raises(CheckpointError, lambda: store.load(base / "run" / "step_2", targets))
    assert message.startswith("rank 1: ")
    assert "replicated is in the checkpoint only" in message
    assert untouched(targets)

    # Each file is read by one rank only, so the one that finds the damage has to tell the others.
    for file in sorted(read_manifest(base / "run" / "step_2")["files"]):
        path = base / "run" / "step_2" / file
        dist.barrier()
        if rank == 0:
            content = path.read_bytes()
            path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        dist.barrier()
        # The first has verified this checkpoint when it loaded it, the second never saw it.
        for opened in (store, CheckpointStore(base / "run", keep_last_n=2)):
            assert opened.find_latest() == base / "run" / "step_1"
            targets = distributed(zeros())
            message = raises(CheckpointError, lambda o=opened, t=targets: o.load(base / "run" / "step_2", t))  # type: ignore[misc]
            assert f"{file} is not what was written" in message
            assert untouched(targets)
        dist.barrier()
        if rank == 0:
            path.write_bytes(content)
        dist.barrier()
        assert store.find_latest() == base / "run" / "step_2"


def test_ranks_that_disagree_stop_together(tmp_path: Path, run_workers: RunWorkers) -> None:
    run_workers(mismatches, 2, tmp_path)


def killed_in_a_save(rank: int, world_size: int, directory: Path, kind: str, killed: int) -> None:
    store = CheckpointStore(directory, keep_last_n=1)
    tensors = distributed(whole_tensors(1)) if kind == "sharded" else whole_tensors(1)
    store.save(1, tensors, {})
    dist.barrier()
    write = checkpoint.write_tensors

    def write_and_die(*args: Any) -> list[str]:
        names = write(*args)
        if rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return names

    checkpoint.write_tensors = write_and_die
    store.save(2, tensors, {}, blocking=False)
    try:
        store.wait()
    except RuntimeError:
        os._exit(0)  # as it should be: the peer is gone, and the others do not wait for it
    raise AssertionError("the save of a killed rank succeeded")


@pytest.mark.parametrize(("kind", "killed"), [("sharded", 0), pytest.param("plain", 1, marks=pytest.mark.slow)])
def test_a_rank_killed_inside_a_save(tmp_path: Path, run_workers: RunWorkers, kind: str, killed: int) -> None:
    directory = tmp_path / "run"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_workers(killed_in_a_save, 2, directory, kind, killed)
    assert folder_names(directory) == ["step_1", "step_2.tmp"]
    store = CheckpointStore(directory, keep_last_n=1)
    assert folder_names(directory) == ["step_1"]
    assert store.find_latest() == directory / "step_1"
    targets = zeros()
    store.load(directory / "step_1", targets)
    assert_equal(targets, 1)
