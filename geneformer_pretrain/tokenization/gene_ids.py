"""Gene ids as files spell them, matched to the genes of a gene set."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError

WAYS = {
    "unmatched": "not matched",
    "ambiguous": "not matched, since the id stands for several genes",
    "exact": "by the id as it is",
    "version": "by the id without its version",
    "case": "by the id in another case",
    "alias": "by a former or other id",
    "symbol": "by the symbol",
}
"""Outcomes of matching an id, each in words; `GeneMatch.way_of_column` counts in this order."""

MINIMUM_SHARE = 0.5
"""Least share of the counts that matched genes must hold."""

_NOWHERE, _SEVERAL = -1, -2
_ENSEMBL = re.compile(r"(ENS[A-Z]*\d+)(\.\d+)?", re.IGNORECASE)
_WAY_NUMBER = {way: number for number, way in enumerate(WAYS)}


def without_version(gene_id: str) -> str:
    """Return an Ensembl id without its version: `ENSG00000000003.12` becomes `ENSG00000000003`.

    Other ids may have dots with a meaning (`2L52.1` of C. elegans, `AC012345.1`) and stay as they are.
    """
    ensembl = _ENSEMBL.fullmatch(gene_id) if "." in gene_id else None
    return ensembl[1] if ensembl else gene_id


def canonical(gene_id: str) -> str:
    """Return the id under which a new gene set lists a gene: an Ensembl id in capitals, without its version."""
    ensembl = _ENSEMBL.fullmatch(gene_id)
    return ensembl[1].upper() if ensembl else gene_id


def _folded(gene_id: str) -> str:
    return without_version(gene_id).upper()


def _look_up(places: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Map each key to its place; a key with several places stands for none."""
    found: dict[str, int] = {}
    for key, place in places:
        if found.setdefault(key, place) != place:
            found[key] = _SEVERAL
    return found


