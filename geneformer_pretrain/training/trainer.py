"""The training run: build, resume, train, validate, save, export."""

import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from geneformer_pretrain.checkpoint.export import gather_weights, write_model
from geneformer_pretrain.checkpoint.state import (
    Progress,
    accumulation_steps,
    named_tensors,
    require_same_model,
    spread_optimizer_step,
)
from geneformer_pretrain.checkpoint.store import CheckpointStore, read_manifest
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.batch import Batch, PackedBatch
from geneformer_pretrain.data.dataset import check_data, open_training_data, open_validation_data
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.data.vocabulary import apply_gene_set
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.engines import architecture, build_engine, check_engine, reshards_after_forward
from geneformer_pretrain.distributed.watchdog import Watchdog
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import CheckpointSaveError, ConfigError, TrainingError
from geneformer_pretrain.model.precision import check_machine, compute_dtype, forward_context, fp8_state
from geneformer_pretrain.run.archive import has_results, move_aside, require_no_other_use
from geneformer_pretrain.run.metrics import MetricsLog, cut_back
from geneformer_pretrain.run.record import CellLog, identity_of_rank, write_run_record
from geneformer_pretrain.run.signals import StopSignals
from geneformer_pretrain.run.writing import writing_to
from geneformer_pretrain.training.cuda_graphs import MicroBatchGraphs, takes_cuda_graphs
from geneformer_pretrain.training.optimizer import build_optimizer, learning_rate, update
from geneformer_pretrain.training.report import describe_end, describe_start
from geneformer_pretrain.training.step_results import PendingStep, StepResults, to_host
from geneformer_pretrain.training.validation import Validation

log = logging.getLogger(__name__)

T = TypeVar("T")

FP8_PREFIX = "fp8."
"""Of the names of FP8 scaling factors in a checkpoint. A run may go on in another precision: they are optional."""

MAX_FAILED_SAVES = 3
"""Saves that may fail in a row before training stops with an error."""

CONVERSION_TIMEOUT = timedelta(days=2)
"""How long ranks wait for the one that converts the corpus."""


