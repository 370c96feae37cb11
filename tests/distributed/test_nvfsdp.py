"""The engine nvFSDP on CPUs: megatron-fsdp itself over gloo, with streams that do nothing."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.model import resolve as resolving
from geneformer_pretrain.training.step import next_batch
from geneformer_pretrain.training.trainer import Trainer
from tests.tiny import RunWorkers, overrides, read_metrics

layout = pytest.importorskip("megatron_fsdp.experimental.layout")

NVFSDP, FSDP2, BF16 = "training.use_nvfsdp=true", "training.use_fsdp2=true", "training.compute_dtype=bfloat16"
KEPT, AGAIN = "training.reshard_after_forward=false", "training.reshard_after_forward=true"


class NoStream:
    """A stream of a device that has one alone."""

    device = torch.device("cpu")

    def __init__(self, *_: Any) -> None:
        """Make nothing."""

    def wait_stream(self, _: Any) -> None:
        """Wait for nothing."""

    wait_event = wait_stream

    def record_event(self) -> "NoStream":
        """Return something to wait for."""
        return self


def averaged(collective: Any) -> Any:
    """Let gloo average, which it refuses to do itself."""

    @functools.wraps(collective)
    def call(*tensors: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **named: Any) -> None:
        averages = op == dist.ReduceOp.AVG
        collective(*tensors, op=dist.ReduceOp.SUM if averages else op, group=group, **named)
        if averages:
            named.get("output", tensors[0] if tensors else None).div_(dist.get_world_size(group))

    return call


def gather_uneven(found: list[Tensor], mine: Tensor, group: Any = None) -> None:
    """Gather tensors of several sizes, which gloo does not do itself."""
    parts: list[Any] = [None] * len(found)
    dist.all_gather_object(parts, mine, group=group)
    for target, part in zip(found, parts, strict=True):
        target.copy_(part)


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Give megatron-fsdp what it asks of CUDA, and let the CPU pass for a machine that can run it."""
    nothing = mock.Mock()
    with contextlib.ExitStack() as stack:
        for name, stub in {
            "Stream": NoStream,
            "current_stream": NoStream,
            "stream": lambda _: contextlib.nullcontext(),
            "device": lambda _: contextlib.nullcontext(),
            "nvtx": nothing,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for name in ("all_reduce", "reduce_scatter_tensor"):
            stack.enter_context(mock.patch.object(dist, name, averaged(getattr(dist, name))))
        stack.enter_context(mock.patch.object(dist, "all_gather", gather_uneven))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", NoStream.wait_stream))
        stack.enter_context(mock.patch.object(resolving, "check_machine", nothing))
        yield


def build(rank: int, size: int, given: list[str]) -> Trainer:
    return Trainer(load_config(overrides=given), World(rank, rank, size, torch.device("cpu")))


def train_all(rank: int, size: int, runs: list[list[str]]) -> None:
    with without_cuda():
        for given in runs:
            assert build(rank, size, given).fit()


def run_of(folder: Path, name: str, *more: str) -> list[str]:
    common = [
        "training.gradient_accumulation_steps=2",
        "training.num_train_steps=6",
        "training.learning_rate=3e-3",
        "training.lr_schedule=constant",
        "training.validate_every_n_steps=2",
        "data.validation_fraction=0.2",
        f"training.checkpoint_dir={folder / name}",
    ]
    return [*overrides(folder, *common), *more]


def assert_equal_losses(found: Path, wanted: Path) -> None:
    """To the last bits: what differs is the order in which the squares of the gradients are summed."""
    pairs = list(zip(read_metrics(found), read_metrics(wanted), strict=True))
    assert len(pairs) == 6
    for one, other in pairs:
        for key in {"loss", "grad_norm", "validation_loss"} & other.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-6), (key, one["step"])


def test_losses_are_those_of_fsdp2(tmp_path: Path, run_workers: RunWorkers) -> None:
    """With weights in BF16 or FP32, gathered once or twice; and where one goes on from the other's checkpoint."""
    first = "training.num_train_steps=3"
    runs = [
        run_of(tmp_path, "fp32", FSDP2),
        run_of(tmp_path, "fp32_again", NVFSDP, AGAIN),
        run_of(tmp_path, "bf16", FSDP2, BF16),
        run_of(tmp_path, "bf16_again", NVFSDP, BF16, AGAIN),
        run_of(tmp_path, "bf16_kept", NVFSDP, BF16, KEPT),
        run_of(tmp_path, "bf16_resumed", FSDP2, BF16, first),
        run_of(tmp_path, "bf16_resumed", NVFSDP, BF16, KEPT),
    ]
    run_workers(train_all, 2, runs, timeout=250)
    for name in ("fp32_again", "bf16_again", "bf16_kept", "bf16_resumed"):
        assert_equal_losses(tmp_path / name, tmp_path / name.partition("_")[0])
    assert read_metrics(tmp_path / "bf16")[-1]["loss"] != read_metrics(tmp_path / "fp32")[-1]["loss"]


