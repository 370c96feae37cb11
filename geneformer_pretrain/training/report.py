"""What a person is told at the start and at the end of a run."""

import math
from typing import TYPE_CHECKING

import torch

from geneformer_pretrain.model.memory import estimate_peak
from geneformer_pretrain.run.record import config_as_yaml
from geneformer_pretrain.training.optimizer import learning_rate, warmup_steps
from modeling_bert_te import FlashAttention

if TYPE_CHECKING:
    from geneformer_pretrain.training.trainer import Trainer


def describe_start(run: "Trainer") -> str:
    """The configuration, what came of it, and what may not have been meant."""
    config, world, model, shape = run.config, run.world, run.engine.model, run.data.shape
    tokens = run.stream.num_tokens - run.stream.dropped_tokens
    filled = tokens / shape.token_budget if config.data.packing else run.stream.num_cells / shape.max_cells
    steps_of_epoch = math.ceil(filled / run.progress.packs_per_step)
    count = sum(p.numel() for p in model.parameters())
    layers = "Transformer Engine" if config.model.use_te_layers else "PyTorch"
    lines = [
        config_as_yaml(config),
        f"model       {count:,} parameters, {layers} layers",
        f"corpus      {run.data.corpus.num_cells:,} cells, {run.data.corpus.num_tokens:,} tokens",
    ]
    if run.validation is not None:
        held_out = run.validation.data.stream()
        lines.append(
            f"held out    {held_out.num_cells:,} cells, {held_out.num_tokens:,} tokens; a validation reads "
            f"{number(run.validation.num_packs(held_out), 'pack')}"
        )
        if run.data.chosen is None and run.validation.corpus.fingerprint == run.data.corpus.fingerprint:
            lines.append("            they are the cells of data.path: validation says nothing about cells not seen")
    lines += [
        f"micro-batch up to {shape.token_budget:,} tokens, {shape.max_cells} cells",
        f"step        {number(run.progress.packs_per_step, 'pack')}: {number(world.size, 'process', 'processes')} x "
        f"{number(run.accumulation, 'micro-batch', 'micro-batches')}",
        f"epoch       about {steps_of_epoch:,} steps; the run has {config.training.num_train_steps:,}",
        f"engine      {run.engine.name} on {world.device.type}",
        f"output      {run.folder}",
    ]
    if config.training.use_fsdp2:
        gathered = "for the forward and again for the backward" if run.reshards else "once a step"
        lines.append(f"weights     gathered {gathered}")
    if world.device.type == "cuda":
        attention = "PyTorch" if isinstance(model.bert.attention, FlashAttention) else "Triton"
        fused = "PyTorch" if model.head.fused is None else "Triton"
        launched = "one by one" if run.graphs is None else "a micro-batch at once (CUDA graphs)"
        there = torch.cuda.get_device_properties(world.device).total_memory
        itemsize = run.compute_dtype.itemsize
        peak = estimate_peak(config, world.size, count, itemsize, run.graphs is not None, run.reshards)
        lines += [
            f"kernels     {attention} for attention, {fused} beside matrix products; launched {launched}",
            f"memory      about {peak / 2**30:.1f} of {there / 2**30:.1f} GiB a GPU, by estimate",
        ]
    warmup, steps = warmup_steps(config.training), config.training.num_train_steps
    if warmup > steps:
        highest = learning_rate(steps - 1, config.training)
        lines.append(
            f"warm-up     its {warmup:,} steps are longer than the run of {steps:,}: the learning rate gets no "
            f"higher than {highest:.1e}. Set training.warmup_steps=null for a tenth of the run"
        )
    if run.stream.num_truncated:
        lines.append(
            f"truncated   {run.stream.num_truncated:,} cells are longer than model.seq_length={shape.seq_length}; "
            f"{run.stream.dropped_tokens:,} tokens at their ends are left out"
        )
    return "\n".join(lines)


def number(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def describe_end(run: "Trainer") -> str:
    """What was done, and where it lies."""
    progress = run.progress
    skipped = f", {progress.skipped_steps} updates skipped" if progress.skipped_steps else ""
    return "\n".join(
        [
            f"Done: {number(progress.step, 'step')}, {progress.cells:,} cells, {progress.tokens:,} tokens{skipped}.",
            f"model        {run.folder / 'final_model'}",
            f"checkpoints  {run.folder / f'step_{progress.step}'}",
            f"metrics      {run.folder / 'metrics.jsonl'}",
        ]
    )
