"""Pictures of awkward names: letters that no font has, formulas that are none, underscores, control characters, length.

Warnings are errors in tests.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from PIL import Image

from geneformer_pretrain.data.inspection import Group
from geneformer_pretrain.data.pictures import draw_groups
from geneformer_pretrain.figures import label, save_figure
from geneformer_pretrain.inference.evaluate import Classes
from geneformer_pretrain.inference.evaluate_report import plot_confusion, plot_maps
from geneformer_pretrain.inference.statistics_plots import plot_ranked, plot_volcano
from geneformer_pretrain.run.curves import draw_curves

NAMES = ["心筋細胞", "T$_{reg}$ $", "_unknown", "a\tb\nc", "x" * 300, "𓀀🧬", "$\\frac{", " "]


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 100


def test_labels() -> None:
    assert [label(name) for name in NAMES[:4]] == ["心筋細胞", r"T\$_{reg}\$ \$", " _unknown", "a\tb\nc"]
    assert label(NAMES[4]) == "x" * 37 + "..."


def test_a_letter_that_the_font_lacks_would_warn(tmp_path: Path) -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "心")
    save_figure(figure, tmp_path / "a.png")
    with pytest.warns(UserWarning, match="Glyph .* missing from"):
        figure.savefig(tmp_path / "b.png")
    assert is_picture(tmp_path / "a.png")


def test_groups_of_a_corpus(tmp_path: Path) -> None:
    groups = [Group(name, 10 + place, 1000 + place) for place, name in enumerate(NAMES)]
    for place, column in enumerate(NAMES):
        draw_groups(tmp_path / f"{place}.png", column, groups, 15)
        assert is_picture(tmp_path / f"{place}.png")


def test_classes_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.arange(80) % len(NAMES)
    classes = Classes(np.arange(80), codes, NAMES, None, {})
    monkeypatch.setattr(
        "geneformer_pretrain.inference.evaluate_report.flat_map", lambda matrix, seed: (matrix[:, :2], "PCA")
    )
    shown: list[str] = []
    legend = Figure.legend

    def keep(figure: Figure, **options: object) -> object:
        drawn = legend(figure, **options)
        shown.extend(text.get_text() for text in drawn.get_texts())
        return drawn

    monkeypatch.setattr(Figure, "legend", keep)
    features = {"model": np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)}
    plot_maps(tmp_path / "map.png", features, classes, 0)
    assert shown == [label(name) for name in NAMES]
    plot_confusion(tmp_path / "confusion.png", classes, codes)
    assert is_picture(tmp_path / "map.png")
    assert is_picture(tmp_path / "confusion.png")


def test_perturbations_and_states(tmp_path: Path) -> None:
    for place, state in enumerate(NAMES):
        score = f"shift_{state}"
        values = np.linspace(-1, 1, len(NAMES))
        columns = {f"mean_{score}": values, f"effect_{score}": values, f"q_{score}": np.full(len(NAMES), 0.01)}
        table = pa.table({"perturbation": NAMES, "cells": np.arange(len(NAMES)), **columns})
        for plot in (plot_ranked, plot_volcano):
            plot(table, score, "q", tmp_path / f"{plot.__name__}{place}.png")
            assert is_picture(tmp_path / f"{plot.__name__}{place}.png")


@pytest.mark.parametrize("name", ["心筋$x", "$a_{ $b"])
def test_folder_of_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    records = [{"step": step, "loss": 9.0 - step, "learning_rate": 1e-3, "tokens_per_second": 10.0} for step in (1, 2)]
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(tmp_path / name / "metrics.jsonl", tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")
