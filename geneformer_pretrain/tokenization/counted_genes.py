"""Result of a pass over counts: values of each gene in bins. Results of many machines add up to one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_pretrain.console import amount
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import replacing, require_new
from geneformer_pretrain.tokenization.gene_set import MAX_TOKENS, SPECIAL_TOKENS, GeneSet
from geneformer_pretrain.tokenization.medians import LAYOUT, NUM_BINS, MedianSketch

FORMAT_VERSION = 1
"""Raised when a partial result written now could not be read by an older release."""

_METADATA = b"geneformer_pretrain.counted_genes"
_SCHEMA = pa.schema(
    [
        ("gene_id", pa.string()),
        ("symbol", pa.string()),
        ("bins", pa.list_(pa.uint16())),
        ("cells", pa.list_(pa.uint32())),
    ]
)


@dataclass(frozen=True)
class Source:
    """One file of counts that was read.

    Attributes
    ----------
    file
        Absolute path.
    cells, counted_cells
        Cells of the file, and those that pass the filter and have counts.
    counts, matched_counts
        Sum of all counts of these cells, and of those of the genes that were counted.
    n_counts_column, filter_column
        Columns that gave the totals and chose the cells, if any did.
    """

    file: str
    cells: int
    counted_cells: int
    counts: float
    matched_counts: float
    n_counts_column: str | None
    filter_column: str | None


@dataclass(frozen=True, eq=False)
class CountedGenes:
    """Genes, how their values are distributed, and where these come from.

    Attributes
    ----------
    gene_ids, symbols
        Of each gene; the symbol may be None.
    sketch
        Distribution of the non-zero count / n_counts * target_sum of each gene.
    rule
        What must be the same for results that are merged: choice of genes and target sum.
    sources
        Files of counts.
    """

    gene_ids: list[str]
    symbols: list[str | None]
    sketch: MedianSketch
    rule: dict[str, Any]
    sources: list[Source]

    @property
    def counted_cells(self) -> int:
        """Number of cells that were counted."""
        return sum(source.counted_cells for source in self.sources)

    def to_gene_set(
        self,
        *,
        name: str,
        species: str | None = None,
        special_tokens: str = "v1",
        max_tokens: int | None = None,
        min_cells: int = 1,
        exact: np.ndarray | None = None,
    ) -> GeneSet:
        """Make a gene set: special tokens, then genes in the order of their ids.

        Parameters
        ----------
        special_tokens
            `v1` or `v2`.
        max_tokens
            Longest cell; by default that of the Geneformer with these special tokens.
        min_cells
            Leave out genes with counts in fewer cells. With 0, genes without counts stay, without a median.
        exact
            Exact medians, float64 [genes]; None: those of the sketch.

        Raises
        ------
        DataError
            If no gene is left, or a median lies outside of the sketch's range.
        """
        medians = self.sketch.medians() if exact is None else exact
        if len(outside := np.flatnonzero(np.isinf(medians))):
            more = f" and {amount(len(outside) - 1, 'more gene')}" if len(outside) > 1 else ""
            raise DataError(
                f"The median of {self.gene_ids[outside[0]]}{more} lies outside of "
                "0.00006 to 16,384 counts in 10,000: correct the column of totals, or use --exact."
            )
        cells = self.sketch.num_cells
        kept = [gene for gene in sorted(range(len(cells)), key=self.gene_ids.__getitem__) if cells[gene] >= min_cells]
        if not kept:
            raise DataError(f"No gene has counts in {min_cells:,} or more of {amount(self.counted_cells, 'cell')}.")
        special = SPECIAL_TOKENS[special_tokens]
        return GeneSet(
            name=name,
            species=species,
            tokens=[*special, *(self.gene_ids[gene] for gene in kept)],
            symbols=[*(None for _ in special), *(self.symbols[gene] for gene in kept)],
            medians=np.concatenate([np.full(len(special), np.nan), medians[kept]]),
            max_tokens=MAX_TOKENS[special_tokens] if max_tokens is None else max_tokens,
            target_sum=self.rule["target_sum"],
            origin={
                "made_by": "gene-set build",
                "medians": "within 0.5%" if exact is None else "exact",
                "cells": self.counted_cells,
                "min_cells": min_cells,
                "genes_left_out": len(cells) - len(kept),
                **self.rule,
                "sources": [asdict(source) for source in self.sources],
            },
        )

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write a partial result, a parquet file, aside and rename it."""
        require_new(path, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        genes, bins = np.nonzero(self.sketch.bins)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(genes, minlength=len(self.gene_ids)))]).astype(np.int32)
        table = pa.Table.from_arrays(
            [
                pa.array(self.gene_ids, pa.string()),
                pa.array(self.symbols, pa.string()),
                pa.ListArray.from_arrays(offsets, bins.astype(np.uint16)),
                pa.ListArray.from_arrays(offsets, self.sketch.bins[genes, bins]),
            ],
            schema=_SCHEMA,
        )
        facts = {
            "format_version": FORMAT_VERSION,
            "layout": LAYOUT,
            "rule": self.rule,
            "sources": [asdict(source) for source in self.sources],
        }
        with replacing(path) as temporary:
            table = table.replace_schema_metadata({_METADATA: json.dumps(facts)})
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> "CountedGenes":
        """Read a partial result.

        Raises
        ------
        DataError
            If it is none, or of a newer release.
        """
        try:
            table = pq.read_table(path)
            facts = json.loads((table.schema.metadata or {})[_METADATA])
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file.") from error
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a partial result of `gene-set build --partial`, or damaged.") from error
        if facts["format_version"] > FORMAT_VERSION or facts["layout"] != LAYOUT:
            raise DataError(f"{path}: written by another release of geneformer-pretrain; use the newer of the two.")
        bins, cells = (table[name].combine_chunks() for name in ("bins", "cells"))
        sketch = MedianSketch.empty(len(table))
        genes = np.repeat(np.arange(len(table)), np.diff(bins.offsets.to_numpy()))
        sketch.bins[genes, bins.values.to_numpy()] = cells.values.to_numpy()
        return cls(
            table["gene_id"].to_pylist(),
            table["symbol"].to_pylist(),
            sketch,
            facts["rule"],
            [Source(**source) for source in facts["sources"]],
        )


