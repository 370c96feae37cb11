"""Statistics of in-silico perturbations: from scores of (cell, perturbation) to one row a perturbation.

Three questions are asked of every perturbation. The p-values of the first and the last are adjusted over all
perturbations by Benjamini and Hochberg; that of the second cannot fall below 1 / 201 and is not.

1. Do its scores differ from those of all perturbations pooled? Wilcoxon's rank-sum test with cells as the sample, as
   the Geneformer tools do it. Cells of one donor resemble each other, so with many cells this finds differences that
   the next donor does not show.
2. Does it differ from random genes of like rank? A score depends on the gene's rank and on the cell, whatever the
   gene. The *excess* of a score is its difference from the mean of the other genes of like rank in the same cell; the
   null is the mean excess of the other perturbations of like rank and like number of cells.
3. Is the excess the same in all donors? With a replicate column, cells are averaged within each donor, and Student's
   t-test asks whether the donors' means lie on one side of zero. Donors, not cells, are the sample.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from geneformer_pretrain.console import Progress
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import replacing
from geneformer_pretrain.inference.statistics_plots import plot_ranked, plot_volcano
from geneformer_pretrain.inference.statistics_scores import (
    MIN_REPLICATES,
    TESTED_REPLICATES,
    FloatArray,
    IntArray,
    MidRanks,
    ScoreReader,
    like_rank_means,
    score_columns,
    score_files,
)

FORMAT_VERSION = 1
NULL_SIZE, MIN_NULL = 200, 20
"""Perturbations of like rank that make a null, if there are so many, and the fewest that do."""
NORMAL_MAD = float(stats.norm.ppf(0.75))
"""Median absolute deviation of a normal distribution, in its standard deviations."""
SIGNIFICANT = 0.05


def summarize(
    scores: Path | Sequence[Path],
    output: Path,
    *,
    states: Sequence[str] | None = None,
    replicates: str | None = None,
    symbols: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `genes.parquet`, `summary.json`, `ranked.png` and `volcano.png` of the scores of a perturbation run.

    The scores are read twice, in chunks; memory depends on the number of perturbations (times that of replicates),
    not on the number of scores. Files of that name in `output` are replaced.

    Parameters
    ----------
    scores
        Folder with `part-*.parquet`, or the files.
    output
        Folder of the results.
    states
        States whose shifts are summarised, the goal first; all if not given.
    replicates
        Column of the scores that names each cell's replicate, such as its donor.
    symbols
        Gene symbols of gene ids, for the table and the plots.

    Returns
    -------
    dict
        The content of `summary.json`.

    Raises
    ------
    DataError
        Scores that cannot be used, or replicates that are all the same.
    """
    files = score_files(scores)
    reader = ScoreReader(files, score_columns(files, states, replicates), replicates)
    with Progress(2 * reader.num_rows, "summarize", "score") as progress:
        pools = _pool(reader, progress)
        if replicates and len(reader.replicates) < MIN_REPLICATES:
            only = ", ".join(reader.replicates.numbers) or "no cell has a value"
            raise DataError(
                f"--replicates {replicates}: all cells are of one replicate ({only}), and statistics need at least "
                f"{MIN_REPLICATES}, p-values {TESTED_REPLICATES}; choose another column or leave the option out."
            )
        sums = _accumulate(reader, pools, progress)
    table = _table(reader, pools, sums, symbols)
    summary = _summary(table, reader, pools, sums)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "genes.parquet") as path:
        pq.write_table(table, path)
    first = f"replicate_q_{reader.score_names[0]}"
    test = "replicate_q" if replicates and table[first].null_count < len(table) else "q"
    for name, plot in (("ranked.png", plot_ranked), ("volcano.png", plot_volcano)):
        with replacing(output / name) as path:
            plot(table, reader.score_names[0], test, path)
    with replacing(output / "summary.json") as path:  # the last, since it says that all are complete
        path.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


