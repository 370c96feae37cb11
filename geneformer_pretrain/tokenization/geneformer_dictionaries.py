"""Geneformer's dictionaries, pickle or JSON, read without running what a pickle asks for, and written.

`token_dictionary` {gene id: token id}, `gene_median_dictionary` {gene id: median}, `gene_name_id_dict`
{symbol: gene id}, `ensembl_mapping_dict` {gene id as found: gene id of today}.
"""

import codecs
import io
import json
import pickle
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import new_folder
from geneformer_pretrain.tokenization.gene_set import MAX_TOKENS, GeneSet, is_special

_NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8"}


class _NumberType:
    """Stands for `numpy.dtype` in a pickle, of plain numbers only."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if code not in _NUMBERS:
            raise pickle.UnpicklingError("it holds numpy values that are not numbers")
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">", "|": "|"}[state[1]]


def _number(kind: _NumberType, data: bytes) -> int | float:
    """Stand for `numpy.core.multiarray.scalar` in a pickle: read the one number that `data` holds."""
    (value,) = np.frombuffer(data, np.dtype(kind.order + kind.code)).tolist()
    return value


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of texts and numbers; nothing of what a pickle names is imported or called.

    The two names of numpy that pickled numbers need are answered with functions of this module.
    """

    allowed = {  # noqa: RUF012
        ("numpy", "dtype"): _NumberType,
        ("numpy.core.multiarray", "scalar"): _number,
        ("numpy._core.multiarray", "scalar"): _number,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of the pickle, or refuse it by its name."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_dictionary(path: Path | str) -> dict[str, Any]:
    """Read a dictionary with texts as keys and texts or numbers as values, from a pickle or JSON.

    Raises
    ------
    DataError
        If the file is neither, asks for anything else than numbers of numpy, or holds something else.
    """
    path = Path(path)
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        if content.lstrip()[:1] in (b"{", b"["):
            dictionary = json.loads(content, object_pairs_hook=_without_repeats)
        else:
            dictionary = _Unpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: the pickle is refused: {error}; only texts and numbers are read.") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # A damaged pickle raises nearly anything.
        raise DataError(f"{path} is not a pickle or JSON of a dictionary ({type(error).__name__}).") from error
    if not isinstance(dictionary, dict):
        raise DataError(f"{path} holds a {type(dictionary).__name__}, not a dictionary.")
    for key, value in dictionary.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            raise DataError(
                f"{path}: an entry is a {type(key).__name__} with a {type(value).__name__}; each has to be a text with "
                "a number or a text."
            )
    return dictionary


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    dictionary = dict(pairs)
    if len(dictionary) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in dictionary if keys.count(key) > 1)
        raise DataError(f"{repeated} is there twice.")
    return dictionary


