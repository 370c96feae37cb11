"""Starts that fail, on one rank or on all: every rank ends soon, and one of each node says why."""

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed import rendezvous
from geneformer_pretrain.training import main as train
from tests.faults.results import ENDLESS
from tests.tiny import make_cells, overrides, read_exit, write_parquet

WRONG = ("training.seed=abc",)
SAID = "Configuration key training.seed: Value 'abc'"


def on_a_node_each(rank: int) -> None:
    os.environ.update(GROUP_RANK=str(rank), LOCAL_RANK="0")


def never_come(rank: int, absent: int) -> None:
    rendezvous.RENDEZVOUS_TIMEOUT = timedelta(seconds=2)
    if rank == absent:
        os._exit(0)


def last_never_comes(rank: int) -> None:
    rendezvous.GRACE = timedelta(seconds=2)
    if rank == 2:
        os._exit(0)


def too_few_gpus(rank: int) -> None:
    if rank == 1:
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1


def no_such_network(rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "nonsense"


def told_in_part(rank: int) -> None:
    del os.environ["RANK"]


def unreadable(rank: int) -> None:
    def refuse(*_: Any, **__: Any) -> Config:
        raise PermissionError("not for you")

    if rank == 1:
        train.load_config = refuse


def errors(process: Any, rank: int = 0) -> list[str]:
    """What a rank says of the end of the run; a slow start may bring warnings besides."""
    return [line for line in process.output(rank).splitlines() if line.startswith("Error: ")]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_option_on_one_rank_ends_all(tmp_path: Path, start: Any, wrong: int) -> None:
    more = [WRONG if rank == wrong else () for rank in range(2)]
    process = start(overrides(tmp_path), 2, more=more)
    assert process.wait() == [1, 1]
    assert process.output().startswith(f"Error: rank {wrong}: {SAID}")
    assert len(errors(process)) == 1
    assert not errors(process, 1)
    assert not (tmp_path / "run").exists()


def test_each_node_says_why(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, on_a_node_each, more=[(), WRONG])
    assert process.wait() == [1, 1]
    for rank in range(2):
        assert process.output(rank).startswith(f"Error: rank 1: {SAID}")
        assert len(errors(process, rank)) == 1


def test_a_node_with_too_few_gpus_ends_all(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, too_few_gpus)
    assert process.wait() == [1, 1]
    assert process.output().startswith("Error: rank 1: Local rank 1 has no GPU: this node has 1. ")


def test_a_mistake_of_all_names_no_rank(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path, *WRONG), 2)
    assert process.wait() == [1, 1]
    assert process.output().startswith(f"Error: {SAID}")
    assert not errors(process, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.attention_kernel=triton"], "model.attention_kernel=triton needs a GPU"),
        (["training.cuda_graphs=true"], "training.cuda_graphs=true needs a GPU"),
        (["training.use_fsdp2=true", "training.shard_group_size=3"], "training.shard_group_size=3 does not divide"),
    ],
)
def test_what_cannot_be_built_is_told_before_a_corpus_is_read(
    tmp_path: Path, start: Any, given: list[str], said: str
) -> None:
    process = start(overrides(tmp_path, *given), 2)
    assert process.wait() == [1, 1]
    (error,) = errors(process)
    assert said in error
    assert not errors(process, 1)
    assert not (tmp_path / "cache").exists()


def test_what_one_rank_may_not_read_ends_all(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, unreadable)
    assert process.wait() == [1, 1]
    assert errors(process) == ["Error: rank 1: not for you"]


def test_a_network_that_is_not_there_is_named(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, no_such_network)
    assert process.wait() == [1, 1]
    (message,) = errors(process)
    assert message.startswith("Error: rank 0 cannot connect to the others: ")
    assert "nonsense" in message
    assert "GLOO_SOCKET_IFNAME" in message


@pytest.mark.parametrize("more", [(), WRONG], ids=["", "with a mistake, which comes first"])
def test_an_environment_of_half_a_launcher(tmp_path: Path, start: Any, more: tuple[str, ...]) -> None:
    process = start(overrides(tmp_path, *more), 2, told_in_part)
    assert process.wait() == [1, 1]
    (message,) = errors(process)
    assert (SAID if more else "RANK is not set in this process's environment: start with torchrun") in message


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path), 2, partial(never_come, absent=1))
    assert process.wait() == [1, 0]
    assert "Error: rank 1 of 2 did not come within" in process.output()
    assert "Traceback" not in process.output()


