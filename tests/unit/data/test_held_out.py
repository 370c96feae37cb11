"""Cells that `data.validation_fraction` keeps from training, and the digest that ranks agree on."""

from pathlib import Path

import numpy as np
import pytest

from geneformer_pretrain.data import stream as streaming
from geneformer_pretrain.data.batch import build_batches
from geneformer_pretrain.data.dataset import DataSource, open_training_data, open_validation_data
from geneformer_pretrain.data.packing import held_out_cells
from geneformer_pretrain.errors import ConfigError
from tests.tiny import tiny_config


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


def test_without_a_fraction_nothing_changes(tmp_path: Path) -> None:
    training = open_training_data(tiny_config(tmp_path), False, False)
    assert training.chosen is None
    assert open_validation_data(training, False) is None
    assert training.fingerprint.validation_fraction is None
    assert cells_of_epochs(training, 1) == [list(range(60))]
    config = tiny_config(tmp_path, f"data.validation_path={tmp_path / 'cells.parquet'}", "training.seed=5")
    held_out = open_validation_data(open_training_data(config, False, False), False)
    assert held_out is not None
    assert (held_out.seed, held_out.chosen) == (5, None)


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
