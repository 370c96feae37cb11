"""Lengths of the cells that a run would train on: of a corpus, or simulated after published figures."""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np

from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.data.saved_folder import STATE_FILE
from geneformer_pretrain.data.sources import CorpusDescription, find_parquet, read_description, read_description_beside
from geneformer_pretrain.inference.tokens import open_tokens

QUANTILES = 4096
"""Cells of a simulated sample."""
V1_LONGEST = 2048
"""Longest cell of Geneformer V1 and of Genecorpus-30M, in tokens."""


@dataclass(frozen=True, eq=False)
class CellLengths:
    """The distribution of the cells' lengths, and the corpus's size.

    Attributes
    ----------
    sample
        int64, tokens of cells before they are cut; their distribution is the corpus's.
    cells, tokens
        Size of the corpus, tokens before cells are cut.
    source
        Where the figures come from, in words.
    description
        What a corpus that `tokenize` wrote says of itself; None for others.
    """

    sample: np.ndarray = field(repr=False)
    cells: int
    tokens: int
    source: str
    description: CorpusDescription | None = field(default=None, repr=False)

    def cut(self, seq_length: int, held_out: float = 0.0) -> "CutLengths":
        """Leave out a share of the cells, and cut the others to their first `seq_length` tokens."""
        kept = np.minimum(self.sample, seq_length).astype(np.float64)
        trained = 1 - held_out
        tokens = trained * self.tokens * kept.sum() / self.sample.sum()
        return CutLengths(max(1, round(trained * self.cells)), float(tokens), float((kept**2).sum() / kept.sum()))


@dataclass(frozen=True)
class CutLengths:
    """Size of a corpus as a run sees it.

    Attributes
    ----------
    cells, tokens
        Cells, and their tokens.
    attended
        Tokens that an average token attends to, sum(n^2) / sum(n) over the cells' lengths n.
    """

    cells: int
    tokens: float
    attended: float


@dataclass(frozen=True)
class Lognormal:
    """Lengths exp(N(ln median, sigma)), cut to [shortest, longest].

    Attributes
    ----------
    median, shortest, longest
        Tokens.
    sigma
        Standard deviation of the logarithm.
    """

    median: float
    sigma: float
    shortest: int
    longest: int

    def quantiles(self) -> np.ndarray:
        """Return evenly spaced quantiles; int64 [QUANTILES]."""
        normal = NormalDist(math.log(self.median), self.sigma)
        values = [normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]
        return np.clip(np.exp(values), self.shortest, self.longest).astype(np.int64)

    def draw(self, cells: int, seed: int = 0) -> np.ndarray:
        """Draw lengths; int64 [cells]."""
        drawn = np.exp(np.random.default_rng(seed).normal(math.log(self.median), self.sigma, cells))
        return np.clip(drawn, self.shortest, self.longest).astype(np.int64)


KINDS = ("lognormal", "genecorpus")
"""Kinds of simulated lengths: the first is kind to padding, the second has the many short cells of real corpora."""


def simulated(kind: str, seq_length: int) -> Lognormal:
    """Return simulated lengths of one of KINDS, for cells of up to `seq_length` tokens.

    genecorpus is like Genecorpus-30M up to 2,048 tokens, where half of the cells have at most 255 tokens and 7% are at
    the cap, and like Genecorpus-104M, 1,440 tokens a cell, for longer ones.
    """
    if kind == "lognormal":
        return Lognormal(900, 0.557, 200, seq_length)
    if seq_length <= V1_LONGEST:
        return Lognormal(255, 1.41, 16, V1_LONGEST)
    return Lognormal(1100, 0.83, 16, 4096)


def genecorpus(seq_length: int) -> CellLengths:
    """Return the published size of Genecorpus with simulated lengths: 30M up to 2,048 tokens, 104M for longer cells."""
    sample = simulated("genecorpus", seq_length).quantiles()
    if seq_length <= V1_LONGEST:
        return CellLengths(sample, 27_400_000, 15_200_000_000, "Genecorpus-30M's size, simulated lengths")
    return CellLengths(sample, 104_000_000, 150_000_000_000, "Genecorpus-104M's size, simulated lengths")


def of_tokens(tokens: int, seq_length: int) -> CellLengths:
    """Return Genecorpus's lengths for a corpus of another size."""
    like = genecorpus(seq_length)
    cells = max(1, round(like.cells * tokens / like.tokens))
    return CellLengths(like.sample, cells, tokens, "--tokens, lengths as simulated for Genecorpus")


def of_corpus(path: str) -> CellLengths:
    """Read the lengths of a corpus, anything that `data.path` takes.

    Parquet files with a column `length`, as `tokenize` writes them, are not read beyond it.

    Raises
    ------
    DataError
        Nothing is found, or a file is not a corpus.
    """
    description = None
    if (Path(path) / STATE_FILE).is_file():
        with tempfile.TemporaryDirectory() as cache:  # used for a saved folder that selects rows
            lengths = open_corpus(path, cache).lengths.astype(np.int64)
    else:
        lengths = open_tokens(Path(path)).lengths.astype(np.int64)
        description = read_description(Path(path)) or read_description_beside(find_parquet(path))
    return CellLengths(lengths, len(lengths), int(lengths.sum()), path, description)