class Trainer:
    """A run, from its configuration to its export.

    Parameters
    ----------
    config
        Checked configuration.
    world
        This process among all.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        training = config.training
        self.folder = Path(training.checkpoint_dir)
        if training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with it
            torch.use_deterministic_algorithms(True)

        self.ranks = ranks = Ranks(timeout=timedelta(minutes=30))
        ranks.together(lambda: apply_gene_set(config), ConfigError)
        ranks.agree_on(identity_of_rank(config), ConfigError)
        on_gpu = world.device.type == "cuda"
        compiled = on_gpu and config.data.packing if training.compile is None else training.compile

        def check() -> bool:
            check_machine(config, world.device)
            self.compute_dtype = compute_dtype(training.compute_dtype, world.device)
            self.forward_context = forward_context(config)
            check_engine(config, world, self.compute_dtype)
            return takes_cuda_graphs(config, world, compiled)

        with_graphs = ranks.together(check, ConfigError)[world.rank]
        ranks.agree_on({"whether to take CUDA graphs": with_graphs}, ConfigError)
        self._open_data(on_gpu)
        ranks.agree_on(asdict(self.data.fingerprint), ConfigError)
        if self.validation is not None:
            ranks.agree_on({"held-out corpus": self.validation.corpus.fingerprint}, ConfigError)
            ranks.together(self.validation.check, ConfigError)
        # Where ranks have GPUs of different sizes, the smallest decides.
        self.reshards = any(ranks.gather(reshards_after_forward(config, world, self.compute_dtype.itemsize)))
        self.engine = build_engine(config, world, self.compute_dtype, compiled, with_graphs, self.reshards)
        self.constant_shapes = compiled
        self.optimizer = build_optimizer(self.engine.model, training)

        self._write(lambda: require_no_other_use(self.folder))
        if not training.resume_from_checkpoint:
            previous = self._write(lambda: move_aside(self.folder))
            if previous is not None:
                self.say(f"The earlier run in {self.folder} is in {previous} now.")
        self.store = CheckpointStore(self.folder, keep_last_n=training.keep_last_n)
        self.progress = Progress(packs_per_step=training.gradient_accumulation_steps * world.size)
        self._resume()
        self.accumulation = accumulation_steps(self.progress.packs_per_step, world.size)
        self.graphs: MicroBatchGraphs | None = None
        if with_graphs:
            parameters = self.engine.model.parameters()
            self.graphs = MicroBatchGraphs(self.loss_of_packed, parameters, self.accumulation > 1, world.size > 1)
        self.stream = self.data.stream(self.progress.epoch, self.progress.epoch_first_pack)

        self.failed_saves = 0
        self.unconfirmed_save = False
        self.watchdog = Watchdog(training.hang_timeout_seconds, self.folder, world)

    def _open_data(self, on_gpu: bool) -> None:
        """Open the corpora. One rank of each node comes first: it may have to convert them, or fail at it, for hours.

        Raises
        ------
        ConfigError
            On every rank, if any of them cannot, with its reason.
        """

        def open_all() -> None:
            with logging_bugs(self.world.rank):
                self.data = open_training_data(self.config, self.world.is_main, pin_memory=on_gpu)
                held_out = open_validation_data(self.data, self.world.is_main)
                self.validation = None if held_out is None else Validation(held_out, self.world)

        self.ranks.together(lambda: check_data(self.config), ConfigError)
        patient = Ranks(CONVERSION_TIMEOUT)
        for converts in (True, False):
            is_turn = (self.world.local_rank == 0) is converts
            patient.together(open_all if is_turn else lambda: None, ConfigError)

    def _resume(self) -> None:
        """Load the newest good checkpoint, if there is any."""
        path = self.store.find_latest()
        if path is None:
            interval = self.config.training.save_every_n_steps
            previous = self._write(lambda: move_aside(self.folder) if has_results(self.folder, interval) else None)
            if previous is not None:
                self.say(f"{self.folder} had results but no checkpoint to go on from; they are in {previous} now.")
            return
        state = read_manifest(path)["state"]
        progress = Progress(**state["progress"])
        fingerprint, files = self.data.fingerprint, (self.data.files, state.get("data_files", {}))
        other_data = self.config.training.accept_changed_data and bool(fingerprint.changes(state["data"], *files))

        def check() -> None:
            require_same_model(architecture(self.config.model), state.get("model", {}), str(path))
            accumulation_steps(progress.packs_per_step, self.world.size)
            if not other_data:
                fingerprint.require_same(state["data"], str(path), *files)

        self.ranks.together(check, ConfigError)
        if other_data:
            self.say("The data changed: going on from the start of a new epoch.")
            progress.epoch, progress.epoch_first_pack = progress.epoch + 1, progress.next_pack
        tensors = self._tensors()
        self.store.load(path, tensors, optional=FP8_PREFIX)
        spread_optimizer_step(self.optimizer, tensors["optimizer.step"])
        wanted = self.progress.packs_per_step
        self.progress = progress
        self.say(f"Resumed from {path}: {progress.step} steps done.")
        if progress.packs_per_step != wanted:
            self.say(
                f"This run keeps its {progress.packs_per_step} packs per step; the configuration now asks for "
                f"{wanted}. Accumulation follows."
            )

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by canonical name."""
        tensors = named_tensors(self.engine.model, self.optimizer)
        self.engine.describe_shards(tensors)
        scaling = fp8_state(self.engine.model, self.forward_context)
        return tensors | {f"{FP8_PREFIX}{name}": tensor for name, tensor in scaling}

    def say(self, text: str) -> None:
        """Print on the main rank.

        Raises
        ------
        TrainingError
            Nobody reads the output any more, or its disk is full.
        """
        if self.world.is_main:
            try:
                print(text, flush=True)
            except OSError as error:
                raise TrainingError(f"The standard output cannot be written to: {error.strerror}.") from error

    def fit(self) -> bool:
        """Train to the last step and export.

        Returns
        -------
        Whether the run is complete; false if a signal stopped it after a checkpoint.
        """
        training, progress = self.config.training, self.progress
        self.say(describe_start(self))
        if progress.step > training.num_train_steps:
            self.say(
                f"This run has {progress.step} steps, more than training.num_train_steps={training.num_train_steps}: "
                "there is nothing left to train."
            )
        elif progress.step == training.num_train_steps:
            self.say(
                f"This run is complete: {progress.step} of {training.num_train_steps} steps are done. Raise "
                "training.num_train_steps to go on with it, or name another training.checkpoint_dir for a new one."
            )
        else:
            changes = self._write(self._record)
            if changes:
                self.say("\n  ".join(["Changed since the last start:", *changes]))
            with ExitStack() as stack:
                self._train(stack)
        self.store.wait()
        if progress.step < training.num_train_steps:
            self.say(f"Stopped by a signal after step {progress.step}; start again to go on from there.")
            return False
        self.say("Exporting the model.")
        weights = gather_weights(self.engine, self.world.is_main)
        final_model = self.folder / "final_model"
        self._write(lambda: write_model(weights, self.config.model, final_model))
        self.say(describe_end(self))
        return True

    def _train(self, stack: ExitStack) -> None:
        """The loop over optimizer steps."""
        training, progress, world = self.config.training, self.progress, self.world
        self.signals = stack.enter_context(StopSignals())
        loader = stack.enter_context(self.loader())
        self._write(lambda: self._open_logs(stack), on_all_ranks=True)
        stack.enter_context(self.watchdog)
        stack.callback(gc.unfreeze)
        first_step = progress.step + 1
        results = StepResults(self.config, world, progress, self.metrics, self.watchdog)
        while progress.step < training.num_train_steps:
            latest = self.train_step(loader)
            if progress.step == first_step:
                # What has been built and compiled stays. Walking through it again would stall a later step.
                gc.collect()
                gc.freeze()
            results.finish()
            results.pending = latest
            is_last = progress.step == training.num_train_steps
            if self._due(training.validate_every_n_steps, is_last):
                latest.validation_loss = self.validate()
            if results.stop_agreed or self._due(training.save_every_n_steps, is_last):
                results.finish()  # so that the checkpoint counts this step's cells, and metrics.jsonl has it
                self.save(final=is_last or results.stop_agreed)
            if results.stop_agreed:
                return

    def loader(self) -> Loader:
        """Return this rank's micro-batches, from the step that the run has got to."""
        return self.data.loader(
            self.stream,
            first_step=self.progress.step,
            packs_per_step=self.progress.packs_per_step,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _record(self) -> list[str]:
        cut_back(self.folder / "metrics.jsonl", self.progress.step)  # A damaged one is no reason to change config.yaml.
        return write_run_record(self.config, self.folder, self.progress.step)

    def _open_logs(self, stack: ExitStack) -> None:
        first_step, world = self.progress.step, self.world
        self.metrics: MetricsLog = stack.enter_context(MetricsLog(self.folder, first_step, self.config, world.is_main))
        is_wanted = self.config.training.log_cell_ids
        self.cell_log = stack.enter_context(CellLog(self.folder, world, first_step)) if is_wanted else None

    def _write(self, action: Callable[[], T], on_all_ranks: bool = False) -> T:
        """Run what writes to the checkpoint folder, on rank 0 or on all, and return what it gives on rank 0.

        Raises
        ------
        TrainingError
            On every rank, if any of them cannot write, with its reason.
        """

        def write() -> T | None:
            if not (on_all_ranks or self.world.is_main):
                return None
            try:
                with logging_bugs(self.world.rank), writing_to(self.folder, "training.checkpoint_dir"):
                    return action()
            except (ConfigError, OSError) as error:
                raise TrainingError(str(error)) from error

        return cast(T, self.ranks.together(write, TrainingError)[0])

    def _due(self, interval: int, is_last: bool) -> bool:
        return is_last or (interval > 0 and self.progress.step % interval == 0)

    def train_step(self, batches: Iterator[Batch]) -> PendingStep:
        """One optimizer step: forward and backward of each micro-batch, global normalisation, update."""
        progress, device = self.progress, self.world.device
        waited, tokens, cells, epoch = 0.0, 0, 0, 0
        packs: list[tuple[int, list[int]]] = []
        loss_sum = torch.zeros((), device=device)
        masked = torch.zeros((), dtype=torch.int64, device=device)
        for micro in range(self.accumulation):
            self.watchdog.beat(progress.step + 1, "waiting for data")
            started = time.perf_counter()
            batch = next_batch(batches, "data.path")
            waited += time.perf_counter() - started
            self.watchdog.beat(progress.step + 1, "forward and backward")
            micro_loss, micro_masked = self.forward_backward(batch, micro == self.accumulation - 1)
            loss_sum += micro_loss
            masked += micro_masked
            tokens, cells, epoch = tokens + batch.num_tokens, cells + batch.num_cells, batch.epoch
            packs.append((batch.pack, batch.cells.tolist()))
            if self.cell_log is not None:
                self.cell_log.write(progress.step + 1, batch)

        counts = torch.tensor([tokens, cells, self.signals.received is not None], dtype=torch.float64)
        if device.type == "cuda":
            counts = counts.pin_memory().to(device, non_blocking=True)
        totals = torch.cat([torch.stack([loss_sum.double(), masked.double()]), counts])
        self.watchdog.beat(progress.step + 1, "sums over ranks and update")
        dist.all_reduce(totals)
        rate = learning_rate(progress.step, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A loss that is not finite makes the scale NaN, which skips the update as a bad gradient does.
        scale = (self.engine.gradient_divisor / totals[1].clamp(min=1.0) + 0.0 * totals[0]).float()
        norm = update(self.optimizer, scale, self.config.training.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)

        progress.step += 1
        progress.next_pack += progress.packs_per_step
        host, ready = to_host(torch.cat([totals, norm.double()[None]]))
        return PendingStep(progress.step, rate, host, ready, time.perf_counter(), packs, epoch, waited)

    def forward_backward(self, batch: Batch, is_last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradients of one micro-batch, maybe the last of its step; return what `forward` does."""
        if self.graphs is not None:
            assert isinstance(batch, PackedBatch)
            return self.graphs.run(batch, dropout_seed(self.config.training.seed, batch.pack), is_last)
        with self.engine.micro_batch(is_last):
            loss_sum, masked = self.forward(batch)
            loss_sum.backward()
        return loss_sum.detach(), masked

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies and number of masked tokens of one micro-batch.

        Dropout belongs to the pack, not to the rank: the generators are seeded with its number.
        """
        torch.manual_seed(dropout_seed(self.config.training.seed, batch.pack))
        batch = batch.to(self.world.device, non_blocking=True)
        with self.forward_context():
            if isinstance(batch, PackedBatch):
                return self.loss_of_packed(batch)
            (logits,) = self.engine.module(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, return_dict=False
            )
        masked = (batch.labels != -100).sum()
        # Not output.loss * masked: the mean over no masked token at all is not a number.
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"), masked

    def loss_of_packed(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies and number of masked tokens of a packed micro-batch on the device."""
        parts = batch.parts
        # Compiled code wants constant shapes; elsewhere unused room for masked tokens would only cost time.
        used = len(parts.labels) if self.constant_shapes else batch.num_masked
        # A tuple, because module hooks of sharding engines look for tensors in nothing else.
        _, loss_sum, num_labels = self.engine.module(
            input_ids=parts.input_ids,
            position_ids=parts.position_ids,
            cu_seqlens=parts.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            masked_index=parts.masked_index[:used],
            labels=parts.labels[:used],
            return_dict=False,
        )
        return loss_sum, num_labels

    @torch.no_grad()
    def validate(self) -> float | None:
        """Loss on held-out cells, without dropout; None if there are none, or if none of their tokens is masked."""
        if self.validation is None:
            return None

        def forward(batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
            self.watchdog.beat(self.progress.step, "validating")
            return self.forward(next_batch(batches, "data.validation_path"))

        self.engine.model.eval()
        loss = self.validation.mean_loss(forward)
        self.engine.model.train()
        self.engine.end_evaluation()
        if loss is None:
            self.say("No token of the held-out cells is masked: there is no validation loss.")
        return loss

    def save(self, final: bool) -> None:
        """Save a checkpoint; a failed save is survived, unless it is the last one or one too many."""
        progress = self.progress
        self.watchdog.beat(progress.step, "saving")
        vars(progress).update(self.stream.state_at(progress.next_pack))
        state = {
            "progress": asdict(progress),
            "data": asdict(self.data.fingerprint),
            "data_files": self.data.files,
            "model": architecture(self.config.model),
        }
        blocking = final or not self.config.training.async_save
        unconfirmed, self.unconfirmed_save = self.unconfirmed_save, not blocking
        with self._surviving(final=False):
            self.store.wait()
            if unconfirmed:
                self.failed_saves = 0
        with self._surviving(final):
            self.store.save(
                progress.step,
                self._tensors(),
                state,
                self.engine.checkpoint_format,
                blocking=blocking,
            )
            if blocking:
                self.failed_saves = 0

    @contextmanager
    def _surviving(self, final: bool) -> Iterator[None]:
        """Count a failed save; raise it only where `final` or one too many in a row."""
        try:
            yield
        except CheckpointSaveError as error:
            self.failed_saves += 1
            self.say(f"Saving failed ({self.failed_saves} of {MAX_FAILED_SAVES} in a row): {error}")
            if final or self.failed_saves >= MAX_FAILED_SAVES:
                raise


@contextmanager
def logging_bugs(rank: int) -> Iterator[None]:
    """Log the traceback of what is no error of the user's: what the ranks agree on has no room for it."""
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception:
        log.exception("rank %d failed", rank)
        raise


def next_batch(batches: Iterator[Batch], key: str) -> Batch:
    """The next batch of the corpus that `key` names; a damaged token, plan or cache is a `TrainingError`."""
    try:
        return next(batches)
    except ValueError as error:
        raise TrainingError(f"{key}: {error}") from error
    except RuntimeError as error:
        raise TrainingError(str(error)) from error


def dropout_seed(seed: int, pack: int) -> int:
    """Seed of the dropout generators for one pack."""
    return int.from_bytes(hashlib.sha256(f"dropout:{seed}:{pack}".encode()).digest()[:8], "little") >> 1