def merge(paths: Sequence[Path]) -> CountedGenes:
    """Add partial results up; the same as one pass over all their files.

    Raises
    ------
    DataError
        If they were made of different genes, or hold the same file of counts.
    """
    place_of: dict[str, int] = {}
    symbols: list[str | None] = []
    bins = np.zeros((0, NUM_BINS), np.uint32)
    rule: dict[str, Any] = {}
    file_of: dict[Source, Path] = {}
    for path in paths:
        part = CountedGenes.load(path)
        rule = rule or part.rule
        if part.rule != rule:
            names = [name for name in rule if part.rule.get(name) != rule[name]]
            differences = "; ".join(f"{name}: {part.rule.get(name)}, there {rule[name]}" for name in names)
            raise DataError(
                f"{path}: does not fit {paths[0]} ({differences}); partial results of one gene set need the same "
                "choice of genes."
            )
        for source in part.sources:
            if source in file_of:
                raise DataError(
                    f"{path}: holds {source.file}, and so does {file_of[source]}; its cells would be doubled."
                )
            file_of[source] = path
        for gene_id, symbol in zip(part.gene_ids, part.symbols, strict=True):
            if place_of.setdefault(gene_id, len(place_of)) == len(symbols):
                symbols.append(symbol)
        bins = np.concatenate([bins, np.zeros((len(place_of) - len(bins), NUM_BINS), np.uint32)])
        bins[[place_of[gene_id] for gene_id in part.gene_ids]] += part.sketch.bins
    counted = CountedGenes(list(place_of), symbols, MedianSketch(bins), rule, list(file_of))
    if counted.counted_cells >= 1 << 32:
        raise DataError(f"{counted.counted_cells:,} cells are more than a sketch can count (2**32).")
    return counted
