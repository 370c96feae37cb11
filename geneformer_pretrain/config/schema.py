"""The configuration tree: every key, its type, its meaning and the checks that span several keys.

Values live in `hydra_config/*.yaml` and nowhere else. `load_config` composes them with Hydra, and
`resolve` turns a composed configuration into these dataclasses: an unknown key, a wrong type or a
missing value is an error there, an impossible combination one in `__post_init__`.
"""

import math
import os
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from transformers.activations import ACT2FN

from geneformer_pretrain.config.overrides import CONFIG_DIR as CONFIG_DIR
from geneformer_pretrain.config.overrides import (
    CONFIGURATIONS,
    IS_PART,
    MODELS,
    check_choice,
    read_overrides,
    without_plus,
)
from geneformer_pretrain.errors import ConfigError, require

PATH_KEYS = (
    "training.checkpoint_dir",
    "data.path",
    "data.validation_path",
    "data.cache_dir",
    "data.vocab_path",
    "data.gene_set",
)


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


class Fp8Recipe(StrEnum):
    """How Transformer Engine scales FP8 tensors."""

    delayed = "delayed"
    current = "current"
    block = "block"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


class Kernel(StrEnum):
    """Implementation of a part of the model; all compute the same."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


@dataclass
class ModelConfig:
    """The BERT architecture and the shape of a micro-batch."""

    model_type: str
    """Always "bert"."""
    vocab_size: int
    """Number of tokens, special ones included."""
    hidden_size: int
    """Width of the residual stream; a multiple of num_attention_heads."""
    num_hidden_layers: int
    """Encoder layers."""
    num_attention_heads: int
    """Attention heads; heads of 64 run fastest."""
    intermediate_size: int
    """Width of the feed-forward layer."""
    hidden_act: str
    """Activation of the feed-forward layer and of the head, by its name in transformers."""
    hidden_dropout_prob: float
    """Dropout on embeddings and on both residual branches."""
    attention_probs_dropout_prob: float
    """Dropout on attention weights."""
    max_position_embeddings: int
    """Rows of the position table; at least seq_length."""
    type_vocab_size: int
    """Rows of the token-type table; row 0 is used."""
    initializer_range: float
    """Standard deviation of the initial weights."""
    layer_norm_eps: float
    """Added to the variance in LayerNorm."""
    pad_token_id: int
    """Id of the padding token."""
    micro_batch_size: int
    """Cells per device and micro-batch. With packing, the token budget is micro_batch_size * seq_length."""
    seq_length: int
    """Longest cell, in tokens; longer cells are truncated (they are in rank order) and counted."""
    use_te_layers: bool
    """Encoder layers from Transformer Engine modules instead of PyTorch's: the same mathematics."""
    attention_kernel: Kernel
    """triton: this project's kernels for BF16 on GPUs from Hopper on. torch: FlashAttention in PyTorch, exact on the
    CPU. auto: the faster one."""
    fused_kernels: Kernel
    """What surrounds the matrix products: dropout with residual connection and LayerNorm, the gradients of ReLU, biases
    and residual connections, cross-entropy; with Transformer Engine layers LayerNorm and cross-entropy alone. triton:
    this project's kernels for BF16 on GPUs. torch: PyTorch's operations, compiled on GPUs. auto: the faster one."""

    def __post_init__(self) -> None:
        require(self.model_type == "bert", f"model.model_type is {self.model_type!r}; only 'bert' is supported.")
        for name in [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "micro_batch_size",
            "seq_length",
        ]:
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            require(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"model.{name} is {value}; it must be positive and finite.")
        if self.hidden_size % self.num_attention_heads:
            fitting = [str(n) for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            remedy = f"numbers of heads that divide it: {', '.join(fitting)}"
            if self.hidden_size % 64 == 0:
                remedy = f"heads of 64 want {self.hidden_size // 64} heads"
            raise ConfigError(
                f"model.hidden_size ({self.hidden_size}) is not divisible by model.num_attention_heads "
                f"({self.num_attention_heads}); {remedy}."
            )
        require(
            self.seq_length <= self.max_position_embeddings,
            f"model.seq_length ({self.seq_length}) exceeds model.max_position_embeddings "
            f"({self.max_position_embeddings}); lower the first or raise the second.",
        )
        require(
            self.hidden_act in ACT2FN,
            f"model.hidden_act is {self.hidden_act!r}; transformers knows {', '.join(sorted(ACT2FN))}.",
        )
        require(
            not any(True for _ in ACT2FN[self.hidden_act].parameters()),
            f"model.hidden_act={self.hidden_act} has trainable parameters of its own, which are not supported.",
        )
        require(
            0 <= self.pad_token_id < self.vocab_size,
            f"model.pad_token_id ({self.pad_token_id}) is outside of the vocabulary of {self.vocab_size} tokens.",
        )

    @property
    def token_budget(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch_size * self.seq_length


@dataclass
class TrainingConfig:
    """Optimisation, precision, engine, checkpoints and tracking."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    lr_schedule: LrSchedule
    """After warm-up: constant, linear decay to zero or cosine decay to zero at num_train_steps."""
    warmup_steps: int | None
    """Steps over which the learning rate rises linearly from zero; null: a tenth of num_train_steps."""
    num_train_steps: int
    """Optimizer steps of the whole run."""
    gradient_accumulation_steps: int
    """Micro-batches per device and optimizer step."""
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
    """auto is bfloat16 on CUDA and float32 on the CPU."""
    compile: bool | None
    """torch.compile; null compiles on CUDA where packing keeps shapes constant."""
    cuda_graphs: bool | None
    """Launch all kernels of a micro-batch at once, which spares the host and changes no result. Needs GPUs, DDP, BF16,
    compiled PyTorch layers and no recomputing; null: where that is so, on one node, up to a hidden_size of 1,024."""
    deterministic: bool
    """Deterministic kernels: runs repeat bitwise on the same hardware, somewhat slower."""
    use_fp8: bool
    """FP8 matrix products through Transformer Engine; needs TE layers and compute capability 8.9."""
    fp8_recipe: Fp8Recipe
    """delayed, current or block scaling; mxfp8 and nvfp4 need a GPU of compute capability 10."""
    recompute_every_n_layers: int
    """Activation checkpointing: every n-th layer keeps only its input and is computed again in the backward, for
    less memory; 1: all layers, 0: none."""
    use_nvfsdp: bool
    """Shard with nvFSDP (today's name: Megatron-FSDP) instead of DDP."""
    use_fsdp2: bool
    """Shard with PyTorch's FSDP2 instead of DDP."""
    reshard_after_forward: bool | None
    """FSDP2 frees a layer's gathered weights after its forward and gathers them again for its backward. false keeps
    them until the step's end: less communication, and the whole model in the compute dtype on each rank. null keeps
    them on GPUs whose memory suffices by the estimate."""
    shard_group_size: int | None
    """Ranks that share one copy of the weights, and of the optimizer state; the groups are replicas of each other
    (hybrid sharding). null: all ranks share one copy."""
    checkpoint_dir: str
    """Folder of checkpoints, metrics.jsonl, config.yaml and final_model."""
    save_every_n_steps: int
    """Checkpoint interval in steps; the last step is always saved."""
    keep_last_n: int
    """Good checkpoints kept; older ones are deleted."""
    async_save: bool
    """Write checkpoints in the background: training stops only while weights are copied to host memory."""
    resume_from_checkpoint: bool
    """Go on from the newest good checkpoint. false moves an earlier run to previous-TIME/ and starts at 0."""
    accept_changed_data: bool
    """Resume although corpus, vocabulary, seed or token budget changed, from the start of an epoch."""
    max_skipped_steps: int
    """Stop after this many updates in a row were skipped because a gradient was not finite."""
    hang_timeout_seconds: float
    """End the run, naming the rank at fault, when it makes no progress for that long; 0 never does. It must exceed
    the longest single phase: compilation in the first step, a save, planning an epoch."""
    log_cell_ids: bool
    """Write the cell numbers of each micro-batch to cells/rank_R.jsonl in the checkpoint folder, for audits."""
    log_every_n_steps: int
    """Interval of the progress bar, metrics.jsonl and wandb."""
    validate_every_n_steps: int
    """Interval of validation on data.validation_path; 0 validates at the end alone."""
    wandb_init_args: dict[str, Any] | None
    """Passed to wandb.init; offline unless WANDB_API_KEY or `mode` says otherwise. null: no tracking."""

    def __post_init__(self) -> None:
        for name in [
            "num_train_steps",
            "gradient_accumulation_steps",
            "save_every_n_steps",
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
            "seed",
            "hang_timeout_seconds",
            "recompute_every_n_layers",
        ]:
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name} is {value}; it must be a finite number, not negative.")
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
            self.reshard_after_forward is None or self.use_fsdp2,
            f"training.reshard_after_forward={self.reshard_after_forward} is a choice of FSDP2 alone: set "
            "training.use_fsdp2=True as well.",
        )
        require(
            self.hang_timeout_seconds <= 1e6,
            f"training.hang_timeout_seconds is {self.hang_timeout_seconds}; it must be at most 1e6 (0: no watchdog).",
        )
        require(bool(self.checkpoint_dir), "training.checkpoint_dir is empty; name a folder.")


@dataclass
class DataConfig:
    """The corpus and how it is packed."""

    path: str
    """Parquet file, folder or glob, or a Hugging Face save_to_disk folder, with a column input_ids."""
    validation_path: str | None
    """Held-out corpus of the same kinds; null: no validation."""
    validation_fraction: float | None
    """Share of the cells of data.path that are kept from training and validated on, chosen by a hash of their number:
    the same cells and masks in every run on this corpus. null: none."""
    validation_packs: int
    """Packs of the held-out corpus that a validation reads at most."""
    cache_dir: str
    """Folder of converted corpora and packing plans; safe to delete between runs."""
    vocab_path: str | None
    """Text file with one token a line in id order, checked against the model's vocabulary; null: no check."""
    gene_set: str | None
    """Gene-set folder that the corpus was tokenized with. It sets model.vocab_size, model.pad_token_id,
    data.mask_token_id and data.num_special_tokens, stands in for data.vocab_path, and a corpus of another gene set is
    refused. null: these keys hold."""
    num_special_tokens: int
    """Ids below this are special: never selected for prediction, never a random replacement."""
    mask_token_id: int
    """Id of <mask>."""
    packing: bool
    """Pack cells end to end. false pads each cell instead: the slow reference path."""
    max_cells_per_pack: int | None
    """Most cells of a pack; null derives it from the mean length, so that it hardly ever binds."""
    shuffle_block_cells: int | None
    """null shuffles the whole corpus; n shuffles blocks of n cells, for corpora larger than host memory."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path is empty; name a parquet file, folder or glob, or a save_to_disk folder.")
        require(bool(self.cache_dir), "data.cache_dir is empty; name a folder.")
        require(
            0 <= self.mask_token_id < self.num_special_tokens,
            f"data.mask_token_id ({self.mask_token_id}) must be below data.num_special_tokens "
            f"({self.num_special_tokens}), so that <mask> itself is never predicted.",
        )
        require(
            self.validation_fraction is None or 0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
        require(
            self.validation_fraction is None or self.validation_path is None,
            "data.validation_fraction and data.validation_path are both set; choose one.",
        )
        for name in ("validation_packs", "max_cells_per_pack", "shuffle_block_cells"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name} is {value}; it must be positive.")


@dataclass
class Config:
    """The whole configuration."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig

    def __post_init__(self) -> None:
        for key in PATH_KEYS:
            group, name = key.split(".")
            values = vars(getattr(self, group))
            if values[name] is not None:
                values[name] = os.path.expanduser(values[name])
        require(
            self.data.num_special_tokens < self.model.vocab_size,
            f"data.num_special_tokens ({self.data.num_special_tokens}) leaves no gene in model.vocab_size "
            f"({self.model.vocab_size}).",
        )
        require(
            self.model.pad_token_id < self.data.num_special_tokens,
            f"model.pad_token_id ({self.model.pad_token_id}) must be below data.num_special_tokens "
            f"({self.data.num_special_tokens}).",
        )
        require(
            self.model.pad_token_id != self.data.mask_token_id,
            f"model.pad_token_id and data.mask_token_id are both {self.data.mask_token_id}; give them different ids.",
        )
        require(
            not self.data.packing or self.model.token_budget % 128 == 0,
            f"model.micro_batch_size * model.seq_length is {self.model.token_budget}; packing needs a multiple "
            "of 128. Change one of the two.",
        )
        require(
            not self.training.validate_every_n_steps
            or self.data.validation_path is not None
            or self.data.validation_fraction is not None,
            f"training.validate_every_n_steps is {self.training.validate_every_n_steps}, and there is no held-out "
            "corpus to validate on: set data.validation_path or data.validation_fraction, or "
            "training.validate_every_n_steps=0.",
        )
        require(
            not self.training.use_fp8 or self.model.use_te_layers,
            "training.use_fp8=True needs model.use_te_layers=True: FP8 runs through Transformer Engine. Or set "
            "training.use_fp8=False for BF16.",
        )
        require(
            not (self.training.compile and not self.data.packing),
            "training.compile=True needs data.packing=True: padded micro-batches change their shape each time.",
        )


def unknown_key(key: str, otherwise: str = "") -> ConfigError:
    """The error for a key that does not exist, with the one whose name is most like it, or with `otherwise`."""
    known = {name.rpartition(".")[2]: name for name in all_keys()} | {
        group.name: group.name for group in fields(Config)
    }
    meant = [known[name] for name in get_close_matches(key.rpartition(".")[2], known, 1)]
    suggestion = f"did you mean {meant[0]}? " if meant else otherwise
    return ConfigError(f"Unknown configuration key {key}: {suggestion}docs/configuration.md lists all keys.")


def all_keys() -> list[str]:
    """Every key, as GROUP.KEY."""
    groups = get_type_hints(Config).items()
    return [f"{name}.{field.name}" for name, group in groups for field in fields(group)]


def check_names(config_name: str, overrides: list[str]) -> None:
    """Check that a configuration and what KEY=VALUE names exist: Hydra's advice on others leads astray.

    Raises
    ------
    ConfigError
        Naming what is unknown, and what may have been meant.
    """
    read = read_overrides(overrides)
    if any(override.key_or_group == "hydra.searchpath" for override in read):
        return  # Other configurations may be there, and keys for them to use.
    check_choice("configuration", config_name, *CONFIGURATIONS)
    groups = {group.name for group in fields(Config)}
    known = {*all_keys(), *groups}
    for override in read:
        key, value = override.key_or_group, override.value()
        root = re.split("[./]", key)[0]
        if root != "hydra" and ".".join(key.split(".")[:2]) not in known:
            raise unknown_key(key, otherwise="" if root in groups else f"{IS_PART} ")
        require(
            key != "model" or not (override.is_add() and isinstance(value, str)),
            f"{override.input_line}: there is a model already; change it with model={value}.",
        )
        require(
            key != "training.wandb_init_args" or not isinstance(value, list),
            f"{key}: {value} is a list; give names and values, {key}={{name: trial}}, or null.",
        )
        if key == "model" and isinstance(value, str) and "${" not in value:
            check_choice("model", value, *MODELS)


def resolve(composed: DictConfig) -> Config:
    """Type, complete and check a composed configuration.

    Raises
    ------
    ConfigError
        Naming the offending key.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), composed)
        missing = sorted(OmegaConf.missing_keys(typed))
        require(not missing, f"No value for {', '.join(missing)}; give each one in YAML or as KEY=VALUE.")
        config = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise unknown_key(str(error.full_key)) from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        told = f"Configuration key {key}: {reason}" if key else reason
        raise ConfigError(f"{told}. docs/configuration.md tells what each key may be.") from error
    assert isinstance(config, Config)
    return config


def load_config(name: str = "l0_sanity", overrides: list[str] | None = None) -> Config:
    """Compose `hydra_config/NAME.yaml` with overrides (as on the command line) and resolve it."""
    check_names(name, overrides or [])
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return resolve(compose(name, overrides=[without_plus(override) for override in overrides or []]))
