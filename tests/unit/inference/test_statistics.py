"""Statistics of perturbations against scipy, loops written out, and a simulation whose truth is known."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from scipy import stats

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference import statistics, statistics_plots, statistics_scores
from geneformer_pretrain.inference.statistics import like_rank_null, replicate_test, summarize
from geneformer_pretrain.inference.statistics_scores import Chunk, MidRanks, like_rank_means
from tests.unit.inference.simulated_scores import donor_scores, write_scores

ROOT = Path(__file__).resolve().parents[3]


def read_genes(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "genes.parquet").to_pandas().set_index("perturbation")


def small_scores(seed: int = 0, cells: int = 40, genes: int = 30) -> pa.Table:
    """Cells that hold some of the genes, with ties, missing values and replicates."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("cell", "perturbation", "rank", "donor")}
    for cell in range(cells):
        held = generator.permutation(genes)[: generator.integers(8, genes)]
        rows["cell"] += [cell] * len(held)
        rows["perturbation"] += [f"g{gene}" for gene in held]
        rows["rank"] += list(range(len(held)))
        rows["donor"] += ["ABC"[cell % 3]] * len(held)
    n = len(rows["cell"])
    shift = generator.normal(size=n).round(1).astype(np.float32)  # rounded, so that there are ties
    similarity = generator.random(n).astype(np.float32)
    return pa.table(
        rows | {"gene_similarity": pa.array(similarity, mask=generator.random(n) < 0.1), "shift_goal": shift}
    )


def brute_force_like_rank(cell: np.ndarray, rank: np.ndarray, score: np.ndarray) -> np.ndarray:
    means = np.full(len(score), np.nan)
    for i in range(len(score)):
        others = [
            score[j]
            for j in range(len(score))
            if j != i and cell[j] == cell[i] and abs(rank[j] - rank[i]) <= max(10, rank[i] // 10)
            if not np.isnan(score[j])
        ]
        if not np.isnan(rank[i]) and len(others) >= 5:
            means[i] = np.mean(others)
    return means


def test_table_equals_scipy_and_pandas(tmp_path: Path) -> None:
    scores = small_scores()
    write_scores(tmp_path / "scores", scores, parts=3)
    summarize(tmp_path / "scores", tmp_path, replicates="donor")
    genes = read_genes(tmp_path)
    frame = scores.to_pandas().astype({"shift_goal": np.float64, "gene_similarity": np.float64})
    assert set(genes.index) == set(frame.perturbation)
    for name in ("shift_goal", "gene_similarity"):
        pool = frame[name].dropna().to_numpy()
        by_gene = {gene: values.dropna().to_numpy() for gene, values in frame.groupby("perturbation")[name]}
        frame["excess"] = frame[name] - brute_force_like_rank(
            *(frame[column].to_numpy(np.float64) for column in ("cell", "rank", name))
        )
        expected = pd.DataFrame(
            {
                f"mean_{name}": {gene: values.mean() for gene, values in by_gene.items()},
                f"sd_{name}": {gene: values.std(ddof=1) for gene, values in by_gene.items()},
                f"p_{name}": {gene: stats.ranksums(values, pool).pvalue for gene, values in by_gene.items()},
                f"effect_{name}": {g: np.sign(values[:, None] - pool).mean() for g, values in by_gene.items()},
                f"excess_{name}": frame.groupby("perturbation")["excess"].mean(),
            }
        )
        expected[f"q_{name}"] = stats.false_discovery_control(expected[f"p_{name}"])
        by_donor = frame.groupby(["perturbation", "donor"])["excess"].mean().unstack()
        expected[f"replicate_mean_{name}"] = by_donor.mean(axis=1)
        expected[f"replicate_sd_{name}"] = by_donor.std(axis=1)
        expected[f"replicate_p_{name}"] = stats.ttest_1samp(by_donor, 0, axis=1).pvalue
        expected[f"replicate_q_{name}"] = stats.false_discovery_control(expected[f"replicate_p_{name}"])
        for column in expected:
            np.testing.assert_allclose(genes[column], expected[column].loc[genes.index], rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(genes["cells"], frame.groupby("perturbation").size().loc[genes.index])
    np.testing.assert_allclose(genes["mean_rank"], frame.groupby("perturbation")["rank"].mean().loc[genes.index])


@pytest.mark.parametrize("parts", [1, 4])
def test_cutting_into_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    summarize(write_scores(tmp_path / "scores", small_scores()), tmp_path / "whole", replicates="donor")
    monkeypatch.setattr(statistics_scores, "BATCH_ROWS", 17)
    summarize(write_scores(tmp_path / "cut", small_scores(), parts), tmp_path / "out", replicates="donor")
    pd.testing.assert_frame_equal(read_genes(tmp_path / "out"), read_genes(tmp_path / "whole"), rtol=1e-9)


@given(
    st.lists(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-2, 2, width=32)), min_size=1, max_size=5)
)
def test_mid_ranks_are_those_of_scipy(batches: list[np.ndarray]) -> None:
    ranks = MidRanks()
    ranks.add(np.empty(0))
    assert not len(ranks(np.empty(0)))
    for batch in batches:
        ranks.add(batch.astype(np.float64))
    values = np.concatenate(batches)
    np.testing.assert_array_equal(ranks(values.astype(np.float64)), stats.rankdata(values) - 0.5)
    assert ranks.dropped_bits == 0