@dataclass
class Pool:
    """All values of one score."""

    ranks: MidRanks
    total: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of all values; 0 if there is none."""
        return self.total / max(self.ranks.size, 1)


def _pool(reader: ScoreReader, progress: Progress) -> list[Pool]:
    """Read all scores once: the pooled values, and the names of perturbations and replicates."""
    pools = [Pool(MidRanks()) for _ in reader.score_names]
    for chunk in reader:
        for pool, values in zip(pools, chunk.scores, strict=True):
            values = values[~np.isnan(values)]
            pool.ranks.add(values)
            pool.total += float(values.sum())
        progress.advance(len(chunk.cell))
    if not any(pool.ranks.size for pool in pools):
        raise DataError(f"{reader.files[0].parent}: there are no scores; run perturb on cells that hold the genes.")
    return pools


class Sums:
    """Sums over the scores of each perturbation and of each (perturbation, replicate)."""

    def __init__(self, scores: int, perturbations: int, replicates: int) -> None:
        by_gene, by_replicate = (scores, perturbations), (scores, perturbations, replicates)
        self.rows, self.ranked = np.zeros(perturbations, np.int64), np.zeros(perturbations, np.int64)
        self.rank = np.zeros(perturbations)
        self.count, self.compared = np.zeros(by_gene, np.int64), np.zeros(by_gene, np.int64)
        self.centred, self.squares, self.mid_ranks, self.excess = (np.zeros(by_gene) for _ in range(4))
        self.replicate_count, self.replicate_compared = (
            np.zeros(by_replicate, np.int64),
            np.zeros(by_replicate, np.int64),
        )
        self.replicate_sum, self.replicate_excess = np.zeros(by_replicate), np.zeros(by_replicate)
        self.without_replicate = 0


def _accumulate(reader: ScoreReader, pools: Sequence[Pool], progress: Progress) -> Sums:
    """Read all scores again, now that the pool and the names are known."""
    genes, replicates = len(reader.perturbations), len(reader.replicates)
    sums = Sums(len(pools), genes, replicates)

    def add(sum_: np.ndarray, group: IntArray, weights: FloatArray | None = None) -> None:
        sum_ += np.bincount(group, weights, sum_.size).astype(sum_.dtype, copy=False).reshape(sum_.shape)

    for chunk in reader:
        add(sums.rows, chunk.perturbation)
        ranked = ~np.isnan(chunk.rank)
        add(sums.ranked, chunk.perturbation[ranked])
        add(sums.rank, chunk.perturbation[ranked], chunk.rank[ranked])
        if chunk.replicate is not None:
            sums.without_replicate += int((chunk.replicate < 0).sum())
        for score, (values, reference) in enumerate(zip(chunk.scores, like_rank_means(chunk), strict=True)):
            there = ~np.isnan(values)
            gene, value = chunk.perturbation[there], values[there]
            centred = value - pools[score].mean
            add(sums.count[score], gene)
            add(sums.centred[score], gene, centred)
            add(sums.squares[score], gene, centred**2)
            add(sums.mid_ranks[score], gene, pools[score].ranks(value))
            excess = values - reference
            compared = ~np.isnan(excess)
            add(sums.compared[score], chunk.perturbation[compared])
            add(sums.excess[score], chunk.perturbation[compared], excess[compared])
            if chunk.replicate is not None:
                group = chunk.perturbation * replicates + chunk.replicate
                there &= chunk.replicate >= 0
                compared &= chunk.replicate >= 0
                add(sums.replicate_count[score], group[there])
                add(sums.replicate_sum[score], group[there], values[there])
                add(sums.replicate_compared[score], group[compared])
                add(sums.replicate_excess[score], group[compared], excess[compared])
        progress.advance(len(chunk.cell))
    return sums


def rank_sum_p(mid_rank_sums: FloatArray, counts: IntArray, pool_size: int) -> FloatArray:
    """Test each sample against the pool by Wilcoxon's rank-sum test, as `scipy.stats.ranksums` does.

    The normal approximation without correction for ties. The sample is part of the pool too, as in the Geneformer
    tools.

    Parameters
    ----------
    mid_rank_sums
        Sum over the sample of how many of the pool are smaller, equal ones counting half: the Mann-Whitney U.
    counts
        Sizes of the samples.

    Returns
    -------
    array
        Two-sided p-values; NaN for empty samples.
    """
    n = counts.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (mid_rank_sums - n * pool_size / 2) / np.sqrt(n * pool_size * (n + pool_size + 1) / 12)
    return 2 * stats.norm.sf(np.abs(z))


def false_discovery_rate(p: FloatArray) -> FloatArray:
    """Adjust p-values by Benjamini and Hochberg (1995); NaN stays NaN and does not count."""
    q = np.full(p.shape, np.nan)
    there = ~np.isnan(p)
    if there.any():
        q[there] = stats.false_discovery_control(p[there])
    return q


def like_rank_null(excess: FloatArray, rank: FloatArray, cells: IntArray) -> tuple[FloatArray, FloatArray]:
    """Compare the mean excess of each perturbation with those of the perturbations nearest in mean rank.

    The mean of a few cells varies more than that of many, so only perturbations of half to twice as many cells are
    compared with each other.

    Parameters
    ----------
    excess, rank
        [perturbations] mean excess and mean rank, NaN where unknown.
    cells
        [perturbations] numbers of cells in the mean excess.

    Returns
    -------
    z, p
        Distance from the null's median in standard deviations (estimated from the median absolute deviation, which
        real hits in the null do not move), and the share of the null that is at least as far from its median, the
        perturbation itself counted too. NaN where fewer than `MIN_NULL` others are there.
    """
    z, p = np.full(excess.shape, np.nan), np.full(excess.shape, np.nan)
    known = np.flatnonzero(~np.isnan(excess) & ~np.isnan(rank))
    known = known[np.argsort(rank[known], kind="stable")]
    for number in np.unique(cells[known]):
        alike = known[(2 * cells[known] >= number) & (cells[known] <= 2 * number)]
        others = min(NULL_SIZE, len(alike) - 1)
        if others < MIN_NULL:
            continue
        alike_rank = rank[alike]
        for gene in known[cells[known] == number]:
            place = int(np.searchsorted(alike_rank, rank[gene]))
            near = alike[max(0, place - NULL_SIZE - 1) : place + NULL_SIZE + 1]
            near = near[near != gene]
            near = near[np.argsort(np.abs(rank[near] - rank[gene]), kind="stable")[:others]]
            null = excess[near]
            median = np.median(null)
            distance, distances = excess[gene] - median, np.abs(null - median)
            spread = np.median(distances) / NORMAL_MAD
            z[gene] = distance / spread if spread > 0 else np.nan
            p[gene] = (1 + np.sum(distances >= abs(distance))) / (1 + others)
    return z, p


def replicate_test(means: FloatArray) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
    """Test whether the mean over replicates is zero: Student's one-sample t-test, `scipy.stats.ttest_1samp`.

    Parameters
    ----------
    means
        [perturbations, replicates] mean of each replicate, NaN where it has no cell.

    Returns
    -------
    count, mean, sd, p
        Replicates, their mean, their standard deviation, NaN for fewer than two, and the two-sided p-value, NaN for
        fewer than three.
    """
    there = ~np.isnan(means)
    count = there.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, means, 0).sum(axis=1) / np.where(count > 0, count, np.nan)
        squares = np.where(there, (means - mean[:, None]) ** 2, 0).sum(axis=1)
        sd = np.sqrt(squares / np.where(count >= MIN_REPLICATES, count - 1, np.nan))
        p = 2 * stats.t.sf(np.abs(mean) / (sd / np.sqrt(count)), np.maximum(count - 1, 1))
    # Replicates that all show exactly no change have no spread either.
    p = np.where((mean == 0) & (sd == 0), 1.0, p)
    return count, mean, sd, np.where(count >= TESTED_REPLICATES, p, np.nan)


def _ratio(numerator: FloatArray, denominator: IntArray) -> FloatArray:
    return numerator / np.where(denominator > 0, denominator, np.nan)


def _table(reader: ScoreReader, pools: Sequence[Pool], sums: Sums, symbols: Mapping[str, str] | None) -> pa.Table:
    """Make the rows of `genes.parquet`, the most significant first."""
    names = list(reader.perturbations.numbers)
    rank = _ratio(sums.rank, sums.ranked)
    columns: dict[str, Any] = {"perturbation": names}
    if symbols is not None:
        columns["symbol"] = pa.array([_symbol(name.split("+"), symbols) for name in names], pa.string())
    columns |= {"cells": sums.rows, "mean_rank": rank}
    for score, (name, pool) in enumerate(zip(reader.score_names, pools, strict=True)):
        count, size = sums.count[score], pool.ranks.size
        offset = _ratio(sums.centred[score], count)
        variance = (sums.squares[score] - count * offset**2) / np.where(count > 1, count - 1, np.nan)
        alone = (count == size) | (count == 0)  # nothing to compare with
        p = np.where(alone, np.nan, rank_sum_p(sums.mid_ranks[score], count, size))
        effect = 2 * _ratio(sums.mid_ranks[score], count * max(size, 1)) - 1
        excess = _ratio(sums.excess[score], sums.compared[score])
        null_z, null_p = like_rank_null(excess, rank, sums.compared[score])
        columns |= {
            f"mean_{name}": offset + pool.mean,
            f"sd_{name}": np.sqrt(np.maximum(variance, 0)),
            f"effect_{name}": effect,
            f"p_{name}": p,
            f"q_{name}": false_discovery_rate(p),
            f"excess_{name}": excess,
            f"null_z_{name}": null_z,
            f"null_p_{name}": null_p,
        }
        if reader.replicate_column:
            means = _replicate_means(name, score, sums)
            replicates, mean, sd, p = replicate_test(means)
            columns |= {
                f"replicates_{name}": replicates,
                f"replicate_mean_{name}": mean,
                f"replicate_sd_{name}": sd,
                f"replicate_p_{name}": p,
                f"replicate_q_{name}": false_discovery_rate(p),
            }
    tests = ["replicate_p", "p"] if reader.replicate_column else ["p"]
    order = [*(f"{test}_{reader.score_names[0]}" for test in tests), "perturbation"]
    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    return pa.table(arrays).sort_by([(name, "ascending") for name in order])


def _symbol(genes: Sequence[str], symbols: Mapping[str, str]) -> str | None:
    """Symbols joined by `+`, or None where one is not known."""
    found = [symbols.get(gene) for gene in genes]
    return None if None in found else "+".join(map(str, found))


def compares_with_like_rank(sums: Sums) -> bool:
    """Decide what replicates are tested against: genes of like rank, if most scores have such, else no shift.

    One rule for the whole table, so that its rows can be compared.
    """
    return 2 * int(sums.compared[0].sum()) >= int(sums.count[0].sum())


def _replicate_means(name: str, score: int, sums: Sums) -> FloatArray:
    """Mean excess of each replicate; its mean shift where there are no genes of like rank to compare with."""
    if compares_with_like_rank(sums):
        return _ratio(sums.replicate_excess[score], sums.replicate_compared[score])
    if "shift_" in name:
        return _ratio(sums.replicate_sum[score], sums.replicate_count[score])
    return np.full(sums.replicate_sum[score].shape, np.nan)  # every change lowers a similarity below 1


def _tested(reader: ScoreReader, sums: Sums) -> str:
    if compares_with_like_rank(sums):
        return "excess over genes of like rank"
    return "shift" if any("shift_" in name for name in reader.score_names) else "nothing"


def _summary(table: pa.Table, reader: ScoreReader, pools: Sequence[Pool], sums: Sums) -> dict[str, Any]:
    """Make the content of `summary.json`."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "rows": int(sums.rows.sum()),
        "perturbations": len(reader.perturbations),
        "scores": {},
        "like_rank": compares_with_like_rank(sums),
    }
    if reader.replicate_column:
        values["replicates"] = {
            "column": reader.replicate_column,
            "names": sorted(reader.replicates.numbers),
            "scores_without": sums.without_replicate,
            "tested": _tested(reader, sums),
        }
    tests = ["q", *(["replicate_q"] if reader.replicate_column else [])]
    for name, pool in zip(reader.score_names, pools, strict=True):
        values["scores"][name] = {
            "values": pool.ranks.size,
            "missing": values["rows"] - pool.ranks.size,
            "mean": pool.mean if pool.ranks.size else None,
            "bits_of_precision": 24 - pool.ranks.dropped_bits,
            "significant": {test: int((table[f"{test}_{name}"].to_numpy() < SIGNIFICANT).sum()) for test in tests},
        }
    return values