@dataclass(frozen=True)
class Dictionaries:
    """Geneformer's dictionaries, of any release.

    Attributes
    ----------
    tokens
        `token_dictionary`: id of each gene and special token.
    medians
        `gene_median_dictionary`: median of each gene.
    names
        `gene_name_id_dict`: gene id of each symbol.
    mapping
        `ensembl_mapping_dict`: gene id of today for each id that files may have.
    """

    tokens: dict[str, Any]
    medians: dict[str, Any]
    names: dict[str, Any] = field(default_factory=dict)
    mapping: dict[str, Any] = field(default_factory=dict)

    def to_gene_set(
        self, *, name: str, species: str | None = None, max_tokens: int | None = None, origin: dict[str, Any]
    ) -> GeneSet:
        """Make a gene set of them.

        Medians, symbols and mapped ids of genes without a token are left out. A gene without a median keeps its token.

        Parameters
        ----------
        max_tokens
            Longest cell; by default 4,096 with `<cls>` and `<eos>`, else 2,048.

        Raises
        ------
        DataError
            If token ids are not 0, 1, 2, ... each once, a median is not a positive number, or none belongs to a gene.
        """
        tokens = self._tokens_in_order()
        for gene, median in self.medians.items():
            if not isinstance(median, int | float) or not 0 < median < float("inf"):
                raise DataError(f"gene medians: {gene} has the median {median!r}; it must be a number above 0.")
        medians = np.array([self.medians.get(token, np.nan) for token in tokens], np.float64)
        if np.isnan(medians).all():
            raise DataError(
                f"gene medians: no gene of them has a token; the dictionaries do not belong together (tokens such as "
                f"{tokens[-1]}, medians such as {next(iter(self.medians), 'none')})."
            )
        symbols, aliases = self._names_of_tokens()
        version = "v2" if "<cls>" in self.tokens else "v1"
        return GeneSet(
            name=name,
            species=species,
            tokens=tokens,
            symbols=[symbols.get(token) for token in tokens],
            medians=medians,
            max_tokens=MAX_TOKENS[version] if max_tokens is None else max_tokens,
            aliases=aliases,
            origin=origin,
        )

    def _tokens_in_order(self) -> list[str]:
        tokens: dict[int, str] = {}
        for token, place in self.tokens.items():
            if type(place) is not int:
                raise DataError(f"token dictionary: {token} has the id {place!r}; it must be a whole number.")
            if place in tokens:
                raise DataError(f"token dictionary: {tokens[place]} and {token} have the same id, {place}.")
            tokens[place] = token
        for expected in range(len(tokens)):
            if expected not in tokens:
                raise DataError(f"token dictionary: no token has the id {expected}; ids must be 0, 1, 2, ... in a row.")
        if not tokens:
            raise DataError("token dictionary: it is empty.")
        return [tokens[place] for place in range(len(tokens))]

    def _names_of_tokens(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the symbol of each gene, and its other symbols and ids as aliases."""
        if self.names and not any(gene in self.tokens for gene in self.names.values()):
            raise DataError(
                "gene names: none of them leads to a gene with a token; the dictionary must be {symbol: gene id}."
            )
        aliases = {
            found: gene for found, gene in self.mapping.items() if self._is_gene(gene) and found.upper() != gene.upper()
        }
        symbols: dict[str, str] = {}
        for symbol, gene in self.names.items():
            gene = self.mapping.get(gene, gene)
            if self._is_gene(gene) and symbols.setdefault(gene, symbol) != symbol and symbol not in self.tokens:
                aliases.setdefault(symbol, gene)
        return symbols, aliases

    def _is_gene(self, name: object) -> bool:
        return name in self.tokens and not is_special(str(name))


def to_dictionaries(gene_set: GeneSet) -> Dictionaries:
    """Write a gene set as Geneformer's dictionaries.

    Symbols that several genes share are left out. The mapping holds each gene itself too and its keys are in capitals,
    as Geneformer's tokenizer looks ids up.
    """
    genes = [token for token in gene_set.tokens if not is_special(token)]
    shared = {symbol for symbol, number in Counter(gene_set.symbols).items() if number > 1}
    return Dictionaries(
        tokens={token: place for place, token in enumerate(gene_set.tokens)},
        medians={
            token: median
            for token, median in zip(gene_set.tokens, gene_set.medians.tolist(), strict=True)
            if not np.isnan(median)
        },
        names={
            symbol: token
            for token, symbol in zip(gene_set.tokens, gene_set.symbols, strict=True)
            if symbol is not None and symbol not in shared
        },
        mapping={gene.upper(): gene for gene in genes}
        | {alias.upper(): token for alias, token in gene_set.aliases.items()},
    )


FILE_NAMES = {
    "tokens": "token_dictionary",
    "medians": "gene_median_dictionary",
    "names": "gene_name_id_dict",
    "mapping": "ensembl_mapping_dict",
}
"""Files of each dictionary, without `.pkl` or `.json`."""


def export_dictionaries(gene_set: GeneSet, folder: Path | str, *, overwrite: bool = False) -> list[Path]:
    """Write a gene set as Geneformer's dictionaries into a new folder, each as pickle and as JSON.

    Returns
    -------
    list of Path
        The files.
    """
    folder, dictionaries = Path(folder), to_dictionaries(gene_set)
    with new_folder(folder, overwrite=overwrite) as new:
        for attribute, name in FILE_NAMES.items():
            dictionary = getattr(dictionaries, attribute)
            (new / f"{name}.pkl").write_bytes(pickle.dumps(dictionary, protocol=4))
            (new / f"{name}.json").write_text(json.dumps(dictionary, indent=1) + "\n", encoding="utf-8")
    return sorted(folder.iterdir())
