"""`train.py` as a user sees it: exit codes, messages, what it imports."""

import contextlib
import errno
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.config.compose import CONFIG_DIR
from geneformer_pretrain.data import stream
from geneformer_pretrain.errors import TrainingError
from geneformer_pretrain.training import main as train
from geneformer_pretrain.training import report, saving, trainer
from geneformer_pretrain.training.step import TrainStep
from tests.forks import Fork
from tests.tiny import (
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_exit,
    read_metrics,
    tiny_config,
    write_parquet,
)

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]


def python(*arguments: str, timeout: float = 120, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        timeout=timeout,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more,
    )


def failure(arguments: Sequence[str]) -> str:
    """Run train.py's arguments in this process; return the message that it prints before it exits with 1."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as stopped:
        train.train(arguments)
    assert stopped.value.code == 1
    _, found, message = printed.getvalue().rstrip("\n").rpartition("Error: ")
    return found + message


@pytest.mark.parametrize(
    ("arguments", "key", "remedy"),
    [
        (["model.use_te_layers=true"], "model.use_te_layers=True", "model.use_te_layers=False"),
        (
            ["model.use_te_layers=true", "training.use_fp8=true"],
            "model.use_te_layers=True",
            "and off Hopper GPUs training.use_fp8=False",
        ),
        (["training.use_nvfsdp=true"], "training.use_nvfsdp=True", "training.use_fsdp2=True"),
        (["training.use_fp8=true"], "training.use_fp8=True needs a CUDA GPU", "training.use_fp8=False"),
        (["model.hidden_act=rellu"], "model.hidden_act", "relu"),
        (["model.hidden_size=33"], "model.hidden_size (33)", "model.num_attention_heads (2)"),
        (["data.vocab_path=none.txt"], "data.vocab_path", "data.vocab_path=null"),
        (["data.path=none.parquet"], "data.path: none.parquet", "correct the path"),
        (["data.validation_path=none.parquet"], "data.validation_path: none.parquet", "no such file or folder"),
        (["model.vocab_size=100"], "cells.parquet, row ", "model.vocab_size to its size (at least 101)"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_plain_message(tmp_path: Path, arguments: list[str], key: str, remedy: str) -> None:
    message = failure(overrides(tmp_path, *arguments))
    assert key in message
    assert remedy in message
    assert not (tmp_path / "run").exists()


def test_a_token_outside_of_the_vocabulary_in_a_saved_folder(tmp_path: Path) -> None:
    """Its tokens are not read at the start, but before the pack that holds them is used."""
    cells = make_cells(40)
    cells[17][3] = 101
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(tmp_path / "saved")
    given = overrides(tmp_path, f"data.path={tmp_path / 'saved'}", "training.num_train_steps=50")
    message = failure(given)
    assert message.startswith(f"Error: data.path: {tmp_path / 'saved'}")
    assert "row 17: token 101 at position 3" in message
    assert "model.vocab_size" in message
    exit_json = read_exit(tmp_path / "run")
    assert (exit_json["reason"], exit_json["exit_code"], exit_json["rank"]) == ("error", 1, 0)
    assert "token 101" in exit_json["error"]


def test_a_token_outside_of_the_vocabulary_in_held_out_cells(tmp_path: Path) -> None:
    cells = make_cells(5)
    cells[2][3] = 101
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(tmp_path / "saved")
    message = failure(overrides(tmp_path, f"data.validation_path={tmp_path / 'saved'}"))
    assert "data.validation_path: " in message
    assert f"{tmp_path}/saved/data-00000-of-00001.arrow, row 2: token 101 at position 3" in message


def test_a_column_that_the_held_out_cells_do_not_have(tmp_path: Path) -> None:
    message = failure(overrides(tmp_path, "data.validation_fraction=0.3", "data.validation_column=tissue"))
    place = tmp_path / "cells.parquet"
    assert message == (
        f"Error: data.validation_column: {place}: no column 'tissue', only input_ids, length; name one of these"
    )


def test_held_out_cells_of_which_no_token_is_masked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "held_out.parquet", [[7]])
    given = [f"data.validation_path={tmp_path / 'held_out.parquet'}", "training.mlm_probability=0.02"]
    assert train.run(tiny_config(tmp_path, *given)) == 0
    assert not [record for record in read_metrics(tmp_path / "run") if "validation_loss" in record]


def test_damaged_checkpoints_and_changed_data_are_plain_messages(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    assert "seed: 0 in the checkpoint, 1 now" in failure(overrides(tmp_path, "training.seed=1"))
    (tmp_path / "run/step_2/rank_0.safetensors").write_bytes(b"")
    message = failure(overrides(tmp_path, "training.num_train_steps=4"))
    assert "step_2" in message
    assert not (tmp_path / "run/step_4").exists()


def test_another_model_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    exported = (tmp_path / "run/final_model/config.json").read_bytes()
    message = failure(overrides(tmp_path, "model.num_attention_heads=4", "model.hidden_act=gelu"))
    assert "model.num_attention_heads: 2 in the checkpoint, 4 now" in message
    assert "model.hidden_act: 'relu' in the checkpoint, 'gelu' now" in message
    assert (tmp_path / "run/final_model/config.json").read_bytes() == exported
    # Dropout belongs to training, not to the function of the weights.
    assert train.run(tiny_config(tmp_path, "model.hidden_dropout_prob=0.3")) == 0


def test_a_model_of_another_size_is_a_short_message(tmp_path: Path) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    message = failure(overrides(tmp_path, "model.hidden_size=64"))
    assert "model.hidden_size: 32 in the checkpoint, 64 now" in message
    assert len(message) < 500


@pytest.mark.parametrize("folder", ["2026", "[a]"])
def test_a_folder_that_yaml_reads_as_something_else(tmp_path: Path, folder: str) -> None:
    """Another mistake is told all the same."""
    assert "training.seed" in failure(overrides(tmp_path, f"training.checkpoint_dir={folder}", "training.seed=abc"))


def test_a_model_too_large_for_the_memory_is_a_plain_message(tmp_path: Path) -> None:
    message = failure(overrides(tmp_path, f"model.hidden_size={2**48}"))
    assert message.startswith("Error: ")
    assert "can't allocate memory" in message
    assert "training.recompute_every_n_layers" in message


def test_errors_of_the_system_are_plain_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    remedy = "needs a writable folder with free space: fix it or choose another."
    message = failure(overrides(tmp_path, f"data.cache_dir={file}"))
    assert message.startswith(f"Error: data.cache_dir: cannot write to {file}/")
    assert "ot a directory" in message
    assert message.endswith(remedy)
    for key in ("data.cache_dir", "training.checkpoint_dir"):
        assert failure(overrides(tmp_path, f"{key}=/proc/none/deep")).startswith(f"Error: {key}: cannot write to /proc")
    message = failure(overrides(tmp_path, f"training.checkpoint_dir={file}"))
    cause = f"training.checkpoint_dir: cannot write to {file} (File exists). training.checkpoint_dir {remedy}"
    assert message == f"Error: {cause}"

    place = str(tmp_path / "run" / "final_model")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", place)

    cause = f"training.checkpoint_dir: cannot write to {place} (No space left on device)"
    for module, function in ((saving, "write_model"), (trainer, "archive_run")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            message = failure(overrides(tmp_path, "training.resume_from_checkpoint=false"))
        assert message == f"Error: {cause}. training.checkpoint_dir {remedy}"
        assert cause in read_exit(tmp_path / "run")["error"]


@pytest.fixture
def fails_after_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a run that ends with an error right after a save in the background has begun."""
    run = TrainStep.run

    def fail_late(self: TrainStep, batches: Any, step: int, *more: Any) -> Any:
        if step == 3:
            raise TrainingError("out of luck")
        return run(self, batches, step, *more)

    monkeypatch.setattr(TrainStep, "run", fail_late)
    return overrides(tmp_path, "training.num_train_steps=9", "training.save_every_n_steps=3")


