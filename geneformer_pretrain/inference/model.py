"""Load a trained model for inference, with the genes that its tokens stand for."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from geneformer_pretrain.config.model import MAX_TOKENS_KEY
from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import ConfigError, DataError
from modeling_bert_te import BertForMaskedLM, BertModel, FlashAttention

if TYPE_CHECKING:
    from geneformer_pretrain.inference.kernels import InferenceFused
    from geneformer_pretrain.tokenization.gene_set import GeneSet

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold a model's weights, or list those that do."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TUNED_HEADS = (16, 32, 64)
"""Head sizes for which this project's attention kernel is the faster one on Hopper."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model on its device, in its compute dtype.

    Attributes
    ----------
    path
        Folder that it came from.
    bert
        Embeddings and encoder layers; the head is not kept.
    gene_set
        What its tokens stand for.
    is_special
        bool [V], tokens that are no genes.
    max_tokens
        Longest cell that it can read.
    trained_tokens
        Longest cell that it was trained on, where its export says so, else `max_tokens`.
    fingerprint
        Hash of its configuration and weights.
    fused
        This project's kernels of the layers, if they run by them.
    """

    path: Path
    bert: BertModel
    gene_set: GeneSet
    is_special: np.ndarray
    max_tokens: int
    trained_tokens: int
    fingerprint: str
    fused: InferenceFused | None = None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.bert.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.bert.embeddings.word_embeddings.weight.dtype

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.bert.embeddings.word_embeddings.num_embeddings

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.bert.embeddings.word_embeddings.embedding_dim

    @property
    def num_layers(self) -> int:
        """Encoder layers."""
        return len(list(self.bert.encoder["layer"].children()))

    @property
    def cls_token(self) -> int | None:
        """Token that begins every cell, if the model has one."""
        return self.gene_set.special_tokens.get("cls")

    @property
    def has_own_attention(self) -> bool:
        """Whether attention is this project's kernel, not PyTorch's."""
        return not isinstance(self.bert.attention, FlashAttention)

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens: int32 [T], int32 [T] -> [T, H]."""
        if self.fused is None:
            return cast(torch.Tensor, self.bert.embeddings(input_ids, position_ids, None))
        return self.fused.embed(self.bert.embeddings, input_ids, position_ids)

    def num_layers_below(self, layer: int) -> int:
        """Layers to compute for a hidden state counted as `hidden_states` does: 0 the embeddings, -1 the last.

        Raises
        ------
        ConfigError
            There is no such hidden state.
        """
        states = self.num_layers + 1
        if not -states <= layer < states:
            raise ConfigError(
                f"--layer {layer}: {self.path} has {amount(self.num_layers, 'layer')}; choose from 0 (embeddings) to "
                f"{self.num_layers} (last), or from -1 (last) to {-states} (embeddings)."
            )
        return layer % states

    def flops_per_token(self, layer: int, length: float) -> float:
        """Floating-point operations of a forward pass for one token of a cell of `length` tokens."""
        h, f = self.hidden_size, self.bert.config.intermediate_size
        return self.num_layers_below(layer) * (2 * (4 * h * h + 2 * h * f) + 4 * h * length)


