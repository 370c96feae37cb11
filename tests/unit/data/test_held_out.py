"""Cells that `data.validation_fraction` keeps from training, and the digest that ranks agree on."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data import held_out as held
from geneformer_pretrain.data import stream as streaming
from geneformer_pretrain.data.batch import PackedBatch, build_batches
from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.data.dataset import VALIDATION_SEED, DataSource, open_training_data, open_validation_data
from geneformer_pretrain.data.held_out import cell_groups, gene_frequencies, unigram_loss
from geneformer_pretrain.data.packing import first_held_out, held_out_cells
from geneformer_pretrain.errors import ConfigError, DataError
from tests.tiny import make_cells, tiny_config
from tests.unit.data.test_saved_folder import add_index


def open_both(folder: Path, *more: str) -> tuple[DataSource, DataSource]:
    training = open_training_data(tiny_config(folder, "data.validation_fraction=0.3", *more), False, False)
    held_out = open_validation_data(training, False)
    assert held_out is not None
    return training, held_out


def cells_of_epochs(source: DataSource, epochs: int) -> list[list[int]]:
    stream = source.stream()
    return [sorted(stream.plan(epoch).cells.tolist()) for epoch in range(epochs)]


def test_training_and_held_out_cells_are_the_corpus(tmp_path: Path) -> None:
    training, held_out = open_both(tmp_path)
    marks = held_out_cells(60, 0.3)
    for source, chosen in ((training, ~marks), (held_out, marks)):
        expected = np.flatnonzero(chosen).tolist()
        assert cells_of_epochs(source, 3) == [expected] * 3
        stream = source.stream()
        assert stream.num_cells == len(expected)
        assert stream.num_tokens == source.corpus.lengths[expected].sum()
    assert 5 < marks.sum() < 30


def test_the_fraction_is_kept_and_grows_by_further_cells() -> None:
    few, many = held_out_cells(200_000, 0.01), held_out_cells(200_000, 0.1)
    assert abs(few.sum() - 2_000) < 5 * 2_000**0.5
    assert abs(many.sum() - 20_000) < 5 * 20_000**0.5
    assert not (few & ~many).any()
    assert np.array_equal(held_out_cells(100_000, 0.1), many[:100_000])
    assert held_out_cells(30, 0.3).nonzero()[0].tolist() == [3, 5, 12, 16, 18, 21, 24, 25, 26, 28]


def test_validation_is_the_same_whatever_the_seed_of_the_run(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        training, held_out = open_both(tmp_path, f"training.seed={seed}")
        batches = list(build_batches(held_out.builder(), held_out.stream(), range(2)))
        found.append([part.tolist() for batch in batches for part in batch.parts])  # type: ignore[union-attr]
        found.append(cells_of_epochs(training, 1))
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_number_of_cells_is_the_same_whatever_was_held_out() -> None:
    """Whole corpora and fractions of them give the same cells, and a larger number further ones."""
    whole = np.ones(20_000, np.bool_)
    few, many = first_held_out(whole, 100), first_held_out(whole, 300)
    assert (few.sum(), many.sum()) == (100, 300)
    assert not (few & ~many).any()
    for fraction in (0.02, 0.5):
        held_out = held_out_cells(20_000, fraction)
        assert np.array_equal(first_held_out(held_out, 100), few)
        assert np.array_equal(first_held_out(held_out, 300), many)
    assert np.array_equal(first_held_out(held_out_cells(20_000, 0.001), 300), held_out_cells(20_000, 0.001))


def test_cells_and_masks_do_not_depend_on_the_shape_of_the_packs(tmp_path: Path) -> None:
    def masked(*more: str) -> dict[int, list[tuple[int, int]]]:
        """Masked tokens of each cell: (token that stands there, label)."""
        _, held_out = open_both(tmp_path, "data.validation_cells=9", *more)
        found = {}
        for batch in build_batches(held_out.builder(), held_out.stream(), range(held_out.stream().plan(0).num_packs)):
            for place, cell in enumerate(batch.cells.tolist()):
                if isinstance(batch, PackedBatch):
                    start, end = batch.parts.cu_seqlens[place : place + 2].tolist()
                    index, labels = (part[: batch.num_masked].tolist() for part in batch.parts[3:])
                    here = [(i, label) for i, label in zip(index, labels, strict=True) if start <= i < end]
                    found[cell] = [(int(batch.parts.input_ids[i]), label) for i, label in here]
                else:
                    (where,) = (batch.labels[place] != -100).nonzero(as_tuple=True)
                    tokens, labels = batch.input_ids[place][where].tolist(), batch.labels[place][where].tolist()
                    found[cell] = list(zip(tokens, labels, strict=True))
        return found

    expected = masked()
    assert len(expected) == 9
    assert sum(map(len, expected.values())) > 10
    for other in ("model.micro_batch_size=8", "data.packing=false", "training.seed=7", "data.max_cells_per_pack=2"):
        assert masked(other) == expected, other
    assert masked("data.validation_fraction=0.6") == expected


def grouped(folder: Path, values: list[str | None]) -> DataSource:
    """A corpus of 60 cells with a column of groups in two files, of which a third is held out."""
    cells = make_cells(60)
    (folder / "corpus").mkdir(exist_ok=True)
    for part, rows in enumerate((slice(0, 25), slice(25, 60))):
        columns = {"input_ids": pa.array(cells[rows], pa.list_(pa.int32())), "tissue": pa.array(values[rows])}
        pq.write_table(pa.table(columns), folder / f"corpus/{part}.parquet")
    return open_both(folder, f"data.path={folder / 'corpus'}")[1]


def test_groups_of_a_column(tmp_path: Path) -> None:
    values = [[None, "lung", "blood"][cell % 3] for cell in range(60)]
    held_out = grouped(tmp_path, values)
    assert held_out.chosen is not None
    names, groups = cell_groups(held_out.corpus, "tissue", held_out.chosen)
    assert names == ["blood", "lung", "missing"]
    for cell in range(60):
        expected = (values[cell] or "missing") if held_out.chosen[cell] else None
        assert (names[groups[cell]] if groups[cell] >= 0 else None) == expected


def test_columns_that_cannot_group_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = grouped(tmp_path, [str(cell) for cell in range(60)])
    everything = np.ones(60, np.bool_)
    with pytest.raises(DataError, match="no column 'organ', only input_ids, tissue; name one of these"):
        cell_groups(held_out.corpus, "organ", everything)
    monkeypatch.setattr(held, "MAX_GROUPS", 59)
    with pytest.raises(DataError, match="column 'tissue' has more than 59 values among the held-out cells"):
        cell_groups(held_out.corpus, "tissue", everything)


def test_columns_of_a_saved_folder(tmp_path: Path) -> None:
    """They are read in place, but not through an index of rows."""
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"input_ids": make_cells(20), "tissue": ["lung"] * 20}).save_to_disk(saved)
    everything = np.ones(20, np.bool_)
    assert cell_groups(open_corpus(saved, tmp_path / "cache"), "tissue", everything)[0] == ["lung"]
    selected = open_corpus(add_index(saved, list(range(20))), tmp_path / "cache")
    with pytest.raises(DataError, match=r"apply Dataset\.flatten_indices"):
        cell_groups(selected, "tissue", everything)


def test_the_unigram_loss_equals_that_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.naive_bayes import MultinomialNB

    training, _ = open_both(tmp_path)
    frequencies = gene_frequencies(training)
    assert training.chosen is not None
    counts = np.zeros((2, 99))
    for cell, tokens in enumerate(make_cells(60)):
        np.add.at(counts[0 if training.chosen[cell] else 1], np.array(tokens[:32]) - 2, 1)
    model = MultinomialNB(alpha=0.5).fit(counts, [0, 1])  # its smoothed frequencies are those of each class
    np.testing.assert_allclose(np.log(frequencies[2:]), model.feature_log_prob_[0], rtol=1e-12)
    assert frequencies[:2].tolist() == [0, 0]
    labels = np.concatenate([[0, 0], counts[1]]).astype(np.int64)
    expected = -(counts[1] * model.feature_log_prob_[0]).sum() / counts[1].sum()
    assert unigram_loss(labels, frequencies) == pytest.approx(expected, rel=1e-12)


def test_frequencies_of_a_sample_are_those_of_evenly_spaced_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = open_training_data(tiny_config(tmp_path, num_cells=400), False, False)
    whole = gene_frequencies(training)
    monkeypatch.setattr(held, "SAMPLE_TOKENS", 4_000)
    some = gene_frequencies(training)
    assert np.abs(some - whole).max() > 0
    assert np.abs(some[2:] / whole[2:] - 1).mean() < 0.2
    assert np.array_equal(some, gene_frequencies(training))


def test_without_a_fraction_nothing_changes(tmp_path: Path) -> None:
    training = open_training_data(tiny_config(tmp_path), False, False)
    assert training.chosen is None
    assert open_validation_data(training, False) is None
    assert training.fingerprint.validation_fraction is None
    assert cells_of_epochs(training, 1) == [list(range(60))]
    config = tiny_config(tmp_path, f"data.validation_path={tmp_path / 'cells.parquet'}", "training.seed=5")
    held_out = open_validation_data(open_training_data(config, False, False), False)
    assert held_out is not None
    assert (held_out.seed, held_out.chosen) == (VALIDATION_SEED, None)


def test_a_fraction_that_holds_out_nothing_is_refused(tmp_path: Path) -> None:
    for fraction, message in (("1e-9", "holds out no cell"), ("0.999999999", "holds out every cell")):
        config = tiny_config(tmp_path, f"data.validation_fraction={fraction}")
        with pytest.raises(ConfigError, match=message):
            open_training_data(config, False, False)
    for given in ("data.validation_fraction=1.0", "data.validation_fraction=0"):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            tiny_config(tmp_path, given)
    with pytest.raises(ConfigError, match="both set; choose one"):
        tiny_config(tmp_path, "data.validation_fraction=0.1", "data.validation_path=x.parquet")


def test_plan_files_are_of_the_chosen_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MIN_CELLS_FOR_PLAN_FILES", 0)
    training, held_out = open_both(tmp_path)
    whole = open_training_data(tiny_config(tmp_path), False, False)
    lengths = [len(cells_of_epochs(source, 1)[0]) for source in (whole, training, held_out)]
    assert lengths[0] == lengths[1] + lengths[2] == 60
    assert len(list((tmp_path / "cache/plans").iterdir())) == 3


def test_the_digest_covers_cells_and_masks(tmp_path: Path) -> None:
    def digest(*more: str, pack: int = 3) -> str:
        source = open_training_data(tiny_config(tmp_path, *more), False, False)
        return source.first_packs_digest(source.stream(), pack)

    assert digest() == digest()
    others = [
        digest(pack=4),
        digest("training.seed=1"),
        digest("data.num_special_tokens=9"),
        digest("data.packing=false"),
    ]
    assert len({digest(), *others}) == 5
