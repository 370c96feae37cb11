"""The training run: build, resume, train, validate, save, export."""

import gc
import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from geneformer_pretrain.checkpoint.export import gather_weights
from geneformer_pretrain.checkpoint.state import Progress, accumulation_steps
from geneformer_pretrain.checkpoint.store import CheckpointStore
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import say
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.data.vocabulary import apply_gene_set
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.engines import make_engine, sharding
from geneformer_pretrain.distributed.watchdog import Watchdog
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError, TrainingError
from geneformer_pretrain.model.build import build_model
from geneformer_pretrain.model.precision import make_precision
from geneformer_pretrain.model.resolve import DTYPES, resolve_on_all_ranks
from geneformer_pretrain.run.archive import archive_run, has_results, require_no_other_use
from geneformer_pretrain.run.folder import FolderWriter, write_exit
from geneformer_pretrain.run.logs import RunLogs
from geneformer_pretrain.run.record import identity_of_rank
from geneformer_pretrain.run.signals import StopSignals
from geneformer_pretrain.training.corpora import open_corpora, require_same_packs
from geneformer_pretrain.training.optimizer import build_optimizer
from geneformer_pretrain.training.report import StartFacts, describe_end, describe_nothing_left, describe_start
from geneformer_pretrain.training.results import StepResults, run_utilization
from geneformer_pretrain.training.resume import resume
from geneformer_pretrain.training.saving import Saver, export_models
from geneformer_pretrain.training.start import start_from_published
from geneformer_pretrain.training.step import TrainStep


