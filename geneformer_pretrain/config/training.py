"""The group `training`: optimization, precision, engine, checkpoints and tracking."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from geneformer_pretrain.errors import require


class LrSchedule(StrEnum):
    """Course of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class ComputeDtype(StrEnum):
    """Dtype of activations and of the weights' working copies; main weights are always FP32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class WandbModel(StrEnum):
    """How exported models become W&B artifacts."""

    reference = "reference"
    upload = "upload"


class Fp8Recipe(StrEnum):
    """How Transformer Engine scales FP8 tensors."""

    delayed = "delayed"
    current = "current"
    block = "block"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


@dataclass
class TrainingConfig:
    """Optimisation, precision, engine, checkpoints and tracking."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    lr_schedule: LrSchedule
    """After warm-up: constant, linear decay to zero or cosine decay to zero at num_train_steps."""
    warmup_steps: int | None
    """Steps over which the learning rate rises linearly to its peak; null: a tenth of num_train_steps."""
    num_train_steps: int
    """Optimizer steps of the whole run, earlier parts of a resumed run included."""
    gradient_accumulation_steps: int
    """Micro-batches per process and step at the first launch. A step has this number of packs times the number of
    processes; a resumed run keeps that product and accumulates accordingly."""
    weight_decay: float
    """AdamW's decay of weight matrices and embeddings; biases and LayerNorm are never decayed."""
    adam_beta1: float
    """AdamW's first-moment decay."""
    adam_beta2: float
    """AdamW's second-moment decay."""
    adam_eps: float
    """AdamW's epsilon."""
    max_grad_norm: float
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    mlm_probability: float
    """Share of gene tokens selected for prediction: of these 80% become <mask>, 10% a random gene, 10% stay."""
    seed: int
    """Decides initial weights, order of the cells, masks and dropout."""
    num_workers: int
    """Threads that build micro-batches in the background; 0 builds them in the main thread."""
    compute_dtype: ComputeDtype
    """Dtype of activations and of the weights' working copies; auto: bfloat16 on CUDA, float32 on the CPU. Main weights
    and optimizer state are always FP32."""
    compile: bool | None
    """torch.compile; null compiles on CUDA where packing keeps shapes constant."""
    cuda_graphs: bool | None
    """Record forward and backward of a micro-batch once and launch all its kernels together from then on: the host,
    which limits small models, is spared. On one GPU no result changes by a bit. On several, gradients are summed after
    the last micro-batch instead of during its backward: faster over NVLink; where GPUs of a node are linked by PCIe
    alone, try false. Needs GPUs, DDP, BF16, compiled PyTorch layers and no recomputing; null: where that is so, on one
    node, up to a hidden_size of 1,024."""
    deterministic: bool
    """Deterministic kernels: runs repeat bitwise on the same hardware, somewhat slower. The CPU does so anyway."""
    use_fp8: bool
    """FP8 matrix products of the encoder layers. PyTorch layers have them by this project's kernels, which need compute
    capability 9 (Hopper) or 10 (B200, where they never ran), packing and model.hidden_act=relu; Transformer Engine's
    from compute capability 8.9 on. Both scale alike, and a run may change between them and BF16."""
    fp8_recipe: Fp8Recipe
    """Scaling of FP8 tensors; PyTorch layers have delayed alone. block, mxfp8 and nvfp4 are refused where the GPU does
    not have them (the last two need compute capability 10)."""
    recompute_every_n_layers: int
    """Activation checkpointing: every n-th layer keeps only its input and is computed again in the backward, for
    less memory; 1: all layers, 0: none."""
    use_nvfsdp: bool
    """Shard with nvFSDP (today's name: Megatron-FSDP) instead of DDP."""
    use_fsdp2: bool
    """Shard with PyTorch's FSDP2 instead of DDP."""
    reshard_after_forward: bool | None
    """FSDP2 and nvFSDP free a layer's gathered weights after its forward and gather them again for its backward. false
    keeps them, for a step's further micro-batches too: at least a quarter less communication, for the memory of the
    whole model in BF16 (5.8 GB for 4b) on each GPU. null keeps them where the estimate with them stays below 85% of the
    GPU's memory; the start says which."""
    shard_group_size: int | None
    """Ranks that share one copy of weights and optimizer state; groups of so many ranks are replicas of each other
    (hybrid sharding, such as 8 on nodes of 8 GPUs). null: all ranks share one copy. Needs an engine that shards."""
    checkpoint_dir: str
    """Folder of checkpoints, metrics.jsonl, config.yaml, exit.json and final_model/; on several nodes a folder that all
    share."""
    init_from: str | None
    """Published model whose weights a new run starts from: a folder or file of Hugging Face BERT weights; null: random
    weights. A run that resumes ignores it."""
    init_gene_mapping: str | None
    """Table of two columns, this run's gene id and the published model's (aliases, orthologs), by which tokens are
    matched; null: by gene id."""
    init_extend_positions: bool
    """Allow more positions than the published model has: its table is repeated."""
    save_every_minutes: float
    """Checkpoint interval in minutes: a crash loses at most about this much work. 0: only save_every_n_steps counts.
    The last step is always saved."""
    save_every_n_steps: int | None
    """Checkpoint interval in steps, beside save_every_minutes; null: minutes alone."""
    keep_last_n: int
    """Good checkpoints kept; older ones are deleted."""
    keep_best: bool
    """Also keep the checkpoint with the lowest validation loss, and export it to best_model/ at the end."""
    async_save: bool
    """Write checkpoints in the background: training stands still only while weights are copied to host memory."""
    resume_from_checkpoint: bool
    """Go on from the newest good checkpoint. false moves an earlier run to previous-TIME/ and starts at 0."""
    accept_changed_data: bool
    """Resume although corpus, vocabulary, seed, masking or pack shape changed, from the start of a new epoch."""
    max_skipped_steps: int
    """Stop after this many updates in a row were skipped because a gradient was not finite."""
    skip_outlier_steps: float | None
    """Skip an update whose gradient norm lies more than this number of standard deviations above the running mean of
    about 100 steps, both of the logarithm; 6 catches bad batches alone. Never the first 100 steps after it was switched
    on, nor more than 5 in a row; docs/internals.md has the formula. null: none is skipped for that."""
    hang_timeout_seconds: float
    """End the run, naming the rank at fault, when it makes no progress for that long; 0 never does. It must exceed
    the longest single phase: compilation in the first step, a save, planning an epoch."""
    log_cell_ids: bool
    """Write the cell numbers of each micro-batch to cells/rank_R.jsonl in the checkpoint folder, for audits."""
    log_every_n_steps: int
    """Interval of records in metrics.jsonl, in steps. Trackers get a record at most once a second."""
    validate_every_n_steps: int
    """Interval of validation on the held-out cells, in steps; 0 validates at the end alone. Above 0 it needs
    data.validation_path or data.validation_fraction."""
    wandb_init_args: dict[str, Any] | None
    """Passed to wandb.init. Offline unless WANDB_API_KEY is set, or mode or WANDB_MODE says otherwise; null: no
    tracking, and wandb is not imported."""
    wandb_log_model: WandbModel | None
    """Make final_model and best_model W&B artifacts at the end of the run: reference records their place, upload copies
    their files. null: neither."""
    tensorboard: bool
    """Also write the records for TensorBoard, to tensorboard/ in the checkpoint folder."""

    def __post_init__(self) -> None:
        for name in [
            "num_train_steps",
            "gradient_accumulation_steps",
            "keep_last_n",
            "log_every_n_steps",
            "max_skipped_steps",
        ]:
            require(getattr(self, name) > 0, f"training.{name} is {getattr(self, name)}; it must be positive.")
        for name in [
            "learning_rate",
            "weight_decay",
            "adam_eps",
            "max_grad_norm",
            "num_workers",
            "validate_every_n_steps",
            "save_every_minutes",
            "seed",
            "hang_timeout_seconds",
            "recompute_every_n_layers",
        ]:
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name} is {value}; it must be a finite number, not negative.")
        require(
            self.init_from is not None or (self.init_gene_mapping is None and not self.init_extend_positions),
            "training.init_gene_mapping and training.init_extend_positions do nothing without training.init_from.",
        )
        require(
            self.save_every_n_steps is None or self.save_every_n_steps > 0,
            f"training.save_every_n_steps is {self.save_every_n_steps}; it must be positive, or null.",
        )
        require(
            self.save_every_n_steps is not None or self.save_every_minutes > 0,
            "training.save_every_minutes=0 and training.save_every_n_steps=null: nothing would be saved before the "
            "last step; set one of the two.",
        )
        require(
            self.skip_outlier_steps is None or 2 <= self.skip_outlier_steps < math.inf,
            f"training.skip_outlier_steps is {self.skip_outlier_steps}; it must be at least 2 standard deviations (6 "
            "catches bad batches alone), or null.",
        )
        require(
            self.wandb_log_model is None or self.wandb_init_args is not None,
            f"training.wandb_log_model={self.wandb_log_model} does nothing without training.wandb_init_args.",
        )
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"training.warmup_steps is {self.warmup_steps}; it must not be negative.",
        )
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        require(
            0 < self.mlm_probability < 1,
            f"training.mlm_probability is {self.mlm_probability}; it must lie between 0 and 1 (BERT: 0.15).",
        )
        require(
            not (self.use_nvfsdp and self.use_fsdp2),
            "training.use_nvfsdp and training.use_fsdp2 are both true; choose one engine.",
        )
        require(
            self.shard_group_size is None or (self.shard_group_size > 0 and (self.use_nvfsdp or self.use_fsdp2)),
            f"training.shard_group_size is {self.shard_group_size}; it takes a positive number of ranks, and an engine "
            "that shards: training.use_fsdp2=True or training.use_nvfsdp=True.",
        )
        require(
            self.reshard_after_forward is None or self.use_fsdp2 or self.use_nvfsdp,
            f"training.reshard_after_forward={self.reshard_after_forward} is a choice of engines that shard: set "
            "training.use_fsdp2=True or training.use_nvfsdp=True as well.",
        )
        require(
            self.hang_timeout_seconds <= 1e6,
            f"training.hang_timeout_seconds is {self.hang_timeout_seconds}; it must be at most 1e6 (0: no watchdog).",
        )
        require(bool(self.checkpoint_dir), "training.checkpoint_dir is empty; name a folder.")
