"""Jobs of `perturb` that lack memory, are stopped and started again."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.inference.graphs import ForwardGraphs
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.packs import Shape
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.perturb.conftest import ids, rows_of, run, write_counts
from tests.unit.inference.worlds import MAX_TOKENS, lack_memory_above


def test_out_of_memory_halves_the_packs(v1, tmp_path, monkeypatch, capsys):
    expected, _ = run(v1, tmp_path, max_cells=3)
    lack_memory_above(60, monkeypatch)
    found, _ = run(v1, tmp_path, max_cells=3, output=tmp_path / "small", tokens=1024)
    np.testing.assert_allclose(
        [row["gene_similarity"] for row in found], [row["gene_similarity"] for row in expected], atol=1e-6
    )
    assert "going on with" in capsys.readouterr().err


def test_out_of_memory_with_the_smallest_packs_waits_for_those_in_flight(v1, tmp_path, monkeypatch):
    """There is room for two of them; a third that is started before the results of the first are there fails."""
    expected, _ = run(v1, tmp_path, max_cells=3)
    start, finish, in_flight, most = Runner._start, Runner._finish, [], []

    def start_within_room(self, pack):
        if len(in_flight) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        in_flight.append(pack)
        most.append(len(in_flight))
        return start(self, pack)

    def finish_one(self, running):
        in_flight.pop(0)
        return finish(self, running)

    monkeypatch.setattr(Runner, "_start", start_within_room)
    monkeypatch.setattr(Runner, "_finish", finish_one)
    found, _ = run(v1, tmp_path, max_cells=3, output=tmp_path / "small", tokens=1)
    assert max(most) == 2
    assert [row["perturbation"] for row in found] == [row["perturbation"] for row in expected]


def test_out_of_memory_for_what_is_recorded_of_larger_packs(v1, monkeypatch):
    """A small pack fails: recordings go first, the budget is halved once, and the smallest is tried without them."""
    lengths = np.array([len(cell) for cell in v1.cells])
    tokens, offsets = np.concatenate(v1.cells).astype(np.int32), np.concatenate([[0], lengths.cumsum()])
    start = Runner._start

    def start_within_room(self, pack):
        if self._graphs._recordings:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return start(self, pack)

    monkeypatch.setattr(Runner, "_start", start_within_room)
    for budget, left in ((4096, 2048), (128, 128)):
        runner = Runner(load_model(v1.model), -2, longest=MAX_TOKENS, tokens=budget)
        runner._graphs = ForwardGraphs(runner.hidden)
        runner._graphs._recordings[Shape(budget, 1, MAX_TOKENS)] = None
        shape = Shape.of(128, MAX_TOKENS)
        pack = runner.pack_of(np.arange(1), shape, tokens, offsets, lambda _, hidden, parts: hidden[:1], None)
        assert len(list(runner.run([pack]))) == 1
        assert runner.tokens == left
    runner._graphs._recordings[shape] = None  # its own, which was there when its head failed
    with pytest.raises(torch.OutOfMemoryError):
        list(runner.run([pack]))


def test_goes_on_where_it_stopped(v1, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("geneformer_pretrain.inference.perturb.PART_TOKENS", 2000)
    plain, done = Runner.hidden, []

    def hidden(self, parts):
        if len(done) == 60:
            raise KeyboardInterrupt
        done.append(1)
        return plain(self, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        run(v1, tmp_path, tokens=128)
    written = rows_of(tmp_path / "out")
    assert written
    monkeypatch.setattr(Runner, "hidden", plain)
    with pytest.raises(OutputError, match=r"other settings \(.*genes"):
        run(v1, tmp_path, tokens=128, genes=",".join(ids(v1, 0)))
    with pytest.raises(OutputError, match=r"other settings \(layers computed was 2, is 3\)"):
        run(v1, tmp_path, tokens=128, layer=-1)
    capsys.readouterr()
    rows, summary = run(v1, tmp_path, tokens=128)
    assert re.search(r"Going on: \d of \d+ parts are there\.", capsys.readouterr().out)
    assert rows[: len(written)] == written
    assert summary.values["perturbations"] == len(rows) - len(written)
    assert len(rows) == sum(map(len, v1.cells))


def test_overwrite_deletes_results_alone_and_only_when_new_ones_can_be_made(v1, tmp_path):
    run(v1, tmp_path, max_cells=2)
    mine = [tmp_path / "out" / name for name in ("notes.txt", "my.parquet", "my.json", "figure.png", "figures/1.png")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = rows_of(tmp_path / "out")
    with pytest.raises(DataError, match="has no gene"):
        run(v1, tmp_path, genes="ENSG404", overwrite=True)
    assert rows_of(tmp_path / "out") == before
    rows, _ = run(v1, tmp_path, max_cells=1, overwrite=True)
    assert len({row["cell"] for row in rows}) == 1
    assert all(path.read_text() == "mine" for path in mine)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="something else"):
        run(v1, tmp_path, output=tmp_path / "thesis", overwrite=True)


def test_a_corrected_command_goes_on_with_the_cells_of_a_mistaken_one(v1, tmp_path, monkeypatch):
    write_counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    with pytest.raises(DataError, match="no cell has the value 'nope'"):
        run(of_counts, tmp_path, states="state", start="nope", goal="well")
    assert list((tmp_path / "out" / "work").glob("cells-*.parquet"))
    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", None)
    rows, _ = run(of_counts, tmp_path, states="state", start="ill", goal="well")
    assert {row["cell"] for row in rows} == {0, 2}


def test_killed_in_its_statistics_it_does_not_tokenize_again(v1, tmp_path, monkeypatch):
    write_counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    with monkeypatch.context() as patch:
        patch.setattr("geneformer_pretrain.inference.statistics.plot_volcano", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(of_counts, tmp_path, statistics=True)
    assert not (tmp_path / "out" / "summary.json").exists()
    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", None)
    _, summary = run(of_counts, tmp_path, statistics=True)
    assert summary.values["perturbations"] == 0
    assert (tmp_path / "out" / "volcano.png").exists()
    assert not (tmp_path / "out" / "work").exists()


def test_scores_are_completed_by_statistics_later(v1, tmp_path):
    """Cells that counts are tokenized into a second time are the same ones."""
    write_counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    run(of_counts, tmp_path)
    _, summary = run(of_counts, tmp_path, statistics=True)
    assert summary.values["perturbations"] == 0
    assert (tmp_path / "out" / "summary.json").exists()


def test_killed_while_it_deletes(v1, tmp_path, monkeypatch):
    run(v1, tmp_path, max_cells=2)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    unlink = Path.unlink

    def killed(path, *args, **kwargs):
        if path.name == "_job.json":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            run(v1, tmp_path, max_cells=1, overwrite=True)
    assert not rows_of(tmp_path / "out")
    with pytest.raises(OutputError, match="max cells was 2, is 1"):
        run(v1, tmp_path, max_cells=1)
    rows, _ = run(v1, tmp_path, max_cells=1, overwrite=True)
    assert len({row["cell"] for row in rows}) == 1
