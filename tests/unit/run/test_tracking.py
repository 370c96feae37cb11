"""Weights & Biases: how it is started, and that nothing it does stops or delays a run."""

import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.run import tracking
from geneformer_pretrain.run.metrics import MetricsLog
from geneformer_pretrain.run.tracking import Tracker, start_trackers
from geneformer_pretrain.training import main as train
from tests.tiny import (
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_exit,
    read_metrics,
    tiny_config,
)


class StandIn:
    """Stands for a W&B run."""

    def __init__(self, given, log=None, finish=None):
        self.given, self.id, self.codes, self.records = given, given.get("id", "abc123"), [], []
        self._log, self._finish = log, finish

    def log(self, values, step):
        if self._log is not None:
            self._log()
        self.records.append((step, values))

    def finish(self, exit_code):
        if self._finish is not None:
            self._finish()
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    """Replace wandb; returns the runs that were started. Set `log` and `finish` to what they are to do."""
    state = SimpleNamespace(runs=[], log=None, finish=None)

    def init(**given):
        state.runs.append(StandIn(given, state.log, state.finish))
        return state.runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=UserWarning))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return state


def tracked(folder, *more):
    return tiny_config(folder, "training.wandb_init_args={name: n, project: p}", *more)


def fail():
    raise RuntimeError("the server is gone")


@pytest.mark.parametrize("place", ["log", "finish"])
def test_a_tracker_that_fails_is_dropped(tmp_path, wandb, caplog, place):
    setattr(wandb, place, fail)
    assert train.run(tracked(tmp_path, "training.num_train_steps=4")) == 0
    assert caplog.text.count("W&B is lost (RuntimeError: the server is gone)") == 1
    assert (tmp_path / "run/final_model/model.safetensors").exists()
    assert read_exit(tmp_path / "run")["reason"] == "completed"
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize("place", ["log", "finish"])
def test_a_tracker_that_hangs_delays_only_the_end(tmp_path, wandb, monkeypatch, caplog, place):
    """As when its helper process is stopped: export and exit.json are there while it is waited for."""
    seen, never = [], threading.Event()

    def hang():
        seen.append((tmp_path / "run/exit.json").exists())
        never.wait()

    setattr(wandb, place, hang)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    started = time.monotonic()
    assert train.run(tracked(tmp_path)) == 0
    assert time.monotonic() - started < 30
    assert seen == [place == "finish"]
    assert "W&B is lost (it did not finish within 1 s)" in caplog.text
    assert read_exit(tmp_path / "run")["reason"] == "completed"
    assert (tmp_path / "run/final_model/model.safetensors").exists()


def test_a_full_queue_drops_records(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "QUEUE_SIZE", 3)
    never = threading.Event()
    tracker = Tracker("W&B", lambda record: never.wait(), lambda code: None)
    for step in range(10):
        tracker.log({"step": step})
    assert caplog.text.count("has not accepted the last 3 records") == 1


def test_the_end_of_a_run_is_reported(tmp_path, wandb, monkeypatch):
    assert train.run(tracked(tmp_path)) == 0
    monkeypatch.setattr(train.Trainer, "fit", lambda self: fail())
    with pytest.raises(RuntimeError):
        train.run(tracked(tmp_path, "training.num_train_steps=3"))
    assert [run.codes for run in wandb.runs] == [[0], [1]]


def test_restarts_go_on_with_one_run(tmp_path, wandb):
    assert train.run(tracked(tmp_path)) == 0
    assert train.run(tracked(tmp_path, "training.num_train_steps=4")) == 0
    first, second = (run.given for run in wandb.runs)
    assert "id" not in first
    assert second["id"] == "abc123"


def test_records_are_bounded_by_time(tmp_path, monkeypatch):
    records = []
    tracker = Tracker("W&B", records.append, lambda code: None)
    log = MetricsLog(tmp_path, 0, 100, [tracker])
    for step in range(1, 51):
        log.write({"step": step, **({"validation_loss": 1.0} if step == 30 else {})})
    log.close()
    tracker.close(0)
    assert [record["step"] for record in records][:2] == [1, 30]
    assert len(records) < 10


@pytest.mark.parametrize(
    ("arguments", "environment", "mode"),
    [
        ({}, {}, "offline"),
        ({}, {"WANDB_API_KEY": "key"}, "online"),
        ({}, {"WANDB_MODE": "disabled"}, "disabled"),
        ({"mode": "offline"}, {"WANDB_API_KEY": "key"}, "offline"),
        ({"mode": "online"}, {}, "online"),
    ],
)
def test_wandb_is_offline_unless_asked(tmp_path, monkeypatch, wandb, arguments, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = load_config("10m", overrides(tmp_path, "training.wandb_init_args={name: n, project: p}"))
    training = replace(config.training, wandb_init_args={**config.training.wandb_init_args, **arguments})
    start_trackers(replace(config, training=training), tmp_path)
    (given,) = (run.given for run in wandb.runs)
    assert (given["name"], given["project"], given["mode"]) == ("n", "p", mode)
    assert given["dir"] == str(tmp_path)
    assert given["config"]["model"]["hidden_size"] == 32


@pytest.mark.parametrize("error", [OSError("no such host"), UserWarning("No API key configured"), TypeError("nme")])
def test_errors_of_wandb_are_named_as_such(tmp_path, monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=UserWarning))
    config = tiny_config(tmp_path, "training.wandb_init_args={name: n}")
    message = rf"^training\.wandb_init_args: wandb does not start with them: {error};.*training\.wandb_init_args=null"
    with pytest.raises(ConfigError, match=message):
        start_trackers(config, tmp_path)
