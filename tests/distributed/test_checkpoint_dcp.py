"""Checkpoints of several ranks: sharded and whole, across world sizes, and faults on one rank only."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from geneformer_pretrain.checkpoint.formats import FullFormat, ShardedFormat
from geneformer_pretrain.checkpoint.manifest import read_manifest
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
    load_all(rank, world_size, directory, [8, 9])
    store = CheckpointStore(directory, keep_last_n=9)
    store.save(10, whole_tensors(10), {"ranks": world_size}, "full")
    store.save(11, distributed(whole_tensors(11)), {"ranks": world_size}, "sharded")
    live = distributed(whole_tensors(12), turned=True)
    store.save(12, live, {"ranks": world_size}, "sharded", blocking=False)
    for tensor in live.values():
        tensor.zero_()
    store.wait()


def test_any_checkpoint_on_any_number_of_ranks(tmp_path: Path, run_workers: RunWorkers) -> None:
    """1 -> 2 -> 1 -> 3 ranks, both formats into both kinds of tensors."""
    directory = tmp_path / "run"
    store = CheckpointStore(directory, keep_last_n=9)
    store.save(8, whole_tensors(8), {}, "full")
    store.save(9, whole_tensors(9), {}, "sharded")
    run_workers(load_and_save, 2, directory)
    for step in (10, 11, 12):
        manifest = read_manifest(directory / f"step_{step}")
        assert (manifest["world_size"], manifest["state"]) == (2, {"ranks": 2})
        targets = zeros()
        store.load(directory / f"step_{step}", targets)
        assert_equal(targets, step)
    assert "__1_0.distcp" in read_manifest(directory / "step_12")["files"]
    store.save(13, whole_tensors(13), {}, "full")
    store.save(14, whole_tensors(14), {}, "sharded")
    run_workers(load_all, 3, directory, [10, 11, 12, 13, 14])


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
    store.save(1, tensors, {}, "sharded")

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in range(world_size):
        for blocking in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if rank == broken:
                    patch.setattr(torch, "save", full_disk)

                def save(blocking: bool = blocking) -> None:
                    store.save(2, tensors, {}, "sharded", blocking=blocking)
                    store.wait()

                message = raises(CheckpointSaveError, save)
            assert f"rank {broken}: OSError: [Errno 28] No space left on device" in message
            assert f"rank {1 - broken}" not in message
            dist.barrier()  # rank 0 cleans up after it has told the others
            assert folder_names(directory) == ["step_1"]
    # Rank 0 alone writes this format; a fault before any file, on the rank that writes none, counts as well.
    message = raises(
        CheckpointSaveError, lambda: store.save(2, whole_tensors(2), {"x": object()} if rank else {}, "full")
    )
    assert message.startswith("rank 1: TypeError")
    message = raises(CheckpointSaveError, lambda: store.save(2, distributed(whole_tensors(2)), {}, "full"))
    assert "is sharded over several ranks" in message
    message = raises(CheckpointSaveError, lambda: store.save(2 + rank, tensors, {}, "sharded"))
    assert "[2, 3]" in message
    dist.barrier()
    assert folder_names(directory) == ["step_1"]
    store.save(2, distributed(whole_tensors(2)), {}, "sharded")
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

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "__version__", "0.4")
        message = raises(CheckpointError, lambda: CheckpointStore(base / "run", keep_last_n=1))
        assert "ranks [1] differ from rank 0 in torch version" in message

    store = CheckpointStore(base / "run", keep_last_n=2)
    for step in (1, 2):
        store.save(step, distributed(whole_tensors(step)), {}, "sharded")

    # A rank that sees an old state of the folder, as network file systems may show it.
    if rank == 1:
        store._folders = lambda: [base / "run" / "step_1"]  # type: ignore[method-assign]
    message = raises(CheckpointError, store.find_latest)
    assert "ranks [1] differ from rank 0 in the checkpoints they see" in message

    store = CheckpointStore(base / "run", keep_last_n=2)
    targets = distributed(zeros())
    message = raises(CheckpointError, lambda: store.load(base / "run" / f"step_{1 + rank}", targets))
    assert "ranks [1] differ from rank 0 in the checkpoint to load" in message

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


def killed_in_a_save(rank: int, world_size: int, directory: Path, format: str, killed: int) -> None:
    store = CheckpointStore(directory, keep_last_n=1)
    tensors = distributed(whole_tensors(1)) if format == "sharded" else whole_tensors(1)
    store.save(1, tensors, {}, format)
    dist.barrier()
    kind: type = {"full": FullFormat, "sharded": ShardedFormat}[format]
    write = kind.write

    def write_and_die(*args: object) -> list[str]:
        names: list[str] = write(*args)
        if rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return names

    kind.write = write_and_die  # type: ignore[attr-defined]
    store.save(2, tensors, {}, format, blocking=False)
    try:
        store.wait()
    except RuntimeError:
        os._exit(0)  # as it should be: the peer is gone, and the others do not wait for it
    raise AssertionError("the save of a killed rank succeeded")


@pytest.mark.parametrize(("format", "killed"), [("sharded", 0), pytest.param("full", 1, marks=pytest.mark.slow)])
def test_a_rank_killed_inside_a_save(tmp_path: Path, run_workers: RunWorkers, format: str, killed: int) -> None:
    directory = tmp_path / "run"
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_workers(killed_in_a_save, 2, directory, format, killed)
    assert folder_names(directory) == ["step_1", "step_2.tmp"]
    store = CheckpointStore(directory, keep_last_n=1)
    assert folder_names(directory) == ["step_1"]
    assert store.find_latest() == directory / "step_1"
    targets = zeros()
    store.load(directory / "step_1", targets)
    assert_equal(targets, 1)
