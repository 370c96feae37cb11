"""The vocabulary of a run against its files: gene set, list of tokens, and the corpus itself."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.corpus import Corpus
from geneformer_pretrain.data.sources import CorpusGeneSet
from geneformer_pretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.gene_set import GeneSet

SAMPLED_CELLS = 256
"""Cells looked at for tokens that every cell begins and ends with."""
MIN_SAMPLED_CELLS = 32
"""In fewer cells such tokens may be there by chance."""


def load_gene_set(config: Config) -> "GeneSet | None":
    """Load the gene set that ``data.gene_set`` names; None if there is none.

    Raises
    ------
    ConfigError
        If the folder cannot be used.
    """
    if config.data.gene_set is None:
        return None
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    try:
        return GeneSet.load(Path(config.data.gene_set))
    except DataError as error:
        raise ConfigError(f"data.gene_set: {error}") from error


def apply_gene_set(config: Config) -> None:
    """Set the size of the vocabulary and its special tokens to those of ``data.gene_set``, if there is one.

    It stands in for ``data.vocab_path``, which is set to null.

    Raises
    ------
    ConfigError
        If the folder cannot be used.
    """
    genes = load_gene_set(config)
    if genes is None:
        return
    config.model.vocab_size = genes.vocab_size
    config.model.pad_token_id = genes.special_tokens["pad"]
    config.data.mask_token_id = genes.special_tokens["mask"]
    config.data.num_special_tokens = genes.num_special_tokens
    config.data.vocab_path = None


def require_vocabulary_of(described: CorpusGeneSet, folder: Path, config: Config, genes: "GeneSet | None") -> None:
    """Refuse a corpus that names another gene set than that of the run.

    Without a gene set, the run's vocabulary file has to have as many tokens; ``data.vocab_path=null`` goes without.

    Parameters
    ----------
    described, folder
        See `require_gene_set`.

    Raises
    ------
    DataError
        Naming the difference, and the gene set to use.
    """
    if genes is not None:
        require_gene_set(described, folder, genes)
    elif config.data.vocab_path is not None and described.vocab_size != config.model.vocab_size:
        copy = folder / "gene_set"
        raise DataError(
            f"{folder}: tokenized with the gene set {described.name!r} of {described.vocab_size:,} tokens, and the run "
            f"has the {config.model.vocab_size:,} of {config.data.vocab_path}; add data.gene_set="
            f"{copy if copy.is_dir() else 'FOLDER with that gene set'}"
        )


def require_gene_set(described: CorpusGeneSet, folder: Path, genes: "GeneSet") -> None:
    """Refuse a corpus that was tokenized with another gene set.

    Parameters
    ----------
    described
        The corpus's gene set.
    folder
        The corpus. If it holds a copy of its gene set, ``gene_set/``, tokens are compared one by one.
    genes
        The gene set that it should have.

    Raises
    ------
    DataError
        Naming the difference: how many tokens, and the first of them.
    """
    from geneformer_pretrain.tokenization.gene_set import GeneSet

    if described.fingerprint == genes.fingerprint:
        return
    ours: dict[str, object] = {name: getattr(genes, name) for name in ("vocab_size", "max_tokens", "special_tokens")}
    differences = [
        f"{name} {getattr(described, name)} there, {value} here"
        for name, value in ours.items()
        if getattr(described, name) != value
    ]
    if (folder / "gene_set").is_dir():
        theirs = GeneSet.load(folder / "gene_set")
        size = max(theirs.vocab_size, genes.vocab_size)
        padded = [list(tokens) + [None] * (size - len(tokens)) for tokens in (theirs.tokens, genes.tokens)]
        changed = [place for place, (there, here) in enumerate(zip(*padded, strict=True)) if there != here]
        if changed:
            there, here = (tokens[changed[0]] or "none" for tokens in padded)
            differences.append(f"{len(changed):,} tokens differ, first token {changed[0]}: {there} there, {here} here")
        else:
            medians = ~np.isclose(theirs.medians, genes.medians, rtol=0, atol=0, equal_nan=True)
            if medians.any():
                first = int(medians.argmax())
                differences.append(
                    f"the same tokens, but {int(medians.sum()):,} medians differ, first that of {genes.tokens[first]}: "
                    f"{theirs.medians[first]} there, {genes.medians[first]} here"
                )
    names = [repr(described.name), repr(genes.name)]
    if described.name == genes.name:
        names = [f"{genes.name!r} ({one.fingerprint[:8]})" for one in (described, genes)]
    raise DataError(
        f"{folder}: tokenized with the gene set {names[0]}, which is not {names[1]} "
        f"({'; '.join(differences) or 'its genes or medians differ'}); name the gene set, or a model with it, that the "
        "corpus was made with, or tokenize the counts again with this one"
    )


def require_special_tokens(corpus: Corpus, num_special_tokens: int) -> None:
    """Refuse a corpus whose cells all begin with one token and end with another that count as genes.

    They are ``<cls>`` and ``<eos>``, as Geneformer V2 writes them. A sample of cells is looked at.

    Raises
    ------
    DataError
        Naming the tokens and the keys to set.
    """
    if corpus.num_cells < MIN_SAMPLED_CELLS:
        return
    places = np.linspace(0, corpus.num_cells - 1, min(SAMPLED_CELLS, corpus.num_cells)).astype(np.int64)
    ends = {(int(cell[0]), int(cell[-1])) for cell in map(corpus.cell, places.tolist())}
    first, last = next(iter(ends))
    if len(ends) == 1 and first != last and max(first, last) >= num_special_tokens:
        raise DataError(
            f"every cell begins with token {first} and ends with token {last}, which would be trained on as genes "
            f"(data.num_special_tokens={num_special_tokens}); they look like <cls> and <eos> of Geneformer V2. Set "
            f"data.num_special_tokens={max(first, last) + 1} and model.vocab_size to the size of that vocabulary (V2: "
            "20275), or data.gene_set to the gene set that the cells were made with"
        )


def check_vocabulary(config: Config) -> str:
    """Check the vocabulary file against the model, and return a hash of its tokens, however the lines end.

    Raises
    ------
    ConfigError
        Missing file, other number of tokens than model.vocab_size, a token twice, or <pad> or <mask> elsewhere
        than the configuration says.
    """
    path = Path(str(config.data.vocab_path))
    if not path.is_file():
        raise ConfigError(f"data.vocab_path: no file {path}; name a vocabulary or set data.vocab_path=null.")
    content = path.read_bytes()
    try:
        tokens = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.vocab_path: {path} is not a text file in UTF-8 ({error}); name one with a token a line. How to "
            "make one of Geneformer's token_dictionary.pkl stands in docs/data.md."
        ) from error
    if "" in tokens:
        raise ConfigError(f"data.vocab_path: {path}, line {tokens.index('') + 1} is empty; each line is a token.")
    if len(tokens) != config.model.vocab_size:
        raise ConfigError(
            f"data.vocab_path: {path} has {len(tokens)} tokens, model.vocab_size is {config.model.vocab_size}; name "
            f"the vocabulary that the corpus was made with, or set model.vocab_size={len(tokens)} if it is this one."
        )
    if len(set(tokens)) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        first, second = [number for number, token in enumerate(tokens, 1) if token == twice][:2]
        raise ConfigError(
            f"data.vocab_path: {path} lists the token {twice!r} in line {first} and in line {second}; correct one of "
            "the two lines."
        )
    for key, token_id, name in (
        ("model.pad_token_id", config.model.pad_token_id, "<pad>"),
        ("data.mask_token_id", config.data.mask_token_id, "<mask>"),
    ):
        if tokens[token_id] != name:
            remedy = f"set {key}={tokens.index(name)}, or name another file" if name in tokens else "name another file"
            raise ConfigError(
                f"data.vocab_path: {path}, line {token_id + 1}: {tokens[token_id]!r} where {key}={token_id} expects "
                f"{name}; {remedy}."
            )
    return xxhash.xxh3_128_hexdigest("".join(f"{token}\n" for token in tokens).encode())
