"""The lines that a run prints at its start and at its end."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from geneformer_pretrain.checkpoint.state import Progress
from geneformer_pretrain.config.resolved import Resolved
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.console import amount
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.kernels.select import is_hopper
from geneformer_pretrain.model.memory import estimate_peak, num_parameters
from geneformer_pretrain.run.record import config_as_yaml
from geneformer_pretrain.training.optimizer import learning_rate, warmup_steps
from geneformer_pretrain.training.validation import Validation

SAMPLE = Path(__file__).resolve().parents[2] / "sample_data" / "cells.parquet"
MAX_SAMPLE_EPOCHS = 20
"""Epochs of the sample beyond which a run is taken for a mistake."""

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables in which srun and mpirun say how many tasks they started."""


@dataclass(frozen=True)
class StartFacts:
    """Facts of a run that is about to train."""

    config: Config
    resolved: Resolved
    engine: str
    data: DataSource
    stream: PackStream
    validation: Validation | None
    packs_per_step: int
    device: torch.device


def describe_start(run: StartFacts) -> str:
    """Describe the configuration, the choices made, and settings that may be mistakes."""
    config, resolved, shape = run.config, run.resolved, run.data.shape
    corpus = run.data.corpus
    tokens = run.stream.num_tokens - run.stream.dropped_tokens
    packs = math.ceil(tokens / shape.token_budget if config.data.packing else run.stream.num_cells / shape.max_cells)
    steps_of_epoch = math.ceil(packs / run.packs_per_step)
    layers = "Transformer Engine" if config.model.use_te_layers else "PyTorch"
    lines = [
        config_as_yaml(config),
        f"resolved    {resolved}",
        f"model       {num_parameters(config.model):,} parameters, {layers} layers",
        f"corpus      {amount(corpus.num_cells, 'cell')}, {amount(corpus.num_tokens, 'token')}",
    ]
    if run.validation is not None:
        held_out = run.validation.stream
        lines.append(
            f"held out    {amount(held_out.num_cells, 'cell')}, {amount(held_out.num_tokens, 'token')}; a "
            f"validation reads {amount(run.validation.num_packs, 'pack')}, {amount(run.validation.num_cells, 'cell')}"
        )
        if run.validation.unigram_loss is not None:
            lines.append(f"            loss of a model without context: {run.validation.unigram_loss:.4f}")
        if run.data.chosen is None and run.validation.corpus.fingerprint == corpus.fingerprint:
            lines.append("            they are the cells of data.path: validation says nothing about cells not seen")
    lines += [
        f"micro-batch up to {shape.token_budget:,} tokens, {amount(shape.max_cells, 'cell')}",
        f"step        {amount(run.packs_per_step, 'pack')}: {amount(resolved.world_size, 'process', 'processes')} x "
        f"{amount(run.packs_per_step // resolved.world_size, 'micro-batch', 'micro-batches')}",
        f"epoch       {_epoch(packs, run.packs_per_step)}; the run has {config.training.num_train_steps:,}",
        f"engine      {run.engine} on {run.device.type}",
        f"output      {config.training.checkpoint_dir}",
    ]
    if config.training.use_fsdp2 or config.training.use_nvfsdp:
        gathered = "for the forward and again for the backward" if resolved.reshard_after_forward else "once a step"
        lines.append(f"weights     gathered {gathered}")
    if run.device.type == "cuda":
        lines += _on_gpu(run)
    return "\n".join(lines + _warnings(run, steps_of_epoch))


def _epoch(packs: int, packs_per_step: int) -> str:
    """Say how long an epoch is; one of fewer packs than a step has is read several times in each step."""
    if packs >= packs_per_step:
        return f"about {amount(math.ceil(packs / packs_per_step), 'step')}"
    return f"less than one step, which reads each cell {packs_per_step / packs:.1f} times"