def test_a_save_under_way_outlives_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_after_a_save: list[str]
) -> None:
    commit = CheckpointStore._commit

    def slow_commit(*args: Any) -> None:
        time.sleep(1.0)
        commit(*args)

    monkeypatch.setattr(CheckpointStore, "_commit", slow_commit)
    assert "out of luck" in failure(fails_after_a_save)
    assert (tmp_path / "run/step_3/manifest.json").exists()


def test_an_error_is_told_even_if_the_save_under_way_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_after_a_save: list[str]
) -> None:
    """Another rank that is gone shows there as an error of its own, at once or after a long time."""
    written_before: list[bool] = []

    def lose_connection(*_: Any) -> None:
        time.sleep(1.0)
        written_before.append((tmp_path / "run/exit.json").exists())
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(CheckpointStore, "_write", lose_connection)
    assert "out of luck" in failure(fails_after_a_save)
    assert "out of luck" in read_exit(tmp_path / "run")["error"]
    assert written_before == [True]


def test_a_damaged_plan_is_a_plain_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MIN_CELLS_FOR_PLAN_FILES", 1)
    assert train.run(tiny_config(tmp_path)) == 0
    (file,) = (tmp_path / "cache/plans").rglob("0.cells.npy")
    file.write_bytes(b"")
    message = failure(overrides(tmp_path, "training.num_train_steps=4"))
    assert "0.cells.npy" in message
    assert "delete the folder" in message


