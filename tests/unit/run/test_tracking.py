"""Weights & Biases, TensorBoard and curves: what they get, and that nothing they do stops or delays a run."""

import shutil
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model import precision
from geneformer_pretrain.run import metrics, tracking
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

ERRORS = SimpleNamespace(UsageError=type("UsageError", (Exception,), {}), AuthenticationError=PermissionError)


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

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, errors=ERRORS))
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


def with_artifacts(wandb, monkeypatch, log_artifact):
    """Let the pretended W&B have artifacts; returns the calls that made them."""
    made = []

    class Artifact:
        def __init__(self, name, type):
            self.name = name
            made.append((name, type))

        def add_dir(self, path):
            made.append(("copied", path))

        def add_reference(self, uri):
            made.append(("referred to", uri))

    monkeypatch.setattr(sys.modules["wandb"], "Artifact", Artifact, raising=False)
    monkeypatch.setattr(StandIn, "log_artifact", log_artifact, raising=False)
    return made


@pytest.mark.parametrize("kind", ["upload", "reference"])
def test_models_become_artifacts_at_the_end(tmp_path, wandb, monkeypatch, kind):
    logged = []
    made = with_artifacts(wandb, monkeypatch, lambda self, artifact: logged.append((artifact.name, list(self.codes))))
    validation = (
        f"data.validation_path={tmp_path / 'cells.parquet'}",
        "training.validate_every_n_steps=1",
        "training.keep_best=true",
    )
    assert train.run(tracked(tmp_path, f"training.wandb_log_model={kind}", *validation)) == 0
    models = [tmp_path / "run/final_model", tmp_path / "run/best_model"]
    added = [("copied", str(path)) if kind == "upload" else ("referred to", path.as_uri()) for path in models]
    names = [f"abc123-{path.name}" for path in models]
    assert made == [(names[0], "model"), added[0], (names[1], "model"), added[1]]
    assert logged == [(name, []) for name in names]  # before the end of the W&B run
    assert wandb.runs[0].codes == [0]
    assert wandb.runs[0].records[-1][1]["best_step"] == 2


def test_an_artifact_that_fails_stops_nothing(tmp_path, wandb, monkeypatch, caplog):
    with_artifacts(wandb, monkeypatch, lambda self, artifact: fail())
    assert train.run(tracked(tmp_path, "training.wandb_log_model=upload")) == 0
    assert "final_model has become no W&B artifact (RuntimeError: the server is gone)" in caplog.text
    assert wandb.runs[0].codes == [0]
    with pytest.raises(ConfigError, match=r"wandb_log_model=upload does nothing without training\.wandb_init_args"):
        tiny_config(tmp_path, "training.wandb_log_model=upload")


def test_a_run_that_fails_leaves_no_artifact(tmp_path, wandb, monkeypatch):
    made = with_artifacts(wandb, monkeypatch, lambda *_: None)
    monkeypatch.setattr(train.Trainer, "fit", lambda self: fail())
    with pytest.raises(RuntimeError):
        train.run(tracked(tmp_path, "training.wandb_log_model=upload"))
    assert not made


def test_a_new_run_in_the_folder_is_a_new_one_at_wandb(tmp_path, wandb):
    assert train.run(tracked(tmp_path)) == 0
    assert train.run(tracked(tmp_path, "training.resume_from_checkpoint=false")) == 0
    assert "id" not in wandb.runs[1].given
    assert len(list((tmp_path / "run").glob("previous-*/wandb_id.txt"))) == 1
    assert len(list((tmp_path / "run").glob("previous-*/training_curves.png"))) == 1


def events(folder):
    """Scalars of a run's TensorBoard folder as TensorBoard shows them: name -> {step: value}."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)} for name in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_the_records(tmp_path, monkeypatch):
    """Also after a run was cut off at step 3 and goes on from step 2."""
    monkeypatch.setattr(metrics, "TRACKING_INTERVAL", 0.0)
    given = ("training.tensorboard=true", "training.save_every_n_steps=2")
    validation = (f"data.validation_path={tmp_path / 'cells.parquet'}", "training.validate_every_n_steps=2")
    assert train.run(tiny_config(tmp_path, *given, *validation, "training.num_train_steps=3")) == 0
    shutil.rmtree(tmp_path / "run/step_3")
    assert train.run(tiny_config(tmp_path, *given, *validation, "training.num_train_steps=4")) == 0
    found, records = events(tmp_path / "run"), read_metrics(tmp_path / "run")
    for name in ("loss", "grad_norm", "validation_loss", "packing_fill"):
        expected = {record["step"]: record[name] for record in records if name in record}
        assert found[name] == pytest.approx(expected), name
    assert not {"step", "mfu"} & found.keys()  # there is no peak of a CPU


def test_a_missing_tensorboard_is_named_with_the_remedy(tmp_path, monkeypatch):
    """Before anything is made."""
    monkeypatch.setattr(precision, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(ConfigError, match=r"training\.tensorboard=True .*pip install tensorboard.*tensorboard=False"):
        train.run(tiny_config(tmp_path, "training.tensorboard=true"))
    assert not (tmp_path / "run/config.yaml").exists()


def test_curves_are_drawn_at_the_end(tmp_path, capsys):
    assert train.run(tiny_config(tmp_path)) == 0
    assert (tmp_path / "run/training_curves.png").stat().st_size > 10_000
    assert f"curves       {tmp_path / 'run/training_curves.png'}\n" in capsys.readouterr().out


def test_curves_that_cannot_be_drawn_are_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.run(tiny_config(tmp_path)) == 0
    (said,) = (message for message in caplog.messages if "training_curves.png" in message)
    assert said.startswith(f"{tmp_path / 'run/training_curves.png'} is not drawn (ModuleNotFoundError: ")
    assert "\n" not in said
    assert read_exit(tmp_path / "run")["reason"] == "completed"


def refuse_to_start(monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, errors=ERRORS))


@pytest.mark.parametrize("error", [ERRORS.UsageError("No API key configured"), TypeError("nme"), ValueError("mode")])
def test_mistakes_are_named_as_such(tmp_path, monkeypatch, error):
    refuse_to_start(monkeypatch, error)
    message = rf"^training\.wandb_init_args: wandb does not start with them: {error};.*training\.wandb_init_args=null"
    with pytest.raises(ConfigError, match=message):
        start_trackers(tiny_config(tmp_path, "training.wandb_init_args={name: n}"), tmp_path)


@pytest.mark.parametrize("error", [OSError("no such host"), RuntimeError("timed out\nafter 90 s")])
def test_a_server_that_does_not_answer_is_survived(tmp_path, monkeypatch, caplog, error):
    """A run that is queued again at night finds no one to correct anything."""
    refuse_to_start(monkeypatch, error)
    assert start_trackers(tiny_config(tmp_path, "training.wandb_init_args={name: n}"), tmp_path) == []
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    assert [record.message for record in caplog.records] == [
        f"W&B is lost ({reason}); the run goes on without it, metrics.jsonl has every record"
    ]
