"""Starts a run from the weights of a published model: any Hugging Face BERT of the Geneformer family.

Weights are copied straight from memory-mapped files into the pieces that a rank holds, so that no engine needs a copy
of the whole model. With another vocabulary, rows of the word embeddings are matched by an index; new tokens start near
the mean of the published embeddings, drawn from a generator seeded with seed, name and row: equal on all ranks.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geneformer_pretrain.checkpoint.manifest import MANIFEST
from geneformer_pretrain.checkpoint.shards import Shards, StoredPiece, StoredTensor, TensorInfo
from geneformer_pretrain.checkpoint.tensor_files import load_pickled, open_safetensors
from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import ConfigError
from modeling_bert_te import canonical_name

WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
BIAS = "cls.predictions.bias"
HEAD = "cls.predictions."

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that Hugging Face gives a model's weights; with ".index.json" behind, a list of several files."""

UNUSED = ("bert.pooler.", "bert.embeddings.position_ids", "cls.predictions.decoder.")
"""Prefixes of published tensors that this model has no place for. The decoder is tied to the word embeddings."""

COMPARED = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Keys of config.json that shapes do not show, and that make another function of the same weights."""

REQUIRED = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}
"""Keys of config.json that have to be so, or absent."""


@dataclass(frozen=True)
class PublishedStart:
    """How a run started from a published model.

    Attributes
    ----------
    path
        The model's folder or file.
    num_tokens, num_matched
        Size of this run's vocabulary, and how many of its tokens have the published model's embeddings.
    positions
        Lengths of the published table of positions and of this run's.
    missing
        Parameters that the file does not have, which keep their initial values: the head, or none.
    """

    path: Path
    num_tokens: int
    num_matched: int
    positions: tuple[int, int]
    missing: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """Describe the start, one fact a line."""
        lines = [f"Starting from the weights of {self.path}."]
        if self.num_matched < self.num_tokens:
            new = self.num_tokens - self.num_matched
            lines.append(
                f"{self.num_matched:,} of {self.num_tokens:,} tokens have its embeddings; {amount(new, 'new one')} "
                "from their mean plus noise."
            )
        before, now = self.positions
        if before < now:
            lines.append(f"Positions are extended from {before:,} to {now:,}: its table of positions is repeated.")
        if self.missing:
            lines.append("It has no masked-language-model head: the head starts from random values.")
        return lines


@torch.no_grad()
def load_published(
    tensors: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    path: str | Path,
    *,
    rows: NDArray[np.integer] | None = None,
    extend_positions: bool = False,
    seed: int,
) -> PublishedStart:
    """Copy the weights of a published model into this run's parameters, in place; needs no other rank.

    Nothing is changed unless everything fits.

    Parameters
    ----------
    tensors
        This run's parameters by canonical name: plain tensors or `DTensor`, of any engine.
    architecture
        The keys of this run's model group that stock BERT knows.
    path
        Folder of a Hugging Face model (BertForMaskedLM, BertForPreTraining, BertModel or one with another head), or
        its file of weights: safetensors, or `pytorch_model.bin`, from which only tensors are unpickled.
    rows
        For each token of this run's vocabulary the row of the published one, -1 for a new token; [vocab_size].
        By default both have the same vocabulary.
    extend_positions
        Allow a longer table of positions than the published one, which is then repeated (Beltagy et al.,
        "Longformer", 2020, section 5).
    seed
        Of the noise of new tokens.

    Raises
    ------
    ConfigError
        If the model cannot be read or does not fit, with each key that differs.
    """
    path = Path(path)
    published, config = _open_published(path)
    problems = list(_differences(published, config, architecture, rows, extend_positions))
    if problems:
        raise ConfigError(f"training.init_from: {path} does not fit this run:\n  " + "\n  ".join(problems))
    missing = tuple(name for name in tensors if name not in published)
    targets = {name: Shards.of(name, tensor) for name, tensor in tensors.items() if name not in missing}
    _require_names(path, published, targets, missing)

    num_positions, num_tokens = architecture["max_position_embeddings"], architecture["vocab_size"]
    published_positions = published[POSITIONS].info.shape[0]
    row_maps: dict[str, NDArray[np.integer]] = {}
    if rows is not None:
        row_maps = {WORDS: rows, BIAS: rows}
    if num_positions > published_positions:
        row_maps[POSITIONS] = np.arange(num_positions) % published_positions
    for name, target in targets.items():
        if name in row_maps:
            noise = architecture["initializer_range"] if name == WORDS else 0.0
            _copy_rows(name, published[name], target, row_maps[name], seed, noise)
        else:
            published[name].copy_to(name, target)
    num_matched = num_tokens if rows is None else int((rows >= 0).sum())
    return PublishedStart(path, num_tokens, num_matched, (published_positions, num_positions), missing)


# Reading


def _open_published(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Open tensors by canonical name, and config.json if there is one."""
    try:
        found: dict[str, StoredTensor] = {}
        for file in _weight_files(path):
            found |= _open_file(file)
        config_file = (path if path.is_dir() else path.parent) / "config.json"
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        return _renamed(found), config
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"training.init_from: {path} cannot be read: {error}") from None