def _on_gpu(run: StartFacts) -> list[str]:
    resolved, config = run.resolved, run.config
    names = {"triton": "Triton", "torch": "PyTorch"}
    launched = "a micro-batch at once (CUDA graphs)" if resolved.cuda_graphs else "one by one"
    available = torch.cuda.get_device_properties(run.device).total_memory
    peak = estimate_peak(
        config,
        resolved.world_size,
        num_parameters(config.model),
        resolved.itemsize,
        resolved.cuda_graphs,
        resolved.reshard_after_forward,
    )
    lines = [
        f"kernels     {names[resolved.attention_kernel]} for attention, {names[resolved.fused_kernels]} for fused "
        f"element-wise operations; launched {launched}"
    ]
    if config.fp8_by_kernels and not is_hopper(run.device):
        lines.append("            its FP8 kernels never ran on such a GPU: compare losses with training.use_fp8=false")
    return [*lines, f"memory      about {peak / 2**30:.1f} of {available / 2**30:.1f} GiB a GPU, by estimate"]


def _warnings(run: StartFacts, steps_of_epoch: int) -> list[str]:
    lines, config = [], run.config
    epochs = config.training.num_train_steps / steps_of_epoch
    if Path(config.data.path).resolve() == SAMPLE and epochs > MAX_SAMPLE_EPOCHS:
        lines += [
            "*" * 100,
            f"WARNING     this run trains on the {run.data.corpus.num_cells} simulated sample cells, {epochs:,.0f}",
            "            times over. It will learn no biology. Name your corpus: data.path=FOLDER",
            "*" * 100,
        ]
    tasks = max(int(os.environ.get(name) or 1) for name in TASKS)
    if run.resolved.world_size == 1 and tasks > 1:
        lines.append(
            f"alone       this process is one of {tasks} tasks of a launcher, and trains without the others: to train "
            "together, start one torchrun a node (docs/scaling.md)"
        )
    warmup, steps = warmup_steps(config.training), config.training.num_train_steps
    if warmup > steps:
        highest = learning_rate(steps - 1, config.training)
        lines.append(
            f"warm-up     its {warmup:,} steps are longer than the run of {steps:,}: the learning rate gets no "
            f"higher than {highest:.1e}. Set training.warmup_steps=null for a tenth of the run"
        )
    longest, positions = run.data.shape.seq_length, config.model.max_position_embeddings
    if longest < positions:
        lines += [
            f"positions   only the first {longest:,} of {positions:,} are trained (model.seq_length); embed and",
            f"            perturb will cut cells to {longest:,} tokens, or lower model.max_position_embeddings",
        ]
    if run.stream.num_truncated:
        lines.append(
            f"truncated   cells longer than model.seq_length={run.data.shape.seq_length}: {run.stream.num_truncated:,}"
            f"; tokens at their ends, left out: {run.stream.dropped_tokens:,}"
        )
    return lines


def describe_nothing_left(step: int, steps: int) -> str:
    """Say why a run that is complete does not train."""
    if step > steps:
        return (
            f"This run has {amount(step, 'step')}, more than training.num_train_steps={steps}: there is nothing left "
            "to train."
        )
    return (
        f"This run is complete: {step:,} of {amount(steps, 'step')} done. Raise training.num_train_steps to go on with "
        "it, or name another training.checkpoint_dir for a new one."
    )


def describe_end(progress: Progress, folder: Path, validation: dict[str, float]) -> str:
    """Describe the work done, and where its results are.

    Parameters
    ----------
    validation
        Metrics of the last validation; empty if there was none.
    """
    skipped = f", {amount(progress.skipped_steps, 'update')} skipped" if progress.skipped_steps else ""
    if progress.outlier_steps:
        skipped += f", {progress.outlier_steps} skipped as outliers"
    lines = [
        f"Done: {amount(progress.step, 'step')}, {amount(progress.cells, 'cell')}, {progress.tokens:,} tokens"
        f"{skipped}.",
        f"model        {folder / 'final_model'}",
    ]
    if progress.best_step is not None and (folder / "best_model").is_dir():
        lines.append(f"best model   {folder / 'best_model'} (step {progress.best_step}, {progress.best_loss:.4f})")
    if validation:
        loss, accuracy = validation["validation_loss"], validation["validation_accuracy"]
        lines.append(
            f"validation   loss {loss:.4f}, accuracy {accuracy:.2%} of masked genes; a model without context has loss "
            f"{validation['validation_unigram_loss']:.4f}"
        )
    lines += [
        f"checkpoints  {folder / f'step_{progress.step}'}",
        f"metrics      {folder / 'metrics.jsonl'}",
    ]
    return "\n".join(lines)