def test_large_pools_are_bounded_and_nearly_exact() -> None:
    values = np.random.default_rng(0).normal(0, 1e-3, 200_000)
    ranks = MidRanks(max_distinct=1 << 14)
    for batch in np.split(values, 20):
        ranks.add(batch)
    exact = stats.rankdata(values.astype(np.float32)) - 0.5
    assert ranks.dropped_bits > 0
    assert np.abs(ranks(values) - exact).max() < 1e-3 * len(values)
    assert abs(ranks(values).sum() - exact.sum()) < 1e-9 * exact.sum()
    assert len(ranks._keys) <= 1 << 14


@given(st.integers(0, 10_000))
def test_means_of_like_rank_equal_loops(seed: int) -> None:
    generator = np.random.default_rng(seed)
    cell = np.sort(generator.integers(0, 3, 60))
    rank = generator.integers(0, 300, 60).astype(np.float64)
    rank[generator.random(60) < 0.1] = np.nan
    score = generator.normal(size=60)
    score[generator.random(60) < 0.1] = np.nan
    means = like_rank_means(Chunk(cell, np.zeros(60, np.int64), None, rank, score[None]))[0]
    expected = brute_force_like_rank(cell, rank, score)
    np.testing.assert_allclose(means, expected, rtol=1e-9, atol=1e-12)


def test_null_is_made_of_the_nearest_in_rank() -> None:
    generator = np.random.default_rng(1)
    rank, excess = generator.random(700) * 2000, generator.normal(size=700)
    excess[3], excess[4] = 9.0, np.nan
    cells = np.where(generator.random(700) < 0.8, 100, 40)
    cells[[0, 3, 4, 100, 699]] = 50, 100, 50, 40, 200
    z, p = like_rank_null(excess, rank, cells)
    for gene in (0, 3, 100, 699):
        nearest = np.argsort(np.abs(rank - rank[gene]))
        alike = (cells >= cells[gene] / 2) & (cells <= cells[gene] * 2)
        null = excess[[g for g in nearest if g != gene and alike[g] and not np.isnan(excess[g])][:200]]
        distance = excess[gene] - np.median(null)
        far = np.abs(null - np.median(null)) >= abs(distance)
        assert p[gene] == pytest.approx((1 + far.sum()) / (1 + len(null)))
        assert z[gene] == pytest.approx(distance / stats.median_abs_deviation(null, scale="normal"))
    assert p[3] == pytest.approx(1 / 201)
    assert np.isnan(p[4])
    assert 0.03 < np.nanmean(p < 0.05) < 0.08  # uniform under the null


def test_genes_of_few_cells_are_not_found_by_their_noise() -> None:
    """A mean of one cell lies far from means of a hundred, whatever the gene."""
    generator = np.random.default_rng(2)
    cells = (10 ** generator.uniform(0, 2.5, 3000)).astype(np.int64)
    p = like_rank_null(generator.normal(size=3000) / np.sqrt(cells), generator.random(3000) * 2000, cells)[1]
    for some in (cells == 1, (cells > 1) & (cells < 10), cells >= 100):
        assert np.mean(p[some] < 0.05) < 0.12


def test_no_null_of_a_few_perturbations() -> None:
    z, p = like_rank_null(np.arange(20.0), np.arange(20.0), np.ones(20, np.int64))
    assert np.isnan(z).all()
    assert np.isnan(p).all()


def test_replicates_of_one_perturbation() -> None:
    agreed = [np.nan, 0.1, 0.1 + 1e-9, np.nan]  # two that happen to agree: p would be 1e-8
    means = np.array([[1.0, 2.0, np.nan, 4.0], [0.0] * 4, agreed, [np.nan, 3.0, np.nan, np.nan], [np.nan] * 4])
    count, mean, sd, p = replicate_test(means)
    assert count.tolist() == [3, 4, 2, 1, 0]
    assert sd[2] == pytest.approx(1e-9 / np.sqrt(2), rel=1e-3)
    assert p[0] == pytest.approx(stats.ttest_1samp([1, 2, 4], 0).pvalue)
    assert p[1] == 1
    assert np.isnan(p[2:]).all()
    np.testing.assert_allclose([mean[0], sd[0]], [7 / 3, np.std([1, 2, 4], ddof=1)])


