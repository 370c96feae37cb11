"""metrics.jsonl, the log of cells and config.yaml."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from geneformer_pretrain.config.model import Kernel
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.training import ComputeDtype
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.run.cell_log import CellLog
from geneformer_pretrain.run.metrics import JsonLines, MetricsLog, cut_back
from geneformer_pretrain.run.record import write_run_record
from tests.tiny import tiny_config

RESOLVED = Resolved(ComputeDtype.float32, False, False, True, Kernel.torch, Kernel.torch, 1, "cpu", "none", "none")
ROOT = Path(__file__).resolve().parents[3]


def write_steps(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 3', "garbage"])
def test_cut_back_drops_later_steps_and_a_torn_line(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3, 4, 5], tail)
    cut_back(path, 3)
    assert steps_in(path) == [1, 2, 3]
    cut_back(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_cut_back_refuses_a_damaged_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a record of a step"):
        cut_back(path, 2)
    assert "nonsense" in path.read_text()


def test_records_are_strict_json(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", [1, 2])
    log = MetricsLog(tmp_path, 1, 10, [])
    log.advance(2, 1.5, 1e-3, 1000.0, 0.5)
    log.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf"), "cells": 3})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1}
    assert json.loads(lines[1]) == {"step": 2, "loss": None, "grad_norm": None, "cells": 3}
    assert len(lines) == 2


def test_progress_shows_one_stretch_of_steps(tmp_path):
    """Means over the last half minute of steps: the slow first one has left it, and no step is alone."""
    log = MetricsLog(tmp_path, 0, 400, [])
    log.start()
    steps = [(1000.0, 90.0), *((1000.0, 0.25) for _ in range(198)), (1000.0, 0.5)]
    notes = []
    for step, (tokens, seconds) in enumerate(steps, 1):
        log.advance(step, 1.5, 1e-3, tokens, seconds)
        notes.append(log.progress.note)
    for _ in range(3):
        log.advance(201, 1.5, 1e-3, 500.0, 45.0)
    notes.append(log.progress.note)
    log.close()
    assert notes[0] == "loss 1.5000, lr 1.00e-03, 90.00 s a step, 11 tokens/s"
    assert notes[1] == "loss 1.5000, lr 1.00e-03, 250.0 ms a step, 4,000 tokens/s"
    assert notes[199].endswith(f"{1e3 * (118 * 0.25 + 0.5) / 119:.1f} ms a step, {119_000 / 30:,.0f} tokens/s")
    assert notes[200].endswith("45.00 s a step, 11 tokens/s")


def test_cell_log_is_cut_back_for_ranks_that_are_gone(tmp_path):
    """Four ranks were cut off at step 9; two go on from step 6."""
    (tmp_path / "cells").mkdir()
    for rank in range(4):
        write_steps(tmp_path / f"cells/rank_{rank}.jsonl", range(1, 10))
    batch = SimpleNamespace(pack=28, epoch=0, cells=torch.tensor([5, 6]))
    for rank in range(2):
        log = CellLog(tmp_path, World(rank, rank, 2, torch.device("cpu")), 6)
        log.write(7, batch)
        log.close()
    found = [steps_in(tmp_path / f"cells/rank_{rank}.jsonl") for rank in range(4)]
    assert found == [[1, 2, 3, 4, 5, 6, 7]] * 2 + [[1, 2, 3, 4, 5, 6]] * 2


def test_records_that_a_full_disk_refuses_are_written_later(tmp_path, caplog):
    log = JsonLines(tmp_path / "log.jsonl", 0)
    log.write({"step": 1})
    file = log.file
    with open("/dev/full", "wb", buffering=0) as log.file:
        for step in (2, 3):
            log.write({"step": step})
    assert caplog.text.count("No space left on device") == 1
    assert steps_in(tmp_path / "log.jsonl") == [1]
    log.file = file
    log.write({"step": 4})
    assert steps_in(tmp_path / "log.jsonl") == [1, 2, 3, 4]
    caplog.clear()
    with open("/dev/full", "wb", buffering=0) as log.file:
        log.write({"step": 5})
        log.close()
    assert "1 record at the end of /dev/full lost" in caplog.text
    file.close()


def test_records_written_in_part_are_completed(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", 0)
    file, log.file = log.file, SimpleNamespace(write=lambda data: file.write(data[:3]), name="slow")
    log.write({"step": 1})
    assert steps_in(tmp_path / "log.jsonl") == [1]
    file.close()


def test_run_record(tmp_path):
    config = tiny_config(tmp_path, "training.lr_schedule=cosine")
    assert write_run_record(config, RESOLVED, tmp_path, 0) == []
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert record["training"]["lr_schedule"] == "cosine"
    assert record["model"]["hidden_size"] == 32
    assert record["data"]["vocab_path"] is None
    assert record["resolved"]["attention_kernel"] == "torch"
    assert record["versions"]["torch"] == version("torch")
    assert record["versions"]["transformers"] == version("transformers")
    assert record["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert head.stdout.strip() in record["git_revision"]
    else:
        assert record["git_revision"] == "unknown"


def test_earlier_run_records_are_kept_and_what_changed_is_named(tmp_path):
    first = tiny_config(tmp_path, "training.learning_rate=1e-3", "training.wandb_init_args={name: a, tags: [x]}")
    second = tiny_config(tmp_path, "training.learning_rate=5e-4", "training.wandb_init_args={name: b}")
    third = tiny_config(tmp_path, "training.learning_rate=5e-4", "training.wandb_init_args=null")
    write_run_record(first, RESOLVED, tmp_path, 0)
    earlier = (tmp_path / "config.yaml").read_text()
    assert write_run_record(first, RESOLVED, tmp_path, 7) == []
    assert [path.name for path in tmp_path.glob("config*")] == ["config.yaml"]
    assert write_run_record(second, RESOLVED, tmp_path, 7) == [
        "training.learning_rate: 0.001 -> 0.0005",
        "training.wandb_init_args.name: a -> b",
        'training.wandb_init_args.tags: ["x"] -> absent',
    ]
    # No step was made with the second one.
    assert "training.wandb_init_args: absent -> null" in write_run_record(third, RESOLVED, tmp_path, 7)
    assert (tmp_path / "config_until_step_7.yaml").read_text() == earlier
    assert sorted(path.name for path in tmp_path.glob("config*")) == ["config.yaml", "config_until_step_7.yaml"]
    assert "name:" not in (tmp_path / "config.yaml").read_text()


def test_choices_that_changed_are_named(tmp_path):
    """Another GPU may draw dropout in another way."""
    config = tiny_config(tmp_path)
    write_run_record(config, RESOLVED, tmp_path, 0)
    other = replace(RESOLVED, device="NVIDIA H100", attention_kernel=Kernel.triton, world_size=2)
    assert write_run_record(config, other, tmp_path, 5) == [
        "resolved.attention_kernel: torch -> triton",
        "resolved.world_size: 1 -> 2",
        "resolved.device: cpu -> NVIDIA H100",
    ]


def test_run_records_of_steps_that_are_made_again_are_dropped(tmp_path):
    """Steps 1 to 20 with one rate, to 40 with another; then only the checkpoint of step 10 is good."""
    configs = [tiny_config(tmp_path, f"training.learning_rate={rate}") for rate in ("1e-4", "2e-4", "3e-4")]
    for config, step in zip(configs, (0, 20, 10), strict=True):
        changes = write_run_record(config, RESOLVED, tmp_path, step)
    assert changes == ["training.learning_rate: 0.0001 -> 0.0003"]
    assert sorted(path.name for path in tmp_path.glob("config*")) == ["config.yaml", "config_until_step_10.yaml"]
    earlier = yaml.safe_load((tmp_path / "config_until_step_10.yaml").read_text())
    assert earlier["training"]["learning_rate"] == 1e-4


@pytest.mark.parametrize("damaged", ["training: [", "", "[a]", "\0\1", "training: {seed: 2026-01-01}"], ids=repr)
def test_a_damaged_run_record_is_told_and_kept(tmp_path, damaged):
    (tmp_path / "config.yaml").write_text(damaged)
    (line, *_) = write_run_record(tiny_config(tmp_path), RESOLVED, tmp_path, 1)
    assert line.startswith("config.yaml: the earlier one cannot be read") or " -> " in line
    assert (tmp_path / "config_until_step_1.yaml").read_text() == damaged
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["num_train_steps"]