class Trainer:
    """A run, from its configuration to its export; every method is collective.

    Parameters
    ----------
    config
        Checked configuration.
    world
        This process among all.
    earlier_exit
        Content of the exit.json that an earlier run left in the folder.
    """

    def __init__(self, config: Config, world: World, earlier_exit: bytes | None = None) -> None:
        self.config, self.world, self.earlier_exit = config, world, earlier_exit
        training = config.training
        self.folder = Path(training.checkpoint_dir)
        if training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with it
            torch.use_deterministic_algorithms(True)
        self.ranks = ranks = Ranks()
        ranks.require_equal(identity_of_rank(config), ConfigError)
        ranks.run_on_all_ranks(lambda: apply_gene_set(config), ConfigError)
        self.resolved = resolve_on_all_ranks(config, world, ranks)
        self.data, self.validation = open_corpora(config, world, ranks)

        dtype = DTYPES[self.resolved.compute_dtype]
        shard = sharding(config, world, self.resolved, dtype)
        model = build_model(config, self.resolved, world.device, dtype, shard)
        self.precision = make_precision(config, model, world.device)
        self.engine = make_engine(model, shard, config, world, self.resolved)
        self.optimizer = build_optimizer(self.engine.model, training)

        self.writer = FolderWriter(self.folder, ranks)
        self.writer.write(lambda: require_no_other_use(self.folder))
        if not training.resume_from_checkpoint:
            self._archive("The earlier run in {folder} is in {previous} now.")
        self.store = CheckpointStore(self.folder, keep_last_n=training.keep_last_n)
        held_out = None if self.validation is None else self.validation.fingerprint
        self.saver = Saver(
            self.store, self.engine, self.optimizer, self.precision, config, self.data, held_out, self.say
        )
        self.progress = self._resume()
        self.engine.push_weights()
        ranks.run_on_all_ranks(self.engine.require_pushed, TrainingError)
        self.saver.settle_best(self.progress)
        self.accumulation = accumulation_steps(self.progress.packs_per_step, world.size)
        self.stream = self.data.stream(self.progress.epoch, self.progress.epoch_first_pack)

        self.watchdog = Watchdog(training.hang_timeout_seconds, self.folder, world, write_exit)
        self.step = TrainStep(
            self.engine,
            self.optimizer,
            training,
            self.resolved,
            world,
            self.accumulation,
            self.precision,
            self._beat,
            self.progress.norm_history,
        )
        self.last_validation: dict[str, float] = {}
        self.logs: RunLogs | None = None
        if self.progress.step < training.num_train_steps:
            require_same_packs(self.data, self.stream, self.progress.next_pack, ranks)
            first_step = self.progress.step
            self.writer.write(lambda: self._open_logs(first_step), on_all_ranks=True)

    def _open_logs(self, first_step: int) -> None:
        self.logs = RunLogs(self.folder, self.config, self.resolved, self.world, first_step)

    def _archive(self, message: str) -> None:
        previous = self.writer.write(lambda: archive_run(self.folder, self.earlier_exit))
        if previous is not None:
            self.say(message.format(folder=self.folder, previous=previous))

    def _resume(self) -> Progress:
        """Go on from the newest good checkpoint, or start anew."""
        packs = self.config.training.gradient_accumulation_steps * self.world.size
        path = self.store.find_latest()
        if path is None:
            if self.writer.write(lambda: has_results(self.folder)):
                self._archive("{folder} had results but no checkpoint to go on from; they are in {previous} now.")
            if self.config.training.init_from is not None:
                start_from_published(self.config, self.engine, self.ranks, self.say)
            return Progress(packs_per_step=packs)
        return resume(path, self.store, self.saver.tensors(), self.optimizer, self.config, self.data, packs, self.say)

    def _beat(self, phase: str) -> None:
        self.watchdog.beat(self.progress.step + 1, phase)

    def say(self, text: str) -> None:
        """Print on the main rank."""
        if self.world.is_main:
            say(text)

    def fit(self) -> bool:
        """Train to the last step and export.

        Returns
        -------
        bool
            True if the run is complete; false if a signal stopped it after a checkpoint.
        """
        training, progress = self.config.training, self.progress
        packs, device = progress.packs_per_step, self.world.device
        self.say(
            describe_start(
                StartFacts(
                    self.config, self.resolved, self.engine.name, self.data, self.stream, self.validation, packs, device
                )
            )
        )
        if progress.step >= training.num_train_steps:
            self.say(describe_nothing_left(progress.step, training.num_train_steps))
        else:
            assert self.logs is not None
            with ExitStack() as stack:
                self._train(stack, self.logs)
        self.store.wait()
        if progress.step < training.num_train_steps:
            self.say(f"Stopped by a signal after step {progress.step}; start again to go on from there.")
            return False
        self.say("Exporting the model.")
        weights = gather_weights(self.engine, self.world.is_main)
        self.writer.write(lambda: export_models(self.config, weights, progress.best_step))
        self.say(describe_end(progress, self.folder, self.last_validation))
        return True

    def _train(self, stack: ExitStack, logs: RunLogs) -> None:
        """Loop over optimizer steps."""
        training, progress, world = self.config.training, self.progress, self.world
        signals = stack.enter_context(StopSignals())
        stack.callback(logs.close)
        loader = stack.enter_context(self.loader())
        stack.enter_context(self.watchdog)
        stack.callback(gc.unfreeze)
        logs.start()
        first_step = progress.step + 1
        room = progress.packs_per_step * self.data.shape.token_budget
        utilization = run_utilization(self.config, self.resolved, self.data.corpus.lengths)
        results = StepResults(self.config, world, progress, logs.metrics, room, utilization, self._beat)
        while progress.step < training.num_train_steps:
            latest = self.step.run(loader, progress.step, (signals.received is not None, self.saver.is_due()))
            progress.step += 1
            progress.next_pack += progress.packs_per_step
            if logs.cells is not None:
                for batch in latest.batches:
                    logs.cells.write(latest.step, batch)
            if progress.step == first_step:
                # The objects built and compiled so far stay. Walking through them again would stall a later step.
                gc.collect()
                gc.freeze()
            results.collect()
            results.pending = latest
            is_last = progress.step == training.num_train_steps
            is_best = False
            if self.validation is not None and self._due(training.validate_every_n_steps, is_last):
                latest.wait()  # or what is left of the step would count as validation
                started = time.perf_counter()
                latest.validation = self.validate()
                is_best = self.saver.record_best(progress, latest.validation)
                results.pause("validation_seconds", time.perf_counter() - started)
            wants_save = results.stop_requested or results.save_requested or is_best
            if wants_save or self._due(training.save_every_n_steps, is_last):
                results.collect()  # so that the checkpoint counts this step's cells, and metrics.jsonl has it
                started = time.perf_counter()
                self.save(final=is_last or results.stop_requested)
                results.pause("save_seconds", time.perf_counter() - started)
                results.save_requested = False
            if results.stop_requested:
                return

    def _due(self, interval: int | None, is_last: bool) -> bool:
        return is_last or bool(interval and self.progress.step % interval == 0)

    def loader(self) -> Loader:
        """Return this rank's micro-batches, from the next step on."""
        return self.data.loader(
            self.stream,
            first_step=self.progress.step,
            packs_per_step=self.progress.packs_per_step,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def validate(self) -> dict[str, float]:
        """Evaluate the held-out cells; empty if none of their tokens is masked."""
        assert self.validation is not None
        self.last_validation = self.validation.evaluate(self.step, self._beat)
        if not self.last_validation:
            self.say("No token of the held-out cells is masked: there is no validation loss.")
        return self.last_validation

    def save(self, final: bool) -> None:
        """Save a checkpoint of this step."""
        self.watchdog.beat(self.progress.step, "saving")
        self.saver.save(self.progress, self.stream, final)
