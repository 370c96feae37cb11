"""Probes and clusters: numbers for the worth of embeddings, beside baselines.

Probes are trained and tested on different cells: five folds, stratified by class, or whole donors held out. A
logistic regression asks whether a straight line through the embeddings separates the classes, k nearest neighbours
whether like cells lie together. Clusters are found without labels and compared with them afterwards.

Shapes: n cells, H features, V tokens.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geneformer_pretrain.errors import DataError

FOLDS = 5
MIN_CELLS = 10
"""Cells that a class needs; smaller ones are left out."""
NEIGHBOURS = 5
MAX_ITERATIONS = 2000
SILHOUETTE_CELLS = 5000
"""Cells of the silhouette, drawn at random if there are more; it compares all pairs."""
COMPONENTS = 50
TARGET_SUM = 10_000

IntArray = NDArray[np.int64]
Features = NDArray[np.floating[Any]]
Split = tuple[IntArray, IntArray]  # training rows, test rows


@dataclass(frozen=True)
class Classes:
    """Cells with a usable label.

    Attributes
    ----------
    kept
        Rows of these cells, int64 [n].
    codes
        Number of each cell's class, int64 [n].
    names
        Names of the classes, by number.
    groups
        Number of each cell's group, int64 [n], or None.
    left_out
        Cells left out, by class and reason.
    """

    kept: IntArray
    codes: IntArray
    names: list[str]
    groups: IntArray | None
    left_out: dict[str, int]


def select_classes(
    labels: Sequence[Any], groups: Sequence[Any] | None = None, *, label: str = "label", group: str = "groups"
) -> Classes:
    """Keep the cells whose class can be learned and tested.

    Left out and counted: cells without a label or group, classes of fewer than `MIN_CELLS` cells and, with groups,
    classes of a single group, which no other group could teach.

    Parameters
    ----------
    labels, groups
        Names of each cell's class and group, None where unknown.
    label, group
        Names of the two columns, for messages.

    Raises
    ------
    DataError
        Fewer than two classes or groups remain.
    """
    if groups is not None and len({name for name in groups if _is_name(name)}) < 2:
        raise DataError(
            f"--groups {group}: all cells are of one group, so none can be held out; choose another column or leave "
            "the option out."
        )
    left_out: dict[str, int] = {}
    usable = np.array([_is_name(name) for name in labels], bool)
    _count(left_out, "no label", int((~usable).sum()))
    if groups is not None:
        without = usable & np.array([not _is_name(name) for name in groups], bool)
        _count(left_out, f"no {group}", int(without.sum()))
        usable &= ~without
    text = np.array([str(name) for name in labels], object)
    for name in sorted(set(text[usable])):
        members = usable & (text == name)
        if members.sum() < MIN_CELLS:
            reason = f"{name} (fewer than {MIN_CELLS} cells)"
        elif groups is not None and len({groups[row] for row in np.flatnonzero(members).tolist()}) < 2:
            reason = f"{name} (one {group} only)"
        else:
            continue
        _count(left_out, reason, int(members.sum()))
        usable &= ~members
    kept = np.flatnonzero(usable)
    names, codes = np.unique(text[kept].astype(str), return_inverse=True)
    if len(names) < 2:
        reasons = [f"{reason}: {count:,}" for reason, count in left_out.items()]
        more = f"; and {len(reasons) - 3:,} more" if len(reasons) > 3 else ""
        why = "; ".join(reasons[:3]) + more if reasons else "no cell was left out"
        raise DataError(
            f"--label {label}: {'one class remains' if len(names) else 'no class remains'}, and a comparison needs two "
            f"(left out: {why}); choose another column."
        )
    group_codes = None
    if groups is not None:
        group_names = np.array([str(name) for name in groups])
        group_codes = np.unique(group_names[kept], return_inverse=True)[1].astype(np.int64)
    return Classes(kept, codes.astype(np.int64), names.tolist(), group_codes, left_out)


def _is_name(value: Any) -> bool:
    """False for null, NaN and the empty text."""
    return value is not None and value != "" and value == value


def _count(left_out: dict[str, int], reason: str, cells: int) -> None:
    if cells:
        left_out[reason] = cells


def split_folds(classes: Classes, seed: int) -> list[Split]:
    """Split the cells into folds, stratified by class; with groups, a group is in one fold only.

    Raises
    ------
    DataError
        The groups leave a fold with one class to learn from.
    """
    if classes.groups is None:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(classes.codes, classes.codes)
    else:
        number = min(FOLDS, int(classes.groups.max()) + 1)
        grouped = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        folds = grouped.split(classes.codes, classes.codes, classes.groups)
    splits = [(train, test) for train, test in folds if len(test)]
    if any(len(np.unique(classes.codes[train])) < 2 for train, _ in splits):
        raise DataError("--groups: with some groups held out, one class alone remains to learn from; leave it out.")
    return splits


def unseen_cells(classes: Classes, folds: Sequence[Split]) -> int:
    """Count the test cells whose class no training cell of their fold has; every representation misses them."""
    codes = classes.codes
    return int(sum((~np.isin(codes[test], codes[train])).sum() for train, test in folds))


def probe(features: Features, codes: IntArray, folds: Sequence[Split], make: Callable[[], Any]) -> dict[str, Any]:
    """Train a classifier on each fold's training cells and score it on its test cells.

    Parameters
    ----------
    features
        [n, H].
    codes
        Class of each cell, [n].
    make
        Makes a new classifier.

    Returns
    -------
    dict
        `macro_f1` and `accuracy` over all cells, each predicted once; `macro_f1_folds`; `predicted` [n].
    """
    predicted = np.full(len(codes), -1)
    by_fold = []
    for train, test in folds:
        predicted[test] = make().fit(features[train], codes[train]).predict(features[test])
        by_fold.append(_macro_f1(codes[test], predicted[test]))
    return {
        "macro_f1": _macro_f1(codes, predicted),
        "accuracy": float(accuracy_score(codes, predicted)),
        "macro_f1_folds": by_fold,
        "predicted": predicted,
    }


def _macro_f1(codes: IntArray, predicted: IntArray) -> float:
    """Mean over the classes present of their F1."""
    return float(f1_score(codes, predicted, labels=np.unique(codes), average="macro", zero_division=0))


def logistic_regression() -> Any:
    """Make a multinomial logistic regression on standardised features, with scikit-learn's default penalty."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))