def load_model(
    path: str | Path,
    *,
    gene_set: str | Path | None = None,
    dtype: str = "auto",
    device: torch.device | None = None,
) -> Model:
    """Load a model of the Geneformer family: this project's export or any Hugging Face BERT.

    Parameters
    ----------
    path
        Folder with `config.json` and weights.
    gene_set
        Gene-set folder; by default the one in the model's folder.
    dtype
        "float32", "bfloat16", or "auto": bfloat16 on GPUs that have it, else float32.
    device
        The current GPU or the CPU if not given.

    Raises
    ------
    DataError
        A folder without a usable model, weights that are not finite, no gene set or one of another size.
    ConfigError
        bfloat16 on a GPU without it.
    """
    folder = Path(path)
    if not folder.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise DataError(
            f"{path}: no such folder, and a model is read from one on this machine. If this is a model of the Hugging "
            f"Face Hub, download it with `hf download {path} --local-dir FOLDER` and name FOLDER."
        )
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: no config.json; name a model, such as a run's final_model, or `export` a checkpoint first."
        )
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "bert":
        raise DataError(f"{folder / 'config.json'}: model_type is {kind!r}; this command runs models of type 'bert'.")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise DataError(f"{folder}: no weights ({WEIGHTS[0]} or {WEIGHTS[2]}); name a complete model.")
    genes = _gene_set(folder, gene_set)
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    compute = _compute_dtype(dtype, device)
    loaded = _load_weights(folder)
    fused = _use_fast_kernels(loaded, device, compute)
    bert: BertModel = loaded.bert.to(device=device, dtype=compute).eval()
    embeddings = bert.embeddings
    vocab_size = embeddings.word_embeddings.num_embeddings
    if vocab_size != len(genes.tokens):
        raise DataError(
            f"{folder}: the model has {vocab_size:,} tokens, the gene set {genes.name!r} {len(genes.tokens):,}; name "
            "the gene set that the model was trained with (--gene-set)."
        )
    is_special = np.arange(vocab_size) < genes.num_special_tokens
    max_tokens = min(genes.max_tokens, embeddings.position_embeddings.num_embeddings)
    trained_tokens = min(max_tokens, config.get(MAX_TOKENS_KEY) or max_tokens)
    fingerprint = _fingerprint(folder / "config.json", weights)
    return Model(folder, bert, genes, is_special, max_tokens, trained_tokens, fingerprint, fused)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); copy the model again.") from error


def _gene_set(folder: Path, given: str | Path | None) -> GeneSet:
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    own = folder / "gene_set.json"
    if given is not None:
        genes = GeneSet.load(Path(given))
        if own.is_file() and (theirs := GeneSet.load(folder)).fingerprint != genes.fingerprint:
            raise DataError(
                f"--gene-set {given}: the model was trained with another one, {theirs.name!r}; leave the option out."
            )
        return genes
    if not own.is_file():
        raise DataError(
            f"{folder}: the model does not say which genes its tokens stand for (no gene_set.json); add --gene-set "
            "GENES with a folder that `gene-set import` or `gene-set build` wrote."
        )
    return GeneSet.load(folder)


def _compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    has_bfloat16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    if choice == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16 else torch.float32
    if choice == "bfloat16" and not has_bfloat16:
        raise ConfigError(f"{torch.cuda.get_device_name(device)} has no bfloat16; add --dtype float32.")
    return DTYPES[choice]


def _load_weights(folder: Path) -> BertForMaskedLM:
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except Exception as error:  # of safetensors, pickle, torch and transformers
        raise DataError(
            f"{folder}: the model cannot be loaded ({_first_line(error)}); if files are damaged, copy them again."
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("cls."))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{folder}: the weights lack {missing[0]}{more}; name a complete BERT.")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DataError(f"{folder}: {name} holds NaN or infinite values; the model's training diverged.")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _fingerprint(config: Path, weights: Path) -> str:
    """Hash the files of a model; of a list of weight files also those."""
    files = [config, weights]
    if weights.suffix == ".json":
        files += [weights.parent / name for name in sorted(set(_read_json(weights)["weight_map"].values()))]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _use_fast_kernels(model: BertForMaskedLM, device: torch.device, dtype: torch.dtype) -> InferenceFused | None:
    """Give a model this project's kernels where they are the faster ones: in BF16 on Hopper."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9 or dtype != torch.bfloat16:
        return None
    from geneformer_pretrain.inference.kernels import MAX_WIDTH, InferenceAttention, InferenceFused

    if model.config.hidden_size // model.config.num_attention_heads in TUNED_HEADS:
        model.set_attention(InferenceAttention())
    if model.config.hidden_size > MAX_WIDTH:
        return None
    fused = InferenceFused()
    model.set_fused_kernels(fused)
    return fused