@pytest.mark.parametrize(("most", "read"), [(64, "2 packs, 5 cells"), (1, "1 pack, 3 cells")])
def test_held_out_cells_are_counted_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int, read: str
) -> None:
    write_parquet(tmp_path / "held_out.parquet", [[7] * 30] * 5)  # packs of 4 x 32 tokens
    given = [f"data.validation_path={tmp_path / 'held_out.parquet'}", f"data.validation_packs={most}"]
    assert train.run(tiny_config(tmp_path, *given)) == 0
    assert f"held out    5 cells, 150 tokens; a validation reads {read}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "warned"), [(1000, True), (2, False)])
def test_a_long_run_on_the_sample_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int, warned: bool
) -> None:
    monkeypatch.setattr(report, "SAMPLE", (tmp_path / "cells.parquet").resolve())
    monkeypatch.setattr(trainer.Trainer, "_train", lambda self, *_: setattr(self.progress, "step", steps))
    assert train.run(tiny_config(tmp_path, f"training.num_train_steps={steps}")) == 0
    assert ("WARNING     this run trains on the 60 simulated sample cells" in capsys.readouterr().out) is warned


@pytest.mark.parametrize(("tasks", "warned"), [("4", True), ("1", False)])
def test_tasks_of_srun_without_torchrun_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tasks: str, warned: bool
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    assert train.run(tiny_config(tmp_path)) == 0
    assert (
        "this process is one of 4 tasks of a launcher, and trains without the others" in capsys.readouterr().out
    ) is (warned)


def test_held_out_cells_that_are_trained_on_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run(tiny_config(tmp_path, f"data.validation_path={tmp_path / 'cells.parquet'}")) == 0
    assert "they are the cells of data.path" in capsys.readouterr().out


def test_going_on_with_another_configuration_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run(tiny_config(tmp_path, "training.learning_rate=1e-3")) == 0
    assert "Changed since" not in capsys.readouterr().out
    assert train.run(tiny_config(tmp_path, "training.learning_rate=5e-4", "training.num_train_steps=3")) == 0
    told = "training.learning_rate: 0.001 -> 0.0005\n  training.num_train_steps: 2 -> 3\n"
    assert f"Changed since the last start:\n  {told}" in capsys.readouterr().out
    assert "learning_rate: 0.001" in (tmp_path / "run/config_until_step_2.yaml").read_text()


def test_a_warm_up_longer_than_the_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["training.warmup_steps=100", "training.learning_rate=1e-3"]
    assert train.run(tiny_config(tmp_path, *given)) == 0
    assert "100 steps are longer than the run of 2: the learning rate gets no higher than 2.0e-05" in (
        capsys.readouterr().out
    )
    assert [record["learning_rate"] for record in read_metrics(tmp_path / "run")] == pytest.approx([1e-5, 2e-5])
    assert train.run(tiny_config(tmp_path, "training.warmup_steps=3", "training.num_train_steps=3")) == 0
    assert "warm-up" not in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that a user can mend are shortened."""

    def broken(self: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train.Trainer, "fit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(tiny_config(tmp_path))
    assert read_exit(tmp_path / "run")["error"] == "RuntimeError: a bug"


def test_stale_exit_json_does_not_outlive_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.run(tiny_config(tmp_path)) == 0
    seen = []
    original = train.Trainer.fit

    def fit(self: trainer.Trainer) -> bool:
        seen.append((tmp_path / "run/exit.json").exists())
        return original(self)

    monkeypatch.setattr(train.Trainer, "fit", fit)
    assert train.run(tiny_config(tmp_path, "training.num_train_steps=3")) == 0
    assert seen == [False]
    assert read_exit(tmp_path / "run")["step"] == 3


# --- real processes ---------------------------------------------------------------------------------------


def test_error_in_a_real_process(tmp_path: Path) -> None:
    ended = python("train.py", "training.lerning_rate=1")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: Unknown configuration key training.lerning_rate")
    ended = Fork(tmp_path / "output", train.main, overrides(tmp_path, "training.use_nvfsdp=true")).wait()
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("Error: training.use_nvfsdp=True needs CUDA")


def test_showing_the_configuration_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "run"
    given = ["training.learning_rate=0.5", "--config-name", "106m", f"training.checkpoint_dir={target}", "--cfg", "job"]
    ended = Fork(tmp_path / "output", train.main, given).wait()
    assert ended.returncode == 0
    assert "hydra" not in ended.stdout
    for line in ("hidden_size: 768", "learning_rate: 0.5", f"checkpoint_dir: {target}"):
        assert line in ended.stdout
    assert not target.exists()


def test_help_names_the_configurations_and_how_to_see_one(tmp_path: Path) -> None:
    ended = Fork(tmp_path / "output", train.main, ["--help"]).wait()
    assert ended.returncode == 0
    names = re.search(r"NAME is (\w+) \(the default\), (\w+), (\w+), (\w+), (\w+) or (\w+);", ended.stdout)
    assert names is not None
    assert set(names.groups()) == {path.stem for path in CONFIG_DIR.glob("*.yaml")} - {"defaults"}
    assert "--cfg job shows the composed configuration" in ended.stdout


WANDB = """
import sys
from pathlib import Path
from geneformer_pretrain.training import main as train
from geneformer_pretrain.config.compose import load_config