SIMULATION = {"donors": 8, "cells_per_donor": 100, "genes": 200, "true_genes": 10, "donor_sd": 0.5, "effect": 2.0}


def test_cells_as_replicates_find_what_the_next_donor_does_not_show(tmp_path: Path) -> None:
    """The numbers of docs/perturbation.md."""
    found = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        summarize(write_scores(folder / "scores", donor_scores(**SIMULATION, seed=seed)), folder, replicates="donor_id")
        genes = read_genes(folder)
        true = genes.index < "gene010"
        hits = [genes[f"{test}_shift_healthy"] < 0.05 for test in ("q", "replicate_q")]
        found.append([int(x) for hit in hits for x in ((hit & true).sum(), (hit & ~true).sum())])
    cells_true, cells_false, donors_true, donors_false = np.array(found).T
    assert (cells_true == 10).all()
    assert (cells_false > 100).all()
    assert (donors_true >= 9).all()
    assert donors_false.sum() <= 5
    documented = re.findall(r"^\| seed (\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", docs(), re.MULTILINE)
    assert [[int(x) for x in row] for row in documented] == [[seed, *row] for seed, row in enumerate(found)]


def docs() -> str:
    return (ROOT / "docs/perturbation.md").read_text()


def test_documentation_lists_the_columns(tmp_path: Path) -> None:
    summarize(write_scores(tmp_path / "scores", small_scores()), tmp_path, replicates="donor", symbols={"g1": "TTN"})
    columns = {re.sub("_(gene_similarity|shift_goal)$", "_SCORE", name) for name in read_genes(tmp_path).columns}
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", docs(), re.MULTILINE))))
    assert columns <= listed, columns - listed