def _weight_files(path: Path) -> list[Path]:
    """List the files that hold a model's weights."""
    if path.is_file():
        return [path]
    if (path / MANIFEST).is_file():
        raise ConfigError(
            f"training.init_from: {path} is a checkpoint of a run; export it first: "
            f"geneformer-pretrain export {path} --output DIR."
        )
    for name in WEIGHT_FILES:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
            return [path / Path(each).name for each in sorted(names)]
    raise ConfigError(
        f"training.init_from: {path} is no Hugging Face model: neither {' nor '.join(WEIGHT_FILES)} is there."
    )


def _open_file(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as content:
        if content.read(20) == b"version https://git-":
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    if file.suffix != ".safetensors":
        return {name: StoredTensor.whole(tensor) for name, tensor in load_pickled(file).items()}
    opened = open_safetensors(file)
    return {name: _stored(opened, name) for name in opened.keys()}  # noqa: SIM118 - not a dict


def _stored(opened: Any, name: str) -> StoredTensor:
    # Mapped from the file: nothing is read before it is used.
    tensor = opened.get_tensor(name)
    shape = tuple(tensor.shape)
    piece = StoredPiece((0,) * tensor.ndim, shape, lambda: opened.get_tensor(name))
    return StoredTensor(TensorInfo(shape, tensor.dtype), [piece])


def _renamed(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Name tensors as BertForMaskedLM does; those of a bare BertModel have no prefix."""
    has_prefix = any(name.startswith("bert.") for name in found)
    renamed = {canonical_name(name if has_prefix else f"bert.{name}"): tensor for name, tensor in found.items()}
    decoder_bias = renamed.get(f"{HEAD}decoder.bias")
    if decoder_bias is not None:  # the same parameter as the head's, which some releases save under this name alone
        renamed.setdefault(BIAS, decoder_bias)
    for name in (WORDS, POSITIONS):
        if name not in renamed or len(renamed[name].info.shape) != 2:
            raise ValueError(f"it has no matrix {name}, so it is no BERT")
    return renamed


# Checking


def _differences(
    published: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    architecture: Mapping[str, Any],
    rows: NDArray[np.integer] | None,
    extend_positions: bool,
) -> Iterable[str]:
    """Yield a line for each key in which the published model does not fit."""
    there = _architecture_of(published)
    for key, value in there.items():
        here = architecture[key]
        if key == "vocab_size":
            yield from _vocabulary_differences(value, here, rows)
        elif key == "max_position_embeddings" and here > value:
            if not extend_positions:
                yield (
                    f"model.{key}: {value:,} there, {here:,} here; training.init_extend_positions=true repeats its "
                    "table of positions"
                )
        elif value != here:
            yield f"model.{key}: {value:,} there, {here:,} here; set model.{key}={value}"
    for key in COMPARED:
        if key in config and config[key] != architecture[key]:
            yield f"model.{key}: {config[key]} there, {architecture[key]} here; set model.{key}={config[key]}"
    for key, required in REQUIRED.items():
        if config.get(key, required) != required:
            yield f"{key} in its config.json is {config[key]!r}; this model has {required!r} only"


def _vocabulary_differences(there: int, here: int, rows: NDArray[np.integer] | None) -> Iterable[str]:
    if rows is None and there != here:
        yield (
            f"model.vocab_size: {there:,} there, {here:,} here; with data.gene_set, genes are matched by id, else set "
            f"model.vocab_size={there}"
        )
    if rows is not None and len(rows) != here:
        yield f"model.vocab_size: {len(rows):,} in the gene set, {here:,} here"
    if rows is not None and rows.max() >= there:
        yield f"its vocabulary has {there:,} tokens, but its gene set names token {rows.max()}: it is another model's"


def _architecture_of(published: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Read sizes from the shapes of tensors."""
    prefix = "bert.encoder.layer."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in published if name.startswith(prefix)}
    sizes = {
        "vocab_size": published[WORDS].info.shape[0],
        "hidden_size": published[WORDS].info.shape[1],
        "max_position_embeddings": published[POSITIONS].info.shape[0],
        "num_hidden_layers": len(layers),
    }
    expand, types = f"{prefix}0.intermediate.dense.bias", "bert.embeddings.token_type_embeddings.weight"
    if expand in published:
        sizes["intermediate_size"] = published[expand].info.shape[0]
    if types in published:
        sizes["type_vocab_size"] = published[types].info.shape[0]
    return sizes


def _require_names(
    path: Path, published: Mapping[str, StoredTensor], targets: Mapping[str, Shards], missing: tuple[str, ...]
) -> None:
    """Raise ConfigError unless encoder and head are complete, or only the whole head is missing, and shapes agree."""
    heads = [name for name in targets if name.startswith(HEAD)]
    problems = [f"{name} is missing there" for name in missing if heads or not name.startswith(HEAD)]
    problems += [
        f"{name} is there, but has no place here"
        for name in published
        if name.startswith(("bert.", HEAD)) and name not in targets and not name.startswith(UNUSED)
    ]
    for name, target in targets.items():
        # The number of rows of embeddings and bias is compared as the vocabulary size and the longest cell.
        first = 1 if name in (WORDS, POSITIONS, BIAS) else 0
        there, here = published[name].info.shape, target.info.shape
        if len(there) != len(here) or there[first:] != here[first:]:
            problems.append(f"{name} is {list(there)} there, {list(here)} here")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"training.init_from: {path} does not fit this run:\n  " + "\n  ".join(problems[:5]) + more)


