"""Masked-token loss of a trained model on given cells."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from geneformer_pretrain.data.masking import IGNORED_LABEL, MaskRule, mask_cell
from geneformer_pretrain.errors import DataError
from modeling_bert_te import BertForMaskedLM

IntArray = NDArray[np.int64]
SELECTED = 0.15
"""Share of the genes that are selected, as in pretraining."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from listing weights that are not used."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def load_with_head(folder: Path) -> BertForMaskedLM | None:
    """Load a model with its head for masked tokens, on the first GPU (in BF16) or the CPU (in FP32).

    Parameters
    ----------
    folder
        A run's `final_model` or any Hugging Face BERT.

    Returns
    -------
    BertForMaskedLM or None
        None if the folder holds no such head.
    """
    with quiet():
        model, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if any(name.startswith("cls.predictions.transform") for name in info["missing_keys"]):
        return None
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    loaded: BertForMaskedLM = model.eval()
    return loaded


def unigram_loss(tokens: NDArray[np.integer[Any]], first_gene: int) -> float:
    """Entropy of the genes' frequencies in these very cells, nats: no predictor that ignores context does better."""
    counts = np.bincount(tokens[tokens >= first_gene])
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def masked_loss(
    model: BertForMaskedLM,
    tokens: NDArray[np.integer[Any]],
    offsets: IntArray,
    *,
    num_special_tokens: int,
    mask_token: int,
    seed: int,
    max_tokens: int = 8192,
) -> float:
    """Mean cross-entropy of a model over the masked tokens of cells, in nats, masked as in pretraining.

    15% of the genes are selected; of these 80% become the mask token, 10% a random gene, 10% stay.

    Parameters
    ----------
    model
        In evaluation mode.
    tokens, offsets
        Cell i is `tokens[offsets[i]:offsets[i + 1]]`, no longer than the model allows.

    Raises
    ------
    DataError
        No token was selected.
    """
    rule = MaskRule(seed, SELECTED, model.config.vocab_size, num_special_tokens, mask_token)
    device = model.device
    total, number = 0.0, 0
    for first, last in _batches(offsets, max_tokens):
        cells = [
            mask_cell(tokens[offsets[i] : offsets[i + 1]].astype(np.int64), i, 0, rule) for i in range(first, last)
        ]
        lengths = np.diff(offsets[first : last + 1])
        labels = np.concatenate([labels for _, labels in cells])
        selected = np.flatnonzero(labels != IGNORED_LABEL)
        if not len(selected):
            continue
        arrays = {
            "input_ids": np.concatenate([masked for masked, _ in cells]),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "cu_seqlens": (offsets[first : last + 1] - offsets[first]).astype(np.int32),
            "masked_index": selected,
            "labels": labels[selected],
        }
        on_device = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        with torch.inference_mode():
            output = model(max_seqlen=int(lengths.max()), **on_device)
        total += float(output.loss_sum)
        number += len(selected)
    if not number:
        raise DataError("no token was masked: the cells are too few and too short for a masked-token loss.")
    return total / number


def _batches(offsets: IntArray, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of cells of at most so many tokens, or of one cell that has more."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last
