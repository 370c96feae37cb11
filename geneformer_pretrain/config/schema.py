"""The whole configuration: three groups, and the checks that span them.

Values live in `hydra_config/*.yaml` and nowhere else; `config.compose.load_config` composes them.
"""

import os
from dataclasses import dataclass

from geneformer_pretrain.config.data import DataConfig
from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.config.training import Fp8Recipe, TrainingConfig
from geneformer_pretrain.errors import require

PATH_KEYS = (
    "training.checkpoint_dir",
    "training.init_from",
    "training.init_gene_mapping",
    "data.path",
    "data.validation_path",
    "data.cache_dir",
    "data.vocab_path",
    "data.gene_set",
)


@dataclass
class Config:
    """The whole configuration."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig

    @property
    def fp8_by_kernels(self) -> bool:
        """True if PyTorch layers compute in FP8, by this project's kernels."""
        return self.training.use_fp8 and not self.model.use_te_layers

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
            not self.training.validate_every_n_steps or self.data.has_validation,
            f"training.validate_every_n_steps is {self.training.validate_every_n_steps}, and there is no held-out "
            "corpus to validate on: set data.validation_path or data.validation_fraction, or "
            "training.validate_every_n_steps=0.",
        )
        require(
            not self.training.keep_best or self.data.has_validation,
            "training.keep_best=True needs held-out cells to compare checkpoints by: set data.validation_path or "
            "data.validation_fraction, and training.validate_every_n_steps.",
        )
        require(
            not self.fp8_by_kernels or self.training.fp8_recipe is Fp8Recipe.delayed,
            f"training.fp8_recipe={self.training.fp8_recipe} needs model.use_te_layers=True; PyTorch layers have "
            "training.fp8_recipe=delayed.",
        )
        require(
            not self.fp8_by_kernels or self.model.hidden_act == "relu",
            f"training.use_fp8=True with PyTorch layers needs model.hidden_act=relu, not {self.model.hidden_act}; set "
            "model.use_te_layers=True, or training.use_fp8=False for BF16.",
        )
        require(
            not self.fp8_by_kernels or self.data.packing,
            "training.use_fp8=True with PyTorch layers needs data.packing=True; set model.use_te_layers=True, or "
            "training.use_fp8=False for BF16.",
        )
        require(
            not (self.training.compile and not self.data.packing),
            "training.compile=True needs data.packing=True: padded micro-batches change their shape each time.",
        )
