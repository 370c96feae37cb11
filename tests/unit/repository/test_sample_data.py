"""The committed sample data: reproducible, true to Geneformer's rule, and with something to learn in it."""

import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.tokenization.counts import open_counts
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.tokenizer import tokenize_blocks
from sample_data import make_sample_data as msd

pytestmark = pytest.mark.process

FOLDER = Path(msd.__file__).parent
SAMPLE = FOLDER / "cells.parquet"


@pytest.fixture(scope="module")
def sample() -> pa.Table:
    return pq.read_table(SAMPLE)


@pytest.fixture(scope="module")
def tokens(sample: pa.Table) -> list[np.ndarray]:
    return [cell.values.to_numpy() for cell in sample["input_ids"]]


@pytest.fixture(scope="module")
def world() -> msd.World:
    return msd.make_world(0)


@pytest.fixture(scope="module")
def medians(world: msd.World) -> np.ndarray:
    return msd.reference_medians(world)


@pytest.fixture(scope="module")
def held_out(world: msd.World, medians: np.ndarray) -> list[msd.TypedCell]:
    return list(msd.simulate_cells(world, medians, msd.SAMPLE_CELLS, 2_000))


def test_script_reproduces_the_counts(tmp_path: Path) -> None:
    again = tmp_path / "counts.h5ad"
    command = [sys.executable, str(FOLDER / "make_sample_data.py"), "--counts", str(again)]
    subprocess.run(command, check=True)
    committed, made = anndata.read_h5ad(FOLDER / "counts.h5ad"), anndata.read_h5ad(again)
    assert (committed.X != made.X).nnz == 0
    assert committed.obs.equals(made.obs)
    assert committed.var.equals(made.var)
    assert (FOLDER / "counts.h5ad").stat().st_size < 3e6
    if (version("anndata"), version("h5py")) == ("0.12.19", "3.16.0"):  # they made the committed file
        assert again.read_bytes() == (FOLDER / "counts.h5ad").read_bytes()


def test_the_tokenizer_turns_the_counts_into_the_sample(
    medians: np.ndarray, tokens: list[np.ndarray], tmp_path: Path
) -> None:
    """Token for token, with the medians of the reference cells."""
    special = [np.nan] * msd.FIRST_GENE_TOKEN
    gene_set = GeneSet(
        name="simulated",
        species=None,
        tokens=msd.VOCABULARY,
        symbols=[None] * len(msd.VOCABULARY),
        medians=np.concatenate([special, medians]),
        max_tokens=msd.MAX_TOKENS,
    )
    with open_counts(FOLDER / "counts.h5ad") as counts:
        blocks = list(tokenize_blocks(counts, gene_set, n_counts_column="n_counts"))
    assert sum(block.tally.other_totals for block in blocks) == 0
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    assert lengths.tolist() == [len(cell) for cell in tokens]
    np.testing.assert_array_equal(np.concatenate([block.tokens for block in blocks]), np.concatenate(tokens))


def test_script_reproduces_the_committed_files(tmp_path: Path, sample: pa.Table) -> None:
    cells, vocab = tmp_path / "cells.parquet", tmp_path / "vocab.txt"
    command = [
        sys.executable,
        str(FOLDER / "make_sample_data.py"),
        "--out",
        str(cells),
        "--vocab",
        str(vocab),
    ]
    subprocess.run(command, check=True)
    assert pq.read_table(cells).equals(sample)
    assert vocab.read_bytes() == (FOLDER / "vocab.txt").read_bytes()
    if pq.read_metadata(cells).created_by == pq.read_metadata(SAMPLE).created_by:
        assert cells.read_bytes() == SAMPLE.read_bytes()
    assert sorted(tmp_path.iterdir()) == [cells, vocab]


def test_columns_and_lengths(sample: pa.Table, tokens: list[np.ndarray]) -> None:
    assert sample.schema == pa.schema([("input_ids", pa.list_(pa.int16())), ("length", pa.int32())])
    assert sample.schema.metadata is None
    assert sample.num_rows == 500
    assert SAMPLE.stat().st_size < 700_000
    assert sample["length"].to_pylist() == [len(ids) for ids in tokens]


def test_tokens_of_a_cell_are_distinct_genes(tokens: list[np.ndarray]) -> None:
    for ids in tokens:
        assert 1 <= len(ids) <= 2048
        assert len(np.unique(ids)) == len(ids)
        assert ids.min() >= 2
        assert ids.max() < 25_426


@pytest.mark.parametrize("cell", [0, 1, 7, 499, 1234])
def test_cells_follow_the_geneformer_rule(cell: int, sample: pa.Table, world: msd.World, medians: np.ndarray) -> None:
    counts, _ = msd.simulate_counts(world, cell)
    total = sum(counts.tolist())
    expression = {
        gene: count / total * 10_000 / medians[gene]
        for gene, count in enumerate(counts.tolist())
        if count and not math.isnan(medians[gene])
    }
    expected = [gene + 2 for gene in sorted(expression, key=lambda gene: (-expression[gene], gene))][:2048]
    assert msd.rank_tokens(counts, medians).tolist() == expected
    if cell < msd.SAMPLE_CELLS:
        assert sample["input_ids"][cell].as_py() == expected


