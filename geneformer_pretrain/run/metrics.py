"""What a run reports: metrics.jsonl, the progress bar, Weights & Biases."""

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.errors import ConfigError

log = logging.getLogger(__name__)


class MetricsLog:
    """Writes one record per logged step; on ranks other than the main one it does nothing.

    Parameters
    ----------
    folder
        Checkpoint folder; metrics.jsonl is appended to.
    first_step
        Completed steps at the start. Later records, of a run that was cut off, are dropped.
    """

    def __init__(self, folder: Path, first_step: int, config: Config, is_main: bool) -> None:
        self.enabled = is_main
        self.wandb_run: Any = None
        if not is_main:
            return
        self.file = JsonLines(folder / "metrics.jsonl", first_step)
        self.bar = tqdm(
            total=config.training.num_train_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if os.isatty(2) else 10.0,
        )
        if config.training.wandb_init_args is not None:
            self.wandb_run = start_wandb(config, folder)

    def write(self, record: dict[str, Any]) -> None:
        """Record one step; numbers that are not finite become null, since JSON has no NaN."""
        if not self.enabled:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(finite)
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in finite.items() if k != "step"}, step=record["step"])

    def advance(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Move the progress bar to `step`."""
        if self.enabled:
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, lr {learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s", refresh=False
            )
            self.bar.update(step - self.bar.n)

    def close(self, exit_code: int = 0) -> None:
        """Close everything; Weights & Biases shows a run with another exit code than 0 as failed."""
        if self.enabled:
            self.bar.close()
            self.file.close()
            if self.wandb_run is not None:
                self.wandb_run.finish(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(exit_code=int(exception is not None))


class JsonLines:
    """Appends records to a file. What a full disk refuses is kept, and written once there is room.

    Parameters
    ----------
    path
        Appended to.
    last_step
        Records of later steps are dropped first.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        cut_back(path, last_step)
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a failure to write is logged once, and never stops the run."""
        stuck = bool(self.unwritten)
        self.unwritten += (json.dumps(record) + "\n").encode()
        try:
            self._write_out()
        except OSError as error:
            if not stuck:
                log.error("cannot write to %s: %s; its records wait in memory", self.file.name, error)

    def _write_out(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self) -> None:
        """Try once more to write what is left."""
        try:
            self._write_out()
        except OSError as error:
            log.error("the last %d records of %s are lost: %s", self.unwritten.count(b"\n"), self.file.name, error)
        self.file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the records after `step` from a JSON-lines file, and a last line torn by a crash.

    Raises
    ------
    ConfigError
        A line that is not a record; names it.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") and number == len(lines):
            break
        try:
            is_kept = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}, line {number}: not a record of a step; mend or move the file away.") from error
        if is_kept:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def start_wandb(config: Config, folder: Path) -> Any:
    """Start a Weights & Biases run: offline unless a key is set or the configuration says otherwise.

    Raises
    ------
    ConfigError
        Arguments with which wandb does not start, for want of a login for instance.
    """
    import wandb  # imported only when tracking is on: it is slow to load

    arguments = dict(config.training.wandb_init_args or {})
    default_mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    arguments.setdefault("mode", os.environ.get("WANDB_MODE", default_mode))
    arguments.setdefault("dir", str(folder))
    arguments.setdefault("config", asdict(config))
    try:
        return wandb.init(**arguments)
    except (TypeError, ValueError, OSError, wandb.Error) as error:
        raise ConfigError(
            f"training.wandb_init_args: wandb does not start with them: {error}; correct them (mode=offline needs no "
            "login), or set training.wandb_init_args=null to train without wandb."
        ) from error
