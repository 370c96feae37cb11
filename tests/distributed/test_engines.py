"""What the engines do on two ranks, beyond training the same."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model import resolve as resolving
from geneformer_pretrain.training import step as step_module
from geneformer_pretrain.training.step import next_batch
from geneformer_pretrain.training.trainer import Trainer
from tests.tiny import RunWorkers, overrides


def build(rank: int, size: int, given: list[str]) -> Trainer:
    return Trainer(load_config(overrides=given), World(rank, rank, size, torch.device("cpu")))


def graphs_compiled_under_ddp(rank: int, size: int, given: list[str]) -> list[int]:
    """Numbers of random draws in each compiled graph of a step that has any."""
    draws: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        draws.append(sum("randint" in node.name or node.target is torch.randint for node in graph.graph.nodes))
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        build(rank, size, given).fit()
    return [number for number in draws if number]


def test_ddp_does_not_cut_compiled_layers(tmp_path: Path, run_workers: RunWorkers) -> None:
    """Cut at DDP's buckets, here in the middle of a layer, it would draw its dropout in other portions than alone."""
    wide = ("model.hidden_size=256", "model.intermediate_size=512", "model.hidden_dropout_prob=0.1")
    given = overrides(tmp_path, *wide, "training.compile=true", "training.num_train_steps=1")
    # That of the embeddings, and both of a layer.
    assert run_workers(graphs_compiled_under_ddp, 2, given) == [[1, 2]] * 2


def built_with_graphs(rank: int, size: int, given: list[str]) -> dict[str, Any]:
    """Build a trainer that decided for graphs, which only GPUs can carry out."""
    with (
        mock.patch.object(resolving, "use_cuda_graphs", return_value=True),
        mock.patch.object(step_module, "MicroBatchGraphs") as graphs,
    ):
        engine = build(rank, size, given).engine
    reduces = graphs.call_args.kwargs["reduces"]
    return {
        "wrapped": engine.forward_module is not engine.model,
        "divisor": engine.gradient_divisor,
        "reduces": reduces,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_with_graphs_gradients_are_summed_once_and_not_by_ddp(
    tmp_path: Path, run_workers: RunWorkers, size: int
) -> None:
    built = run_workers(built_with_graphs, size, overrides(tmp_path))
    assert built == [{"wrapped": False, "divisor": 1.0, "reduces": size > 1}] * size


def built_by_ranks_that_differ(rank: int, size: int, given: list[str]) -> str:
    with (
        mock.patch.object(resolving, "use_cuda_graphs", return_value=rank == 1),
        pytest.raises(ConfigError) as error,
    ):
        build(rank, size, given)
    return str(error.value)


def test_ranks_that_differ_in_taking_graphs_stop_together(tmp_path: Path, run_workers: RunWorkers) -> None:
    for message in run_workers(built_by_ranks_that_differ, 2, overrides(tmp_path)):
        assert "cuda_graphs is False on rank 0, True on rank 1" in message


def when_gathered(rank: int, size: int, given: list[str]) -> dict[str, list[bool]]:
    """Whether each layer holds whole weights at several moments."""
    trainer = build(rank, size, given)
    layers = list(trainer.engine.model.bert.encoder["layer"])

    def gathered() -> list[bool]:
        return [not any(isinstance(weight, DTensor) for weight in layer.parameters()) for layer in layers]

    with trainer.loader() as loader:
        batch = next_batch(loader, "data.path")
    trainer.step.forward(batch)
    found = {"after a forward": gathered()}
    trainer.engine.reshard()
    found["after an evaluation"] = gathered()
    for is_last in (False, True):
        trainer.step.forward_backward(batch, is_last)
        found[f"after a micro-batch, the last: {is_last}"] = gathered()
    return found


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_weights_stay_gathered_where_asked(tmp_path: Path, run_workers: RunWorkers, reshard: str) -> None:
    given = overrides(tmp_path, "training.use_fsdp2=true", f"training.reshard_after_forward={reshard}")
    stay = [reshard == "false"] * 2
    never = [False, False]
    expected = {
        "after a forward": stay,
        "after an evaluation": never,
        "after a micro-batch, the last: False": stay,
        "after a micro-batch, the last: True": never,
    }
    assert run_workers(when_gathered, 2, given) == [expected] * 2


def descriptions_made_in_a_step(rank: int, size: int, given: list[str]) -> int:
    trainer = build(rank, size, given)
    with trainer.loader() as loader:
        trainer.step.run(loader, 0)
        with mock.patch.object(
            DTensorSpec, "__post_init__", autospec=True, side_effect=DTensorSpec.__post_init__
        ) as made:
            trainer.step.run(loader, 1)
    return made.call_count


def test_steps_describe_no_sharded_tensor_anew(tmp_path: Path, run_workers: RunWorkers) -> None:
    """Each description would stay for ever with torch 2.11: 121 kB of host memory a step of 106m."""
    assert run_workers(descriptions_made_in_a_step, 2, overrides(tmp_path, "training.use_fsdp2=true")) == [0, 0]
