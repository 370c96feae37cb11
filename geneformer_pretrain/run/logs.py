"""The logs of a run: config.yaml, metrics.jsonl with the progress of steps, trackers and the log of cells."""

from pathlib import Path

from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import say
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.run.cell_log import CellLog
from geneformer_pretrain.run.metrics import MetricsLog, cut_back
from geneformer_pretrain.run.record import write_run_record
from geneformer_pretrain.run.tensorboard import start_tensorboard
from geneformer_pretrain.run.tracking import Tracker, start_trackers


class RunLogs:
    """Opens all logs of this rank.

    Parameters
    ----------
    folder
        Of the run.
    config, resolved
        Recorded in config.yaml; changes since an earlier start are printed.
    world
        This process among all: the main rank has all logs, the others the log of cells alone.
    first_step
        Completed steps; records of later steps are dropped.

    Attributes
    ----------
    metrics, cells
        None where this rank has none.
    trackers
        Closed apart, by `close_trackers`: after exit.json is written.
    """

    def __init__(self, folder: Path, config: Config, resolved: Resolved, world: World, first_step: int) -> None:
        self.metrics: MetricsLog | None = None
        self.trackers: list[Tracker] = []
        if world.is_main:
            cut_back(folder / "metrics.jsonl", first_step)  # A damaged one is no reason to change config.yaml.
            changes = write_run_record(config, resolved, folder, first_step)
            if changes:
                say("\n  ".join(["Changed since the last start:", *changes]))
            self.trackers = start_trackers(config, folder)
            if config.training.tensorboard:
                self.trackers.append(start_tensorboard(folder, first_step))
            self.metrics = MetricsLog(folder, first_step, config.training.num_train_steps, self.trackers)
        self.cells = CellLog(folder, world, first_step) if config.training.log_cell_ids else None

    def start(self) -> None:
        """Show the progress from here on."""
        if self.metrics is not None:
            self.metrics.start()

    def close(self) -> None:
        """Close files and progress."""
        for log in (self.metrics, self.cells):
            if log is not None:
                log.close()

    def close_trackers(self, exit_code: int) -> None:
        """End the trackers' runs, waiting for at most a minute each, and longer for models."""
        for tracker in self.trackers:
            tracker.close(exit_code)