def test_a_mistake_is_told_without_waiting_for_all(tmp_path: Path, start: Any) -> None:
    """A rank that has made none would have waited for minutes."""
    process = start(overrides(tmp_path), 3, last_never_comes, more=[(), WRONG, ()])
    assert process.wait() == [1, 1, 0]
    for rank in range(2):
        (message,) = errors(process, rank)
        assert message.startswith(f"Error: rank 1: {SAID}")


def test_a_start_that_fails_leaves_no_earlier_end(tmp_path: Path, start: Any) -> None:
    """A job script would take it for the outcome; the end of a run that is under way is not spoilt."""
    given, run = overrides(tmp_path), tmp_path / "run"
    start(given, 2).complete()
    assert read_exit(run)["reason"] == "completed"
    assert start(given, 2, more=[(), WRONG]).wait() == [1, 1]
    told = read_exit(run)
    assert (told["reason"], told["exit_code"], told["rank"]) == ("error", 1, 0)
    assert told["error"].startswith(f"ConfigError: rank 1: {SAID}")
    assert sorted(path.name for path in run.glob(".*")) == []

    running = start([*overrides(tmp_path, *ENDLESS), "training.resume_from_checkpoint=false"], 2)
    running.wait_for_training()
    assert start([*given, *WRONG], 2).wait() == [1, 1]
    assert not (run / "exit.json").exists()
    running.send(0, signal.SIGTERM)
    assert running.wait() == [75, 75]
    assert read_exit(run)["reason"] == "signal"


@pytest.mark.parametrize("missing", ["data.path", "data.validation_path", "data.vocab_path"])
def test_files_that_one_rank_does_not_see(tmp_path: Path, start: Any, missing: str) -> None:
    """Rank 0 has a corpus to convert, and must not be waited for in vain."""
    homes = [tmp_path / "home0", tmp_path / "home1"]
    given = overrides(tmp_path, "data.path=cells.parquet", "data.validation_path=held_out.parquet")
    tokens = ["<pad>", "<mask>", *(f"gene_{number}" for number in range(2, 101))]
    for home in homes:
        write_parquet(home / "cells.parquet", make_cells(60))
        write_parquet(home / "held_out.parquet", make_cells(20, seed=1))
        (home / "vocab.txt").write_text("\n".join(tokens) + "\n")
    files = {"data.path": "cells.parquet", "data.validation_path": "held_out.parquet", "data.vocab_path": "vocab.txt"}
    (homes[1] / files[missing]).unlink()
    process = start([*given, "data.vocab_path=vocab.txt"], 2, folders=homes)
    assert process.wait() == [1, 1]
    assert process.output().startswith(f"Error: rank 1: {missing}: ")
    assert files[missing] in process.output()
    assert len(errors(process)) == 1
    assert not errors(process, 1)


def test_a_corpus_that_cannot_be_converted_is_tried_once(tmp_path: Path, start: Any) -> None:
    """Not by each rank in turn: it may take hours to come to the bad row."""
    cells = make_cells(60)
    cells[50] = []
    write_parquet(tmp_path / "cells.parquet", cells)
    process = start(overrides(tmp_path), 3)
    assert process.wait() == [1, 1, 1]
    assert "Error: rank 0: data.path: " in process.output()
    assert "row 50: input_ids is empty" in process.output()
    assert "ranks" not in process.output()


def test_a_killed_rank_is_told_of_plainly(tmp_path: Path, start: Any) -> None:
    process = start(overrides(tmp_path, *ENDLESS), 2)
    process.wait_for_training()
    process.send(1, signal.SIGKILL)
    assert process.wait() == [1, -signal.SIGKILL]
    said = "rank 0 lost its connection to another rank"
    told = read_exit(tmp_path / "run")
    assert (told["reason"], told["rank"]) == ("error", 0)
    assert told["error"].startswith(said)
    assert "gloo" not in told["error"]
    assert f"Error: {said}" in process.output().splitlines()[-1]
    assert "Traceback" not in process.output()


def test_accumulation_is_announced_only_where_it_follows(tmp_path: Path, start: Any) -> None:
    given, two = overrides(tmp_path, "training.num_train_steps=4"), "training.gradient_accumulation_steps=2"
    start([*overrides(tmp_path), two], 2).complete()
    refused = start(given, 3)
    assert refused.wait() == [1, 1, 1]
    assert refused.output().splitlines()[-1].startswith("Error: This run takes 4 packs per step, which 3 processes")
    assert "Accumulation follows" not in refused.output()
    resumed = start(given, 1)
    resumed.complete()
    assert "keeps its 4 packs per step; the configuration now asks for 1. Accumulation follows." in resumed.output()
