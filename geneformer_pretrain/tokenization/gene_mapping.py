"""Genes of one gene set found in another: by id, or through a table of former ids or orthologs."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_ids import WAYS, canonical
from geneformer_pretrain.tokenization.gene_set import GeneSet


def read_mapping(path: Path | str) -> dict[str, list[str]]:
    """Read a table of two columns: gene ids of the new gene set, and what they are in the old one.

    Parameters
    ----------
    path
        CSV or TSV. A header does no harm, since it names no genes; lines that begin with # are left out.

    Returns
    -------
    dict
        Old ids of each new one; Ensembl ids in capitals, without version.

    Raises
    ------
    DataError
        If a row has not two fields, or there is none.
    """
    mapping: dict[str, list[str]] = {}
    try:
        lines = [
            line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip() and line[0] != "#"
        ]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text in UTF-8 ({error}).") from error
    separator = "\t" if lines and "\t" in lines[0] else ","
    for number, row in enumerate(csv.reader(lines, delimiter=separator), start=1):
        if len(row) != 2:
            raise DataError(
                f"{path}, row {number}: {amount(len(row), 'field')}; a table of genes has two, the new id and the old."
            )
        new, old = (canonical(field.strip()) for field in row)
        if new and old and old not in mapping.setdefault(new, []):
            mapping[new].append(old)
    if not mapping:
        raise DataError(f"{path} holds no pairs of genes.")
    return mapping


@dataclass(frozen=True, eq=False)
class TokenMatch:
    """Tokens of a new gene set, found in an old one.

    Attributes
    ----------
    old_token
        Id in the old gene set of each token of the new one, int32 [vocab_size of the new]; -1 where it has none.
    special_tokens, by_id, by_table
        Number of tokens matched by name, by id (its version, case and aliases included) and through the table.
    ambiguous
        Number of genes left without a match because the table gives several old genes for one new gene.
    shared
        Number of old genes that stand for several new ones.
    examples
        Ids of new genes without a match.
    """

    old_token: np.ndarray
    special_tokens: int
    by_id: int
    by_table: int
    ambiguous: int
    shared: int
    examples: list[str]

    @property
    def unmatched(self) -> int:
        """Number of tokens without a match."""
        return int((self.old_token < 0).sum())

    def lines(self) -> list[str]:
        """Describe the match for people."""
        total = len(self.old_token)
        lines = [
            f"{total - self.unmatched:,} of {total:,} tokens are known to the model: {amount(self.by_id, 'gene')} by "
            f"id, {self.by_table:,} through the table, {self.special_tokens} special tokens"
        ]
        if self.unmatched:
            lines.append(f"  {self.unmatched:,} are new, for example {', '.join(self.examples)}")
        if self.ambiguous:
            lines.append(f"  {self.ambiguous:,} of these have several genes of the model in the table")
        if self.shared:
            lines.append(f"  genes of the model that stand for several genes: {self.shared:,}")
        return lines


def match_tokens(new: GeneSet, old: GeneSet, mapping: Mapping[str, Sequence[str]] | None = None) -> TokenMatch:
    """Find the tokens of a new gene set in an old one.

    Special tokens are matched by name. A gene is looked up in the table first; where that leads to none or several, by
    its id. Symbols are not compared, since other species share them.

    Parameters
    ----------
    mapping
        Old ids of new ids, as `read_mapping` returns them.

    Raises
    ------
    DataError
        If no gene matches; says so if the table has its columns the other way round.
    """
    genes = new.tokens[new.num_special_tokens :]
    mapping = mapping or {}
    pairs = [(place, old_id) for place, gene in enumerate(genes) for old_id in mapping.get(canonical(gene), ())]
    by_id = _tokens(old, genes)
    found: list[set[int]] = [set() for _ in genes]
    for (place, _), token in zip(pairs, _tokens(old, [old_id for _, old_id in pairs]).tolist(), strict=True):
        if token >= 0:
            found[place].add(token)
    by_table = np.array([next(iter(tokens)) if len(tokens) == 1 else -1 for tokens in found], np.int32)
    rows = np.where(by_table < 0, by_id, by_table)
    ambiguous = np.array([len(tokens) > 1 for tokens in found]) & (rows < 0)
    if not (rows >= 0).any():
        _refuse(genes, old, mapping)
    special = np.array([old.special_tokens.get(name, -1) for name in new.special_tokens], np.int32)
    return TokenMatch(
        old_token=np.concatenate([special, rows]).astype(np.int32),
        special_tokens=int((special >= 0).sum()),
        by_id=int(((rows >= 0) & (by_table < 0)).sum()),
        by_table=int((by_table >= 0).sum()),
        ambiguous=int(ambiguous.sum()),
        shared=int((np.bincount(rows[rows >= 0]) > 1).sum()),
        examples=[genes[place] for place in np.flatnonzero(rows < 0)[:3]],
    )


def _tokens(gene_set: GeneSet, gene_ids: list[str]) -> np.ndarray:
    """Return the token of each id, int32; -1 where it has none or is only known as a symbol."""
    match = gene_set.match(gene_ids)
    return np.where(match.way_of_column == list(WAYS).index("symbol"), -1, match.token_of_column)


def _refuse(genes: list[str], old: GeneSet, mapping: Mapping[str, Sequence[str]]) -> NoReturn:
    examples = f"ids such as {genes[0]}, the model's such as {old.tokens[-1]}"
    if not mapping:
        raise DataError(f"No gene of the gene set is known to the model ({examples}); name a table of both ids.")
    known = {canonical(gene) for gene in genes}
    if any(old_id in known for old_ids in mapping.values() for old_id in old_ids):
        raise DataError(
            "The table of genes has its columns the other way round: the new id comes first, the old second."
        )
    raise DataError(f"Neither by id nor through the table is a gene of the gene set known to the model ({examples}).")