class GeneIndex:
    """Finds genes by id, former id or symbol.

    Tried in this order: an alias as it is (an alias says what an id means today), the id as it is, without its
    version, in any case, an alias in any case, a symbol as it is, a symbol in any case. A key that leads to several
    genes at the first step that knows it is not matched: nothing is guessed.

    Parameters
    ----------
    gene_ids
        Ids by place; None where the place holds no gene (a special token).
    symbols
        Symbol of each gene, or None.
    aliases
        Further ids or symbols, each with the id of its gene.
    """

    def __init__(
        self, gene_ids: Sequence[str | None], symbols: Sequence[str | None], aliases: Mapping[str, str]
    ) -> None:
        genes = [(gene_id, place) for place, gene_id in enumerate(gene_ids) if gene_id is not None]
        place_of = dict(genes)
        others = [(alias, place_of[gene_id]) for alias, gene_id in aliases.items() if alias != gene_id]
        names = [(symbol, place) for place, symbol in enumerate(symbols) if symbol is not None]
        self.examples = tuple(gene_id for gene_id, _ in genes[:: max(1, len(genes) // 3)][:3])
        self._steps: list[tuple[str, Callable[[str], str], dict[str, int]]] = [
            ("alias", str, dict(others)),
            ("exact", str, place_of),
            ("version", without_version, _look_up((without_version(gene_id), place) for gene_id, place in genes)),
            ("case", _folded, _look_up((_folded(gene_id), place) for gene_id, place in genes)),
            ("alias", _folded, _look_up((_folded(alias), place) for alias, place in others)),
            ("symbol", str, _look_up(names)),
            ("symbol", str.upper, _look_up((symbol.upper(), place) for symbol, place in names)),
        ]

    def find(self, gene_id: str) -> tuple[int, str]:
        """Return the place of a gene, or -1, and the way it was found, one of `WAYS`."""
        for way, spelling, places in self._steps:
            place = places.get(spelling(gene_id))
            if place is not None:
                return (_NOWHERE, "ambiguous") if place == _SEVERAL else (place, way)
        return _NOWHERE, "unmatched"

    def match(self, gene_ids: Iterable[str]) -> "GeneMatch":
        """Match the columns of a file."""
        ids = np.array([str(gene_id) for gene_id in gene_ids], dtype=np.str_)
        found = [self.find(gene_id) for gene_id in ids.tolist()]
        places = np.array([place for place, _ in found], np.int32)
        ways = np.array([_WAY_NUMBER[way] for _, way in found], np.uint8)
        return GeneMatch(ids, places, ways, self.examples)


def describe_summed(summed: Mapping[str, Any]) -> str:
    """Describe `GeneMatch.summed` for people."""
    more = ", ..." if summed["genes"] > len(summed["examples"]) else ""
    return (
        f"genes with several columns, whose counts are summed: {summed['genes']:,} "
        f"({', '.join(summed['examples'])}{more}), {summed['columns']:,} columns"
    )


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Genes of a file, matched to those of a gene set.

    Attributes
    ----------
    gene_ids
        Ids of the file's genes, str [columns].
    token_of_column
        Token id of each column, or -1, int32 [columns]. Columns of one gene have the same token; their counts are
        to be summed.
    way_of_column
        How each column was matched, uint8 [columns], counting in `WAYS`.
    examples
        Ids as the gene set spells them.
    """

    gene_ids: np.ndarray
    token_of_column: np.ndarray
    way_of_column: np.ndarray
    examples: tuple[str, ...]

    @cached_property
    def num_columns_by_way(self) -> dict[str, int]:
        """Number of columns for each of `WAYS`."""
        return dict(zip(WAYS, np.bincount(self.way_of_column, minlength=len(WAYS)).tolist(), strict=True))

    @cached_property
    def num_matched(self) -> int:
        """Number of columns that are a gene of the set."""
        return int((self.token_of_column >= 0).sum())

    @cached_property
    def num_genes(self) -> int:
        """Number of genes of the set that the file has."""
        return len(np.unique(self.token_of_column[self.token_of_column >= 0]))

    @cached_property
    def summed(self) -> dict[str, Any] | None:
        """Genes that have several columns, whose counts are summed; None if there are none.

        Values for JSON: the number of such `genes`, of their `columns`, and `examples`, the first of each gene's ids
        as the file spells it.
        """
        columns = np.flatnonzero(self.token_of_column >= 0)
        _, first, number = np.unique(self.token_of_column[columns], return_index=True, return_counts=True)
        several = number > 1
        if not several.any():
            return None
        examples = self.gene_ids[columns[np.sort(first[several])[:3]]].tolist()
        return {"genes": int(several.sum()), "columns": int(number[several].sum()), "examples": examples}

    def share_of_counts(self, column_counts: np.ndarray) -> float:
        """Return the share of the counts that belongs to matched genes; 0 if there are no counts.

        Parameters
        ----------
        column_counts
            Sum of the counts of each column, [columns].
        """
        total = float(column_counts.sum())
        return float(column_counts[self.token_of_column >= 0].sum()) / total if total else 0.0

    def unmatched_ids(self, column_counts: np.ndarray | None = None, most: int = 3) -> list[str]:
        """Return ids that were not matched, those with the most counts first."""
        columns = np.flatnonzero(self.token_of_column < 0)
        if column_counts is not None:
            columns = columns[np.argsort(-column_counts[columns], kind="stable")]
        return self.gene_ids[columns[:most]].tolist()

    def lines(self, column_counts: np.ndarray | None = None) -> list[str]:
        """Describe the match for people: shares of genes and counts, ways, examples of both spellings.

        Parameters
        ----------
        column_counts
            Sum of the counts of each column, [columns]; None if they are not known.
        """
        columns = len(self.gene_ids)
        counts = "" if column_counts is None else f", with {self.share_of_counts(column_counts):.1%} of the counts"
        lines = [
            f"{self.num_matched:,} of {amount(columns, 'gene')} matched ({self.num_matched / max(1, columns):.1%})"
            f"{counts}"
        ]
        for way, number in self.num_columns_by_way.items():
            if number and way != "unmatched":
                lines.append(f"  {number:,} {WAYS[way]}")
        if self.num_matched < columns:
            lines.append(f"  not matched, for example: {', '.join(self.unmatched_ids(column_counts))}")
            lines.append(f"  ids of the gene set, for example: {', '.join(self.examples)}")
        return lines

    def values(self, column_counts: np.ndarray | None = None) -> dict[str, Any]:
        """Return the same as `lines`, as values for JSON."""
        return {
            "columns": len(self.gene_ids),
            "matched": self.num_matched,
            "genes": self.num_genes,
            "share_of_counts": None if column_counts is None else self.share_of_counts(column_counts),
            "by_way": self.num_columns_by_way,
            "unmatched_examples": self.unmatched_ids(column_counts),
        }

    def require(self, path: object, column_counts: np.ndarray | None = None, *, allow_low_match: bool = False) -> None:
        """Refuse a file whose genes are not those of the gene set.

        Parameters
        ----------
        path
            The file, for the message.
        column_counts
            Sum of the counts of each column, [columns]; None checks only that there is a match at all.
        allow_low_match
            Accept a share of the counts below `MINIMUM_SHARE`.

        Raises
        ------
        DataError
            If no gene matches, or matched genes hold less than `MINIMUM_SHARE` of the counts.
        """
        spellings = (
            f"ids of the file: {', '.join(self.unmatched_ids(column_counts))}; of the gene set: "
            f"{', '.join(self.examples)}. Take another column of ids (--gene-id-column) or the gene set of this species"
        )
        if not len(self.gene_ids):
            raise DataError(f"{path}: no genes.")
        if self.num_matched == 0:
            raise DataError(
                f"{path}: none of its {amount(len(self.gene_ids), 'gene')} is in the gene set ({spellings})."
            )
        if column_counts is None or not column_counts.any() or allow_low_match:
            return
        share = self.share_of_counts(column_counts)
        if share < MINIMUM_SHARE:
            raise DataError(
                f"{path}: genes of the gene set hold only {share:.1%} of its counts, {self.num_matched:,} of "
                f"{amount(len(self.gene_ids), 'gene')} matched ({spellings}); --allow-low-match accepts it."
            )