def test_losses_in_two_groups_are_those_of_fsdp2(tmp_path: Path, run_workers: RunWorkers) -> None:
    groups = [BF16, "training.shard_group_size=2"]
    run_workers(
        train_all,
        4,
        [run_of(tmp_path, "fsdp2", FSDP2, *groups), run_of(tmp_path, "nvfsdp", NVFSDP, *groups, KEPT)],
        timeout=250,
    )
    assert_equal_losses(tmp_path / "nvfsdp", tmp_path / "fsdp2")


def weights_at_each_stage(rank: int, size: int, given: list[str]) -> dict[str, bool]:
    """Whether main weights are the initial ones, and those of the forward the same in BF16, after several events."""
    found: dict[str, bool] = {}
    with without_cuda():
        exact = dict(build(rank, size, [*given, FSDP2]).engine.model.canonical_parameters())
        trainer = build(rank, size, [*given, NVFSDP, BF16, KEPT])
        engine, model = trainer.engine, trainer.engine.model
        main = {name: engine.gather_full(p.detach()) for name, p in model.canonical_parameters()}
        found["main weights are initialized in FP32"] = all(
            torch.equal(main[name], parameter.detach().full_tensor()) for name, parameter in exact.items()
        )

        def forward_uses_main_weights() -> bool:
            main = {name: engine.gather_full(p.detach()) for name, p in model.canonical_parameters()}
            trainer.step.forward(batch)
            used = {name: parameter.detach().clone() for name, parameter in model.canonical_parameters()}
            engine.reshard()
            return all(
                values.dtype == torch.bfloat16 and torch.equal(values, main[name].bfloat16())
                for name, values in used.items()
            )

        with trainer.loader() as loader:
            batch = next_batch(loader, "data.path")
            found["before a step"] = forward_uses_main_weights()
            trainer.step.run(loader, 0)
        found["after a step"] = forward_uses_main_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().mul_(1.5)
        found["changed and not pushed"] = forward_uses_main_weights()
        with pytest.raises(TrainingError, match=r"use_nvfsdp=True: the torch.bfloat16 weights .*use_fsdp2=True"):
            engine.require_pushed()
        engine.push_weights()
        engine.require_pushed()
        found["changed and pushed"] = forward_uses_main_weights()
    return found


def test_forward_uses_the_main_weights_in_bf16(tmp_path: Path, run_workers: RunWorkers) -> None:
    expected = {
        "main weights are initialized in FP32": True,
        "before a step": True,
        "after a step": True,
        "changed and not pushed": False,
        "changed and pushed": True,
    }
    assert run_workers(weights_at_each_stage, 2, overrides(tmp_path)) == [expected] * 2


def descriptions_made_in_a_step(rank: int, size: int, given: list[str]) -> list[int]:
    """Number of sharded tensors and of buffers that the second step describes."""
    with without_cuda():
        trainer = build(rank, size, given)
        with trainer.loader() as loader, contextlib.ExitStack() as stack:
            trainer.step.run(loader, 0)
            made = [
                stack.enter_context(
                    mock.patch.object(kind, "__post_init__", autospec=True, side_effect=kind.__post_init__)
                )
                for kind in (DTensorSpec, layout.GlobalLayout)
            ]
            trainer.step.run(loader, 1)
    return [calls.call_count for calls in made]


def test_steps_describe_no_sharded_tensor_anew(tmp_path: Path, run_workers: RunWorkers) -> None:
    given = overrides(tmp_path, NVFSDP, BF16, KEPT)
    assert run_workers(descriptions_made_in_a_step, 2, given) == [[0, 0]] * 2


def graphs_compiled(rank: int, size: int, runs: list[list[str]]) -> list[int]:
    """Number of graphs that each of several runs compiles."""
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        found[-1] += 1
        return graph.forward

    with without_cuda(), mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        for given in runs:
            torch._dynamo.reset()
            found.append(0)
            build(rank, size, given).fit()
    return found


def test_layers_share_compiled_code(tmp_path: Path, run_workers: RunWorkers) -> None:
    """For which they have to be of one class; megatron-fsdp makes a class for each."""
    common = [NVFSDP, BF16, "training.compile=true", "training.num_train_steps=1"]
    runs = [
        run_of(tmp_path, "few", *common, AGAIN, "model.num_hidden_layers=2"),
        run_of(tmp_path, "many", *common, AGAIN, "model.num_hidden_layers=5"),
        run_of(tmp_path, "kept", *common, KEPT, "model.num_hidden_layers=5"),
    ]
    for counts in run_workers(graphs_compiled, 2, runs, timeout=250):
        assert counts[0] > 0
        assert counts == counts[:1] * 3
