"""The groups that a column puts held-out cells into, and the loss of a unigram model on them."""

import math

import numpy as np

from geneformer_pretrain.data.corpus import Corpus
from geneformer_pretrain.data.dataset import DataSource
from geneformer_pretrain.data.reading import as_text, read_rows
from geneformer_pretrain.data.saved_folder import STATE_FILE
from geneformer_pretrain.errors import DataError

MAX_GROUPS = 100
"""Most values of a column by which a loss is reported."""

SAMPLE_TOKENS = 10_000_000
"""Tokens of the training corpus that frequencies are estimated from, at most about so many."""

SAMPLE_RUN = 16
"""Consecutive cells that are read at each place of the sample."""

PRIOR = 0.5
"""Count that each gene starts with (Krichevsky and Trofimov, 1981), so that one never seen has a frequency."""


def cell_groups(corpus: Corpus, column: str, wanted: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Group cells by a column of the corpus's files.

    Parameters
    ----------
    wanted
        bool [cells], the cells to group.

    Returns
    -------
    names : list of str
        Sorted; ``missing`` for cells without a value.
    groups : numpy.ndarray
        int16 [cells], place of each wanted cell's value among the names; -1 elsewhere.

    Raises
    ------
    DataError
        If there is no such column, or it has too many values.
    """
    if any(source.path.endswith(f"{STATE_FILE} (selected rows)") for source in corpus.sources):
        raise DataError(
            f"{corpus.folder}: an index selects its rows, so that its columns cannot be read; apply "
            "Dataset.flatten_indices and save_to_disk the result"
        )
    codes: dict[str, int] = {}
    groups = np.full(corpus.num_cells, -1, np.int16)
    first = 0
    for rows in read_rows(corpus.sources, [column]):
        here = np.flatnonzero(wanted[first : first + len(rows)])
        for place, value in zip(here, as_text(rows[column].take(here)), strict=True):
            groups[first + place] = codes.setdefault(value, len(codes))
            if len(codes) > MAX_GROUPS:
                raise DataError(
                    f"{corpus.folder}: column {column!r} has more than {MAX_GROUPS} values among the held-out cells; "
                    "name a coarser one"
                )
        first += len(rows)
    names = sorted(codes)
    rank = np.array([*(names.index(name) for name in codes), -1], np.int16)
    return names, rank[groups]


def gene_frequencies(data: DataSource) -> np.ndarray:
    """Estimate each gene's share of the training tokens, from cells at evenly spaced places of the corpus.

    Returns
    -------
    numpy.ndarray
        float64 [vocab_size], sums to 1; 0 for special tokens.
    """
    config, corpus = data.config, data.corpus
    stride = SAMPLE_RUN * math.ceil(corpus.num_tokens / SAMPLE_TOKENS)
    places = np.arange(0, corpus.num_cells, stride)
    cells = (places[:, None] + np.arange(SAMPLE_RUN)).ravel()
    cells = cells[cells < corpus.num_cells]
    if data.chosen is not None:
        cells = cells[data.chosen[cells]]
    counts = np.zeros(config.model.vocab_size)
    for some in np.array_split(cells, 1 + len(cells) // 1000):
        if len(some):
            tokens = np.concatenate([corpus.cell(int(cell))[: config.model.seq_length] for cell in some])
            is_gene = (tokens >= config.data.num_special_tokens) & (tokens < len(counts))
            counts += np.bincount(tokens[is_gene], minlength=len(counts))
    counts[config.data.num_special_tokens :] += PRIOR
    return counts / counts.sum()


def unigram_loss(labels: np.ndarray, frequencies: np.ndarray) -> float:
    """Compute the mean cross-entropy of a model that knows the genes' frequencies and no context, in nats.

    Parameters
    ----------
    labels
        int64 [vocab_size], how often each gene is to be predicted; at least one of them.
    frequencies
        See ``gene_frequencies``.
    """
    there = labels > 0
    return float(-(labels[there] * np.log(frequencies[there])).sum() / labels.sum())