def test_summary_and_pictures(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", donor_scores(**SIMULATION | {"cells_per_donor": 20}, seed=0))
    values = summarize(tmp_path / "scores", tmp_path, replicates="donor_id", symbols={"gene003": "TTN"})
    assert values == json.loads((tmp_path / "summary.json").read_text())
    genes = read_genes(tmp_path)
    assert genes["symbol"]["gene003"] == "TTN"
    assert genes["symbol"]["gene004"] is None
    assert values["rows"] == 8 * 20 * 200
    assert values["replicates"]["names"] == [f"D{number}" for number in range(1, 9)]
    assert list(values["scores"]) == ["shift_healthy", "gene_similarity"]
    assert values["scores"]["shift_healthy"]["significant"] == {
        test: int((genes[f"{test}_shift_healthy"] < 0.05).sum()) for test in ("q", "replicate_q")
    }
    assert genes["replicate_p_shift_healthy"].is_monotonic_increasing
    for name in ("ranked.png", "volcano.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "genes.parquet",
        "ranked.png",
        "scores",
        "summary.json",
        "volcano.png",
    ]


def test_ranked_plot_lists_genes_with_their_numbers_of_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of one cell is easily the lowest of all; the picture has to show how little that is."""
    texts: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **_: texts.append(text))
    table = pa.table({"perturbation": ["a", "b"], "cells": [1, 2000], "mean_s": [0.2, 0.5], "q_s": [0.5, 0.5]})
    statistics_plots.plot_ranked(table, "s", "q", tmp_path / "ranked.png")
    assert texts == ["lowest (cells)\na (1)\nb (2,000)", "highest (cells)\nb (2,000)\na (1)"]


def test_names_in_the_volcano_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjusted p-values are often equal; drawn at their points, the names would cover each other."""
    names = [f"ENSG0000000000{number}" for number in range(8)]
    effect = np.linspace(0.50, 0.51, 8)
    table = pa.table({"perturbation": names, "effect_s": effect, "q_s": [0.01] * 8})
    boxes: list[Bbox] = []

    def save(figure: Figure, path: Path) -> None:
        figure.draw_without_rendering()
        boxes.extend(Text.get_window_extent(name) for name in figure.axes[0].texts)  # without the lines

    monkeypatch.setattr(statistics_plots, "save_figure", save)
    statistics_plots.plot_volcano(table, "s", "q", tmp_path / "volcano.png")
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_few_genes_are_tested_against_no_shift(tmp_path: Path) -> None:
    scores = donor_scores(**SIMULATION | {"genes": 4, "true_genes": 1}, seed=0)
    values = summarize(write_scores(tmp_path / "scores", scores), tmp_path, replicates="donor_id")
    genes, frame = read_genes(tmp_path), scores.to_pandas()
    assert values["replicates"]["tested"] == "shift"
    means = frame.groupby(["perturbation", "donor_id"])["shift_healthy"].mean().unstack()
    expected = stats.ttest_1samp(means.astype(np.float64), 0, axis=1).pvalue
    np.testing.assert_allclose(genes["replicate_p_shift_healthy"].sort_index(), expected, rtol=1e-5)
    assert genes["replicate_p_gene_similarity"].isna().all()
    assert genes["null_p_shift_healthy"].isna().all()


def test_a_few_genes_without_shifts_are_shown_by_the_pooled_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be tested with donors: the picture would be empty, and the table in the order of names."""
    drawn: list[str] = []
    monkeypatch.setattr(statistics, "plot_volcano", lambda table, score, test, path: drawn.append(test) or path.touch())
    scores = donor_scores(**SIMULATION | {"genes": 4, "true_genes": 1}, seed=0).drop_columns("shift_healthy")
    values = summarize(write_scores(tmp_path / "scores", scores), tmp_path, replicates="donor_id")
    assert values["replicates"]["tested"] == "nothing"
    assert drawn == ["q"]
    p = read_genes(tmp_path)["p_gene_similarity"]
    assert p.is_monotonic_increasing
    assert not p.index.is_monotonic_increasing


def test_one_perturbation_has_no_pool_to_compare_with(tmp_path: Path) -> None:
    scores = small_scores().filter(pa.compute.equal(small_scores()["perturbation"], "g1"))
    summarize(write_scores(tmp_path / "scores", scores), tmp_path)
    assert read_genes(tmp_path)["p_shift_goal"].isna().all()


def test_a_score_without_values_has_no_mean(tmp_path: Path) -> None:
    scores = small_scores()
    name = next(name for name in scores.column_names if name.endswith("_similarity"))
    nothing = pa.nulls(len(scores), pa.float32())
    found = summarize(write_scores(tmp_path / "scores", changed(scores, name, nothing)), tmp_path)
    found = found["scores"][name]
    assert (found["values"], found["missing"], found["mean"]) == (0, len(scores), None)


def test_names_of_many_genes_leave_room_for_the_picture(tmp_path: Path) -> None:
    """A warning of matplotlib, which is an error here, says that there is none."""
    scores = small_scores()
    names = pa.array(["+".join([name] * 100) for name in scores["perturbation"].to_pylist()])
    summarize(write_scores(tmp_path / "scores", changed(scores, "perturbation", names)), tmp_path)
    assert (tmp_path / "ranked.png").exists()


def test_cells_without_a_replicate_are_left_out_of_its_tests_and_counted(tmp_path: Path) -> None:
    scores = small_scores()
    donors = ["D" if cell % 2 else None if cell % 4 else "E" for cell in scores["cell"].to_pylist()]
    scores = scores.set_column(scores.column_names.index("donor"), "donor", pa.array(donors))
    values = summarize(write_scores(tmp_path / "scores", scores), tmp_path, replicates="donor")
    assert values["replicates"]["scores_without"] == donors.count(None)
    assert read_genes(tmp_path)["replicates_shift_goal"].max() == 2


def changed(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def test_mistakes_are_errors_in_words(tmp_path: Path) -> None:
    scores = small_scores()
    with pytest.raises(DataError, match=r"nowhere: no such file; name the folder scores/"):
        summarize(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no part-\*\.parquet"):
        summarize(tmp_path / "empty", tmp_path)
    good = write_scores(tmp_path / "scores", scores)
    with pytest.raises(DataError, match=r"part-00000\.parquet: has no column 'age'; it has cell, perturbation, rank"):
        summarize(good, tmp_path, replicates="age")
    with pytest.raises(DataError, match=r"has no column 'shift_ill'"):
        summarize(good, tmp_path, states=["ill"])
    nan = scores["shift_goal"].to_numpy().copy()
    nan[123] = np.nan
    bad = write_scores(tmp_path / "nan", changed(scores, "shift_goal", pa.array(nan)), parts=2)
    row = f"cell {scores['cell'][123]}, perturbation {scores['perturbation'][123]}"
    with pytest.raises(DataError, match=rf"part-00000\.parquet, row 123: shift_goal of {row}, is not a number"):
        summarize(bad, tmp_path)
    one = write_scores(tmp_path / "one", changed(scores, "donor", pa.array(["D1"] * len(scores))))
    with pytest.raises(DataError, match=r"of one replicate \(D1\), and .* at least 2, p-values 3;"):
        summarize(one, tmp_path, replicates="donor")
    with pytest.raises(DataError, match=r"has no scores"):
        summarize(write_scores(tmp_path / "none", scores.drop(["shift_goal", "gene_similarity"])), tmp_path)
    with pytest.raises(DataError, match=r"there are no scores; run perturb on cells that hold the genes"):
        summarize(write_scores(tmp_path / "zero", scores.slice(0, 0)), tmp_path)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/part-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"part-00000\.parquet: cannot be read as parquet"):
        summarize(tmp_path / "torn", tmp_path)
    assert not (tmp_path / "genes.parquet").exists()
    assert statistics.MIN_REPLICATES == 2