def test_genes_without_counts_or_median_are_dropped_and_ties_keep_gene_order() -> None:
    counts, medians = np.zeros(msd.N_GENES, dtype=np.int64), np.ones(msd.N_GENES)
    counts[[3, 5, 8, 9]] = [2, 4, 2, 7]
    medians[9] = np.nan
    medians[5] = 4.0
    assert msd.rank_tokens(counts, medians).tolist() == [5, 10, 7]


def test_medians_are_medians_of_the_nonzero_normalised_counts(
    monkeypatch: pytest.MonkeyPatch, world: msd.World
) -> None:
    monkeypatch.setattr(msd, "REFERENCE_CELLS", 60)
    cells = range(msd.FIRST_REFERENCE_CELL, msd.FIRST_REFERENCE_CELL + 60)
    x = np.stack([msd.simulate_counts(world, cell)[0] for cell in cells]).astype(float)
    x *= 10_000 / x.sum(axis=1, keepdims=True)
    medians = msd.reference_medians(world)
    for gene in [*range(300), msd.N_GENES - 1]:
        values = x[x[:, gene] > 0, gene]
        expected = np.median(values) if len(values) else np.nan
        np.testing.assert_allclose(medians[gene], expected, rtol=1e-12)


def test_a_cell_depends_on_seed_and_number_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sample: pa.Table, world: msd.World, medians: np.ndarray
) -> None:
    monkeypatch.setattr(msd, "ROW_GROUP_CELLS", 32)
    path = tmp_path / "cells.parquet"
    msd.write_cells(path, world, medians, first_cell=450, cells=100)
    assert pq.ParquetFile(path).num_row_groups == 4
    assert pq.read_table(path).slice(0, 50).equals(sample.slice(450))
    other_world = msd.make_world(1)
    assert not np.array_equal(msd.simulate_counts(other_world, 0)[0], msd.simulate_counts(world, 0)[0])


def test_cell_types_are_one_more_column(
    tmp_path: Path, sample: pa.Table, world: msd.World, medians: np.ndarray
) -> None:
    path = tmp_path / "cells.parquet"
    msd.write_cells(path, world, medians, first_cell=480, cells=20, cell_types=True)
    table = pq.read_table(path)
    assert table.select(["input_ids", "length"]).equals(sample.slice(480))
    assert table["cell_type"].to_pylist() == [f"type {msd.simulate_counts(world, cell)[1]}" for cell in range(480, 500)]


def test_held_out_cells_are_others_of_the_same_world(tokens: list[np.ndarray], held_out: list[msd.TypedCell]) -> None:
    known = {tuple(ids.tolist()) for ids in tokens}
    assert not any(tuple(ids.tolist()) in known for ids, _ in held_out)
    unseen = ~np.isin(np.concatenate([ids for ids, _ in held_out]), np.concatenate(tokens))
    assert unseen.mean() < 0.002


def test_lengths_are_those_of_the_real_corpus(tokens: list[np.ndarray], held_out: list[msd.TypedCell]) -> None:
    length = np.array([len(ids) for ids in tokens] + [len(ids) for ids, _ in held_out])
    assert 520 < length.mean() < 590
    assert 0.46 < (length <= 255).mean() < 0.54
    assert 0.055 < (length == 2048).mean() < 0.085


def test_there_is_structure_beyond_gene_frequencies(
    tokens: list[np.ndarray], world: msd.World, medians: np.ndarray, held_out: list[msd.TypedCell]
) -> None:
    ids = np.concatenate([ids for ids, _ in held_out])
    frequency = np.unique(ids, return_counts=True)[1] / len(ids)
    unigram_entropy = -(frequency * np.log(frequency)).sum()
    assert 8.5 < unigram_entropy < 8.7
    sample = msd.describe("sample", list(msd.simulate_cells(world, medians, 0, msd.SAMPLE_CELLS)))
    assert np.array_equal(sample[0], np.concatenate(tokens))
    loss, types_right = msd.predictor_loss(sample, held_out[:200], msd.RandomStream(0, msd.MASK_STREAM))
    assert types_right > 0.98
    assert loss < unigram_entropy - 1.5


def test_entropies_against_known_ones() -> None:
    ids = np.tile(np.arange(64), 1_000)
    assert msd.entropy(ids) == pytest.approx(math.log(64), abs=1e-3)
    assert msd.grouped_entropy(ids, ids // 4) == pytest.approx(math.log(4), abs=1e-3)
    assert msd.grouped_entropy(ids, ids) == 0


def test_vocabulary_has_one_plainly_simulated_name_per_token() -> None:
    text = (FOLDER / "vocab.txt").read_text(encoding="utf-8")
    names = text.split("\n")
    assert names.pop() == ""
    assert names[:2] == ["<pad>", "<mask>"]
    assert len(names) == 25_426
    assert names[2:] == [f"sim_gene_{token:05d}" for token in range(2, 25_426)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--out", "x", "--cells", "0"], "--cells must be at least 1"),
        (["--out", "x", "--first-cell", "-1"], "--first-cell at least 0"),
        (["--out", "x", "--seed", "-1"], "--seed -1"),
    ],
)
def test_impossible_options_are_errors(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_sample_data.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        msd.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
