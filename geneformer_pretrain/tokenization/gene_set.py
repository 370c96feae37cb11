"""The gene set: tokens, their ids, and the medians that rank the genes of a cell.

A gene-set folder holds

- `genes.parquet`: one row a token in id order: `token_id`, `token`, `kind`, `symbol`, `median`;
- `aliases.parquet`: further ids and symbols (`gene_id`, `token`), if there are any;
- `gene_set.json`: name, species, target sum, longest cell, special tokens, fingerprint, how it was made;
- `vocab.txt`, `tokenizer.json`, `tokenizer_config.json`, from which `transformers.AutoTokenizer` loads.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import new_folder
from geneformer_pretrain.tokenization.gene_ids import GeneIndex, GeneMatch
from geneformer_pretrain.tokenization.tokenizer_files import write_tokenizer_files

FILES = ("gene_set.json", "genes.parquet", "aliases.parquet", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
"""Files of a gene-set folder; `aliases.parquet` is there if there are aliases."""
FORMAT_VERSION = 1
"""Raised when a folder written now could not be read by an older release."""

TARGET_SUM = 10_000
"""Counts to which a cell is scaled before its genes are divided by their medians."""

SPECIAL_TOKENS = {"v1": ("<pad>", "<mask>"), "v2": ("<pad>", "<mask>", "<cls>", "<eos>")}
"""Special tokens of Geneformer V1 and V2, in id order."""

MAX_TOKENS = {"v1": 2_048, "v2": 4_096}
"""Longest cell of Geneformer V1 and V2, special tokens included."""

_GENES = pa.schema(
    [
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("kind", pa.string()),
        ("symbol", pa.string()),
        ("median", pa.float64()),
    ]
)
_ALIASES = pa.schema([("gene_id", pa.string()), ("token", pa.string())])


def is_special(token: str) -> bool:
    """True for `<pad>`, `<mask>` and other tokens in angle brackets, which stand for no gene."""
    return len(token) > 2 and token[0] == "<" and token[-1] == ">"


@dataclass(frozen=True, eq=False)
class GeneSet:
    """Vocabulary of genes, with what turns their counts into ranked tokens.

    Attributes
    ----------
    name, species
        For people; the species may be unknown (None).
    tokens
        Special tokens, then gene ids; a token's place is its id.
    symbols
        Symbol of each token, or None, [vocab_size].
    medians
        Median of the non-zero `count / n_counts * target_sum` of each gene, float64 [vocab_size]; NaN where unknown.
    aliases
        Former ids, ids of other species or further symbols, each with its token.
    max_tokens
        Longest cell, special tokens included.
    target_sum
        Counts to which a cell is scaled.
    origin
        How the gene set was made, JSON-serialisable.

    Raises
    ------
    DataError
        If tokens repeat, special tokens do not come first or lack `<pad>` or `<mask>`, or a median is not positive.
    """

    name: str
    species: str | None
    tokens: list[str]
    symbols: list[str | None]
    medians: np.ndarray
    max_tokens: int
    aliases: dict[str, str] = field(default_factory=dict)
    target_sum: float = TARGET_SUM
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_tokens()
        known = self.medians[~np.isnan(self.medians)]
        if not (np.isfinite(known).all() and (known > 0).all()):
            place = int(np.flatnonzero((self.medians <= 0) | np.isinf(self.medians))[0])
            raise DataError(f"Gene {self.tokens[place]} has the median {self.medians[place]}; it must be above 0.")
        tokens = set(self.tokens)
        if lost := next((alias for alias, token in self.aliases.items() if token not in tokens), None):
            raise DataError(f"The alias {lost} leads to {self.aliases[lost]}, which is not a gene of this set.")
        if self.max_tokens <= self.num_added_tokens:
            raise DataError(f"A longest cell of {amount(self.max_tokens, 'token')} leaves no room for genes.")

    def _check_tokens(self) -> None:
        seen: set[str] = set()
        for place, token in enumerate(self.tokens):
            if token in seen:
                raise DataError(f"The token {token} is there twice.")
            if not token or token.split() != [token]:
                raise DataError(f"Token {place} is {token!r}; tokens may not be empty or hold spaces.")
            if is_special(token) and place >= self.num_special_tokens:
                raise DataError(f"The special token {token} has the id {place}; special tokens come before all genes.")
            seen.add(token)
        for token in ("<pad>", "<mask>"):
            if token not in seen:
                raise DataError(f"The gene set has no token {token}.")
        if ("<cls>" in seen) != ("<eos>" in seen):
            raise DataError("A gene set has both <cls> and <eos>, or neither.")
        if len(seen) == self.num_special_tokens:
            raise DataError("The gene set has no genes.")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token by its name without brackets: pad, mask, and for V2 cls and eos."""
        return {token[1:-1]: place for place, token in enumerate(self.tokens) if is_special(token)}

    @property
    def num_special_tokens(self) -> int:
        """Number of special tokens; genes begin at this id."""
        return len(self.special_tokens)

    @property
    def num_added_tokens(self) -> int:
        """Number of special tokens in every cell: `<cls>` in front and `<eos>` behind, or none."""
        return 2 if "cls" in self.special_tokens else 0

    @property
    def kinds(self) -> list[str]:
        """Kind of each token: `special` or `gene`."""
        return ["special" if is_special(token) else "gene" for token in self.tokens]

    @property
    def num_unranked_genes(self) -> int:
        """Number of genes without a median; their counts give no tokens."""
        return int(np.isnan(self.medians[self.num_special_tokens :]).sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the tokens of a cell: tokens, medians, target sum, longest cell.

        The same on every platform: medians are hashed as little-endian float64, NaN as one bit pattern.
        """
        facts = {"tokens": self.tokens, "target_sum": float(self.target_sum), "max_tokens": self.max_tokens}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        digest.update(np.where(np.isnan(self.medians), np.nan, self.medians).astype("<f8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _index(self) -> GeneIndex:
        genes = [None if is_special(token) else token for token in self.tokens]
        return GeneIndex(genes, self.symbols, self.aliases)

    def match(self, gene_ids: np.ndarray | list[str]) -> GeneMatch:
        """Match the genes of a file, by id, version, case, alias or symbol."""
        return self._index.match(gene_ids)

    def describe(self) -> dict[str, Any]:
        """Return what a corpus or a run notes of its gene set."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "special_tokens": self.special_tokens,
            "max_tokens": self.max_tokens,
        }

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write a gene-set folder aside and rename it.

        Raises
        ------
        OutputError
            If the folder exists and may not be overwritten.
        """
        with new_folder(Path(folder), overwrite=overwrite) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """Write the files of a gene-set folder into a folder that exists, beside what is there."""
        columns = [np.arange(self.vocab_size), self.tokens, self.kinds, self.symbols, self.medians]
        arrays = [pa.array(column, type, from_pandas=True) for column, type in zip(columns, _GENES.types, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=_GENES), folder / "genes.parquet")
        if self.aliases:
            aliases = [list(self.aliases), list(self.aliases.values())]
            pq.write_table(pa.Table.from_arrays(aliases, schema=_ALIASES), folder / "aliases.parquet")
        facts = {
            "format_version": FORMAT_VERSION,
            "species": self.species,
            "target_sum": self.target_sum,
            **self.describe(),
            "origin": self.origin,
        }
        (folder / "gene_set.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_tokenizer_files(folder, self.tokens, self.max_tokens)

    @classmethod
    def load(cls, folder: Path | str) -> "GeneSet":
        """Read a gene-set folder, or another one that holds its files, such as `final_model`.

        Raises
        ------
        DataError
            If it is none, was written by a newer release, or was changed after it was made.
        """
        folder = Path(folder)
        facts = _read_facts(folder)
        genes = _read_table(folder / "genes.parquet", _GENES)
        aliases = folder / "aliases.parquet"
        pairs = _read_table(aliases, _ALIASES).to_pydict() if aliases.exists() else {"gene_id": [], "token": []}
        if not np.array_equal(genes["token_id"], np.arange(len(genes))):
            raise DataError(f"{folder / 'genes.parquet'}: the column token_id does not count 0, 1, 2, ...")
        try:
            gene_set = cls(
                name=facts["name"],
                species=facts["species"],
                tokens=genes["token"].to_pylist(),
                symbols=genes["symbol"].to_pylist(),
                medians=genes["median"].to_numpy(),
                max_tokens=facts["max_tokens"],
                aliases=dict(zip(pairs["gene_id"], pairs["token"], strict=True)),
                target_sum=facts["target_sum"],
                origin=facts.get("origin", {}),
            )
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
        if gene_set.fingerprint != facts["fingerprint"]:
            raise DataError(
                f"{folder}: genes.parquet and gene_set.json do not belong together (fingerprint "
                f"{gene_set.fingerprint[:12]}, noted {facts['fingerprint'][:12]}); make the gene set again instead of "
                "editing its files."
            )
        return gene_set


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "gene_set.json"
    if not path.is_file():
        inner = folder / "gene_set"
        remedy = "`gene-set import` or `gene-set build` makes one"
        if (inner / "gene_set.json").is_file():
            remedy = f"name {inner}, that of the corpus"
        raise DataError(f"{folder} is not a gene-set folder: it has no gene_set.json; {remedy}.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        newer = facts["format_version"] > FORMAT_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not the description of a gene set ({type(error).__name__}: {error}).") from error
    if newer:
        raise DataError(
            f"{path}: written by a newer release (format {facts['format_version']}; this one reads up to "
            f"{FORMAT_VERSION}); update geneformer-pretrain."
        )
    missing = {"name", "species", "target_sum", "max_tokens", "fingerprint"} - set(facts)
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}.")
    return facts


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a table of a gene-set folder; further columns are ignored."""
    try:
        return pq.read_table(path, columns=schema.names).select(schema.names).cast(schema)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the gene-set folder is not complete.") from None
    except (pa.ArrowException, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is damaged or not a table of a gene set ({reason}).") from error