def nearest_neighbours() -> Any:
    """Make a classifier by the majority of the nearest cells, by Euclidean distance."""
    return KNeighborsClassifier(NEIGHBOURS)


def score_features(features: Features, classes: Classes, folds: Sequence[Split], seed: int) -> dict[str, Any]:
    """Score a representation of cells by two probes, by its silhouette and by its clusters.

    Parameters
    ----------
    features
        [n, H], the cells of `classes` in their order.

    Returns
    -------
    dict
        `logistic` and `neighbours` as `probe` returns them; `silhouette` of the classes; `ari` and `nmi` of as many
        KMeans clusters as there are classes.

    Raises
    ------
    DataError
        Features that are not finite.
    """
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise DataError(
            f"cell {classes.kept[row]}: its embedding is not finite; look for weights of the model that are NaN."
        )
    with warnings.catch_warnings():
        # A fit that stops early is scored as it is, for every representation alike.
        warnings.simplefilter("ignore", ConvergenceWarning)
        logistic = probe(features, classes.codes, folds, logistic_regression)
    neighbours = probe(features, classes.codes, folds, nearest_neighbours)
    clusters = KMeans(len(classes.names), n_init=10, random_state=seed).fit_predict(features)
    sample_size = SILHOUETTE_CELLS if len(features) > SILHOUETTE_CELLS else None
    return {
        "logistic": logistic,
        "neighbours": neighbours,
        "silhouette": float(silhouette_score(features, classes.codes, sample_size=sample_size, random_state=seed)),
        "ari": float(adjusted_rand_score(classes.codes, clusters)),
        "nmi": float(normalized_mutual_info_score(classes.codes, clusters)),
    }


def score_majority(classes: Classes) -> dict[str, float]:
    """Score the answer that names the largest class for every cell."""
    answer = np.full(len(classes.codes), np.bincount(classes.codes).argmax())
    return {"macro_f1": _macro_f1(classes.codes, answer), "accuracy": float(accuracy_score(classes.codes, answer))}


def token_presence(tokens: NDArray[np.integer[Any]], offsets: IntArray, vocab_size: int) -> sparse.csr_array:
    """Make a matrix [n, V] that has 1 where a cell holds a token."""
    ones = np.ones(len(tokens), np.float32)
    return sparse.csr_array((ones, tokens.astype(np.int64), offsets), shape=(len(offsets) - 1, vocab_size))


def log_normalised(counts: sparse.csr_array, totals: NDArray[np.float64]) -> sparse.csr_array:
    """Return log(1 + count / total * 10,000), [n, genes]; cells without counts stay 0."""
    scale = TARGET_SUM / np.where(totals > 0, totals, 1)
    return sparse.csr_array(counts.astype(np.float64).multiply(scale[:, None])).log1p()


def principal_components(matrix: sparse.csr_array, seed: int) -> Features:
    """Project cells on the first `COMPONENTS` principal components of a sparse matrix, [n, COMPONENTS]."""
    number = min(COMPONENTS, min(matrix.shape) - 1)
    return np.asarray(PCA(number, svd_solver="arpack", random_state=seed).fit_transform(sparse.csr_matrix(matrix)))


def flat_map(features: Features, seed: int) -> tuple[Features, str]:
    """Lay cells out in the plane, [n, 2], by UMAP if umap-learn is installed, else by t-SNE; and name the method."""
    from importlib.util import find_spec

    if find_spec("umap"):
        from umap import UMAP

        return np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(features)), "UMAP"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(features), "t-SNE"
