"""Probes, clusters, baselines and masked-token loss against scikit-learn and stock transformers, and their limits."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits

from geneformer_pretrain.data.masking import MaskRule, mask_cell
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.inference import evaluate as ev
from geneformer_pretrain.inference.evaluate_cells import save_random_weights
from geneformer_pretrain.inference.masked_loss import load_with_head, masked_loss, unigram_loss
from tests.tiny import one_cpu_thread  # noqa: F401

V = 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With matrices this small, more threads would only wait for each other."""
    with threadpool_limits(1):
        yield


def blobs(cells: int, classes: int, distance: float, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(seed)
    codes = np.arange(cells) % classes
    centres = distance * generator.standard_normal((classes, 8))
    return centres[codes] + generator.standard_normal((cells, 8)), [f"type {code}" for code in codes]


def score(features: np.ndarray, labels: list[str], groups: list[str] | None = None) -> dict[str, Any]:
    classes = ev.select_classes(labels, groups)
    return ev.score_features(features[classes.kept], classes, ev.split_folds(classes, 0), 0)


def test_separate_classes_are_found_and_noise_is_not() -> None:
    scores = score(*blobs(300, 4, distance=10))
    for kind in ("logistic", "neighbours"):
        assert scores[kind]["macro_f1"] == scores[kind]["accuracy"] == 1
    assert scores["ari"] == scores["nmi"] == 1
    assert scores["silhouette"] > 0.7
    noise = score(*blobs(300, 4, distance=0))
    for kind in ("logistic", "neighbours"):
        assert 0.15 < noise[kind]["macro_f1"] < 0.35
    assert abs(noise["ari"]) < 0.05
    assert noise["silhouette"] < 0.05


def test_probe_equals_cross_val_predict() -> None:
    features, labels = blobs(200, 3, distance=0.7)
    classes = ev.select_classes(labels)
    scores = score(features, labels)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for kind, make in (("logistic", ev.logistic_regression), ("neighbours", ev.nearest_neighbours)):
        expected = cross_val_predict(make(), features, classes.codes, cv=folds)
        np.testing.assert_array_equal(scores[kind]["predicted"], expected)
        assert scores[kind]["macro_f1"] == pytest.approx(f1_score(classes.codes, expected, average="macro"))
        assert scores[kind]["accuracy"] == pytest.approx(np.mean(classes.codes == expected))
    assert 0.5 < scores["logistic"]["macro_f1"] < 1


def test_classes_are_sets_of_cells_that_can_be_learned() -> None:
    labels: list[Any] = ["a"] * 12 + ["b"] * 9 + ["c"] * 15 + [None] * 3 + ["", float("nan")]
    classes = ev.select_classes(labels)
    assert classes.names == ["a", "c"]
    assert classes.kept.tolist() == [*range(12), *range(21, 36)]
    assert classes.codes.tolist() == [0] * 12 + [1] * 15
    assert classes.left_out == {"no label": 5, "b (fewer than 10 cells)": 9}


def test_groups_are_held_out_whole() -> None:
    labels = ["a", "b"] * 60 + ["c"] * 20
    groups: list[Any] = [f"D{row // 20}" for row in range(120)] + ["D0"] * 20
    groups[5] = None
    classes = ev.select_classes(labels, groups, group="donor")
    assert classes.names == ["a", "b"]
    assert classes.left_out == {"no donor": 1, "c (one donor only)": 20}
    assert classes.groups is not None
    folds = ev.split_folds(classes, 0)
    assert len(folds) == 5
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(119))
    for train, test in folds:
        assert not set(classes.groups[train]) & set(classes.groups[test])
    assert ev.unseen_cells(classes, folds) == 0