# Copying


def _copy_rows(
    name: str, stored: StoredTensor, target: Shards, rows: NDArray[np.integer], seed: int, noise: float
) -> None:
    """Fill each row of the target with row `rows[row]` of the stored tensor, or near the mean of all where it is -1.

    Parameters
    ----------
    noise
        Standard deviation around the mean.
    """
    values = stored.pieces[0].read()
    mean = _mean_of_rows(values) if (rows < 0).any() else None
    for offset, piece in target.pieces.items():
        here = rows[offset[0] : offset[0] + piece.shape[0]]
        columns = tuple(slice(begin, begin + size) for begin, size in zip(offset[1:], piece.shape[1:], strict=True))
        known = np.flatnonzero(here >= 0)
        content = torch.empty(piece.shape, dtype=piece.dtype)
        chosen: Any = (torch.from_numpy(here[known].astype(np.int64)), *columns)
        content[torch.from_numpy(known)] = values[chosen].to(piece.dtype)
        for row in np.flatnonzero(here < 0):
            assert mean is not None
            drawn = mean + noise * _normal(mean.shape, f"{seed}:{name}:{offset[0] + row}")
            content[int(row)] = drawn[columns].to(piece.dtype)
        piece.copy_(content)


def _normal(shape: torch.Size, key: str) -> Tensor:
    """Draw standard normal values that depend on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


def _mean_of_rows(values: Tensor) -> Tensor:
    """Average over rows, in FP64 and in the order of rows, so that every rank gets the same."""
    total = sum(chunk.double().numpy().sum(axis=0, dtype=np.float64) for chunk in values.split(4096))
    return torch.as_tensor(np.asarray(total) / len(values)).float()