train.run(load_config(overrides=sys.argv[1:]))
assert "wandb" not in sys.modules, "wandb was imported although tracking is off"
tracked = [*sys.argv[1:], "training.wandb_init_args={name: n, project: p}", "training.num_train_steps=3"]
train.run(load_config(overrides=tracked))
import wandb
assert wandb.run is None, "the run was not finished"
"""


def test_wandb_is_imported_only_if_tracked_and_works_offline(tmp_path: Path) -> None:
    ended = python("-c", WANDB, *overrides(tmp_path))
    assert ended.returncode == 0, ended.stderr
    (run,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    assert not (ROOT / "wandb").exists()


def test_readme_way_without_torchrun(tmp_path: Path) -> None:
    """`python train.py`: what it prints at the start and at the end is true."""
    write_parquet(tmp_path / "cells.parquet", make_cells(60))
    ended = python("train.py", *overrides(tmp_path))
    assert ended.returncode == 0, ended.stderr
    for line in ("hidden_size: 32", "parameters, PyTorch layers", "60 cells", "engine      ddp on cpu"):
        assert line in ended.stdout
    for name in ("final_model", "step_2", "metrics.jsonl"):
        assert str(tmp_path / "run" / name) in ended.stdout
        assert (tmp_path / "run" / name).exists()
    assert read_exit(tmp_path / "run") == {"reason": "completed", "exit_code": 0, "step": 2}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_on_a_full_disk_stops_nothing(tmp_path: Path, stream: str) -> None:
    with open("/dev/full", "w") as full:
        ended = python("train.py", *overrides(tmp_path), **{stream: full})
    assert ended.returncode == read_exit(tmp_path / "run")["exit_code"] == 0
    assert (tmp_path / "run/final_model/model.safetensors").exists()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    heard = ended.stderr if stream == "stdout" else ended.stdout
    name = {"stdout": "standard output", "stderr": "standard error"}[stream]
    assert heard.count(f"The {name} cannot be written to (No space left on device)") == 1


def test_a_reader_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    """As with `train.py 2>&1 | head -3`."""
    given = shlex.join(overrides(tmp_path, "training.num_train_steps=30"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = f"set -o pipefail; {sys.executable} train.py {given} 2>&1 | head -3"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, timeout=120, check=False)
    assert ended.returncode == read_exit(tmp_path / "run")["exit_code"] == 0
    assert len(read_metrics(tmp_path / "run")) == 30
    assert (tmp_path / "run/final_model/model.safetensors").exists()


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_a_closed_output_stops_nothing(tmp_path: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    ended = python("train.py", *overrides(tmp_path), stdout=None, stderr=None, preexec_fn=close)
    assert ended.returncode == read_exit(tmp_path / "run")["exit_code"] == 0
    assert (tmp_path / "run/final_model/model.safetensors").exists()


LATE_THREAD = """
import runpy, threading
from datetime import timedelta
import torch.distributed as dist

def look_for(key):
    while True:
        try:
            dist.HashStore().wait([key], timedelta(milliseconds=1))
        except dist.DistError:
            pass

threading.Thread(target=look_for, args=["never there"], daemon=True).start()
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize(("more", "code"), [((), 0), (("training.use_nvfsdp=true",), 1)])
def test_threads_that_outlive_a_run_do_not_change_its_exit_code(
    tmp_path: Path, more: tuple[str, ...], code: int
) -> None:
    """In the interpreter's teardown, a thread that comes back from PyTorch to Python aborts the process."""
    write_parquet(tmp_path / "cells.parquet", make_cells(60))
    ended = python("-c", LATE_THREAD, *overrides(tmp_path, *more))
    assert ended.returncode == code, ended.stderr
    assert "terminate called" not in ended.stderr
    if code:
        assert ended.stderr.startswith("Error: training.use_nvfsdp=True")
    else:
        assert ended.stdout.splitlines()[-1].startswith("curves ")