def test_a_donor_effect_is_not_taken_for_a_class() -> None:
    """Each donor has cells of its own type mix; features that know the donor alone do well only if it is seen."""
    generator = np.random.default_rng(0)
    donor = np.repeat(np.arange(10), 40)
    label = np.where(generator.random(400) < np.where(donor % 2, 0.95, 0.05), "sick", "healthy").tolist()
    features = np.eye(10)[donor] + 0.01 * generator.standard_normal((400, 10))
    assert score(features, label)["logistic"]["macro_f1"] > 0.9
    assert score(features, label, [f"D{d}" for d in donor])["logistic"]["macro_f1"] < 0.7


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (["a"] * 20, None, r"--label kind: one class remains.*no cell was left out.*choose another column"),
        (["a"] * 20 + ["b"] * 9, None, r"one class remains.*left out: b \(fewer than 10 cells\): 9"),
        ([None] * 20, None, r"no class remains.*no label: 20"),
        (
            list(range(50)),
            None,
            r"no class remains.*left out: 0 \(fewer than 10 cells\): 1; 1 .*; 10 .*; and 47 more\)",
        ),
        (["a", "b"] * 20, ["D1"] * 40, r"--groups donor: all cells are of one group, so none can be held out"),
        (["a"] * 20 + ["b"] * 20, ["D1"] * 20 + ["D2"] * 20, r"a \(one donor only\): 20; b \(one donor only\): 20"),
    ],
)
def test_columns_that_cannot_be_used(labels: list[Any], groups: list[Any] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ev.select_classes(labels, groups, label="kind", group="donor")


def test_groups_that_leave_one_class_to_learn_from() -> None:
    classes = ev.Classes(np.arange(40), np.repeat([0, 1], 20), ["a", "b"], np.repeat([0, 1], 20), {})
    with pytest.raises(DataError, match="one class alone remains to learn from"):
        ev.split_folds(classes, 0)


def test_embeddings_that_are_not_finite_name_the_cell() -> None:
    features, labels = blobs(100, 2, distance=1)
    features[17, 3] = np.nan
    with pytest.raises(DataError, match="cell 17: its embedding is not finite"):
        score(features, labels)


def test_a_fit_that_stops_early_is_scored_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "MAX_ITERATIONS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(*blobs(100, 2, distance=1))


def test_majority() -> None:
    scores = ev.score_majority(ev.select_classes(["a"] * 30 + ["b"] * 10))
    assert scores == {"macro_f1": pytest.approx(2 * 0.75 / 1.75 / 2), "accuracy": 0.75}


def test_baselines_equal_dense_ones() -> None:
    generator = np.random.default_rng(0)
    counts = generator.poisson(0.7, (40, 90))
    counts[3] = 0
    totals = counts.sum(axis=1) * np.linspace(1, 2, 40)  # of a column
    normal = ev.log_normalised(sparse.csr_array(counts), totals).toarray()
    assert_allclose(normal, np.log1p(counts / np.maximum(totals, 1)[:, None] * 10_000), rtol=1e-12)
    components = ev.principal_components(sparse.csr_array(normal), 0)
    expected = PCA(39, svd_solver="full").fit_transform(normal)
    assert components.shape == (40, 39)
    assert_allclose(np.abs(components[:, :20]), np.abs(expected[:, :20]), rtol=1e-4, atol=1e-4)


def test_token_presence() -> None:
    matrix = ev.token_presence(np.array([5, 2, 3, 5], np.uint16), np.array([0, 2, 2, 4]), 6)
    assert matrix.toarray().tolist() == [[0, 0, 1, 0, 0, 1], [0] * 6, [0, 0, 0, 1, 0, 1]]


def make_model(folder: Path, head: bool = True) -> Path:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_act="relu",
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = transformers.BertForMaskedLM(config)
    (model if head else model.bert).save_pretrained(folder)
    return folder


def make_tokens(cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    lists = [2 + generator.permutation(V - 2)[: generator.integers(1, 40)] for _ in range(cells)]
    return np.concatenate(lists).astype(np.uint16), np.concatenate([[0], np.cumsum([len(cell) for cell in lists])])


@pytest.mark.parametrize("max_tokens", [1, 100, 8192])
def test_masked_loss_is_that_of_stock_transformers_cell_by_cell(tmp_path: Path, max_tokens: int) -> None:
    folder = make_model(tmp_path / "model")
    tokens, offsets = make_tokens(30)
    model = load_with_head(folder)
    assert model is not None
    loss = masked_loss(model, tokens, offsets, num_special_tokens=2, mask_token=1, seed=5, max_tokens=max_tokens)
    stock = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    total, number = 0.0, 0
    for cell in range(30):
        masked, labels = mask_cell(
            tokens[offsets[cell] : offsets[cell + 1]].astype(np.int64), cell, 0, MaskRule(5, 0.15, V, 2, 1)
        )
        with torch.no_grad():
            logits = stock(torch.from_numpy(masked)[None]).logits[0]
        selected = labels >= 0
        total += float(
            torch.nn.functional.cross_entropy(logits[selected], torch.from_numpy(labels[selected]), reduction="sum")
        )
        number += int(selected.sum())
    assert loss == pytest.approx(total / number, rel=1e-5)


def test_random_weights_are_new_and_know_nothing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    models = [load_with_head(save_random_weights(folder, tmp_path / f"{n}", seed)) for n, seed in enumerate((0, 0, 1))]
    words = [model.get_input_embeddings().weight for model in models if model is not None]
    assert torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])
    tokens, offsets = make_tokens(100)
    untrained = masked_loss(models[0], tokens, offsets, num_special_tokens=2, mask_token=1, seed=0)  # type: ignore[arg-type]
    assert abs(untrained - np.log(V)) < 1.0


def test_a_model_without_head_has_no_loss(tmp_path: Path) -> None:
    assert load_with_head(make_model(tmp_path / "model", head=False)) is None


def test_cells_too_few_to_mask(tmp_path: Path) -> None:
    model = load_with_head(make_model(tmp_path / "model"))
    assert model is not None
    with pytest.raises(DataError, match="no token was masked"):
        masked_loss(model, np.array([0, 1]), np.array([0, 2]), num_special_tokens=2, mask_token=1, seed=0)


def test_unigram_loss_is_the_entropy_of_the_genes() -> None:
    assert unigram_loss(np.array([0, 0, 2, 3, 4, 5]), 2) == pytest.approx(np.log(4))


def test_map_by_tsne_or_by_umap_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = blobs(30, 3, distance=5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    places, method = ev.flat_map(features, 0)
    assert (places.shape, method) == ((30, 2), "t-SNE")
    umap = SimpleNamespace(UMAP=lambda **_: SimpleNamespace(fit_transform=lambda x: x[:, :2]))
    monkeypatch.setitem(sys.modules, "umap", umap)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "umap")
    places, method = ev.flat_map(features, 0)
    assert method == "UMAP"
    np.testing.assert_array_equal(places, features[:, :2])
