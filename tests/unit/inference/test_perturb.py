"""Scores of perturbations against stock transformers, copy by copy, and mistakes of users."""

from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.inference.edits import Mode
from geneformer_pretrain.inference.graphs import ForwardGraphs
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.packs import Shape
from geneformer_pretrain.inference.perturb import perturb
from geneformer_pretrain.inference.perturbations import PerturbOptions
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.test_edits import edited
from tests.unit.inference.worlds import MAX_TOKENS, Stock, make_world, write_cells


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("geneformer_pretrain.inference.perturb.MEASURED_SECONDS", 0.001)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["v1", "v2"])
def world(request, tmp_path_factory):
    states = [["ill", "well", "other"][number % 3] for number in range(10)]
    donors = [f"donor {number % 4}" for number in range(10)]
    return make_world(tmp_path_factory.mktemp(request.param), request.param, 10, state=states, donor=donors)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    states = [["ill", "well", "other"][number % 3] for number in range(10)]
    return make_world(tmp_path_factory.mktemp("one"), "v1", 10, state=states, donor=["A"] * 10)


def run(world, tmp_path, **options):
    output = options.pop("output", tmp_path / "out")
    options = {"mode": "delete", "statistics": False, "tokens": 512} | options
    summary = perturb(PerturbOptions(world.model, [str(world.path)], output, **options))
    return rows_of(output), summary


def rows_of(output):
    files = sorted((output / "scores").glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


class Reference:
    """Scores by one stock forward of the copy and one of the original."""

    def __init__(self, world, mode, fraction=0.0, states=()):
        self.stock = Stock(world.model)
        self.added = int("cls" in world.genes.special_tokens)
        self.cells = [cell[1:-1] if self.added else cell for cell in world.cells]
        self.mode, self.fraction = mode, fraction
        self.states = {
            name: np.mean([self.vectors(self.cells[i]).mean(0) for i in members], axis=0)
            for name, members in dict(states).items()
        }
        self.cls_states = {
            name: np.mean([self.all_vectors(self.cells[i])[0] for i in members], axis=0)
            for name, members in dict(states).items()
            if self.added
        }

    def all_vectors(self, genes):
        return self.stock([2, *genes, 3] if self.added else genes)

    def vectors(self, genes):
        found = self.all_vectors(genes)
        return found[1:-1] if self.added else found

    def scores(self, cell, perturbed):
        genes = self.cells[cell]
        copy, original = edited(self.mode, genes, perturbed, self.fraction, MAX_TOKENS - 2 * self.added)
        if not copy:
            return None
        after, before = self.vectors(copy), self.vectors(original)
        kept = [gene for gene in copy if gene not in perturbed and gene in original]
        a = np.array([after[copy.index(gene)] for gene in kept])
        b = np.array([before[original.index(gene)] for gene in kept])
        found = {
            "gene_similarity": np.mean([cosine(x, y) for x, y in zip(a, b, strict=True)]),
            "cell_similarity": cosine(a.mean(0), b.mean(0)),
        }
        if self.added:
            found["cls_similarity"] = cosine(self.all_vectors(copy)[0], self.all_vectors(original)[0])
        for name, state in self.states.items():
            found[f"shift_{name}"] = cosine(after.mean(0), state) - cosine(before.mean(0), state)
        for name, state in self.cls_states.items():
            after, before = self.all_vectors(copy)[0], self.all_vectors(original)[0]
            found[f"cls_shift_{name}"] = cosine(after, state) - cosine(before, state)
        return found


def check(world, rows, reference):
    assert rows
    for row in rows:
        perturbed = [world.genes.tokens.index(gene) for gene in row["perturbation"].split("+")]
        expected = reference.scores(row["cell"], perturbed)
        scores = {name: value for name, value in row.items() if "_similarity" in name or "shift_" in name}
        if expected is None:
            assert set(scores.values()) == {None}
            continue
        assert set(scores) == set(expected)
        for name, value in scores.items():
            assert value == pytest.approx(expected[name], abs=1e-5), (row, name)
        assert row["cell_id"] == f"cell-{row['cell']}"


def ids(world, *places):
    """Genes of the first cell, by their places."""
    cell = [token for token in world.cells[0] if token >= len(world.genes.special_tokens)]
    return [world.genes.tokens[cell[place]] for place in places]


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_each_gene(world, tmp_path, mode):
    rows, summary = run(world, tmp_path, mode=mode, max_cells=4, seed=1)
    check(world, rows[::7], Reference(world, Mode[mode]))
    chosen = {row["cell"] for row in rows}
    assert len(chosen) == 4
    sizes = [len(world.cells[cell]) - 2 * ("cls" in world.genes.special_tokens) for cell in chosen]
    assert len(rows) == sum(sizes) - (4 if mode == "overexpress" else 0)
    assert summary.values["perturbations"] == len(rows)
    assert [row["rank"] for row in rows if row["cell"] == min(chosen)][:2] == ([0, 1] if mode == "delete" else [1, 2])


@pytest.mark.parametrize("fraction", [0.25, -0.4, 1.0])
def test_shift(world, tmp_path, fraction):
    rows, _ = run(world, tmp_path, mode="shift", fraction=fraction, max_cells=2)
    check(world, rows[::5], Reference(world, Mode.shift, fraction))


@pytest.mark.parametrize("mode", ["delete", "overexpress", "shift"])
def test_genes_one_at_a_time(world, tmp_path, mode):
    genes = ids(world, 0, 3, -1)
    fraction = 0.3 if mode == "shift" else None
    rows, _ = run(world, tmp_path, mode=mode, genes=",".join(genes), fraction=fraction)
    check(world, rows, Reference(world, Mode[mode], fraction or 0.0))
    lacking = [row for row in rows if row["rank"] is None]
    assert bool(lacking) == (mode == "overexpress")


@pytest.mark.parametrize("mode", ["delete", "overexpress", "shift"])
def test_genes_together(world, tmp_path, mode):
    genes = ids(world, 4, 1, -1)
    fraction = -0.2 if mode == "shift" else None
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join(genes) + "\n")
    rows, _ = run(world, tmp_path, mode=mode, genes=str(listed), together=True, fraction=fraction)
    assert {row["perturbation"] for row in rows} == {"+".join(genes)}
    check(world, rows, Reference(world, Mode[mode], fraction or 0.0))


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_anchor(world, tmp_path, mode):
    (anchor,) = ids(world, 2)
    rows, _ = run(world, tmp_path, mode=mode, anchor=anchor, max_cells=6)
    assert all(row["perturbation"].startswith(f"{anchor}+") for row in rows)
    check(world, rows[::9], Reference(world, Mode[mode]))
    some, _ = run(world, tmp_path, mode=mode, anchor=anchor, genes=",".join(ids(world, 5)), output=tmp_path / "some")
    check(world, some, Reference(world, Mode[mode]))


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_states(world, tmp_path, mode):
    members = {name: range(place, 10, 3) for place, name in enumerate(["ill", "well", "other"])}
    options = {"states": "state", "start": "ill", "goal": "well", "alternatives": ["other"]}
    rows, _ = run(world, tmp_path, mode=mode, genes=",".join(ids(world, 0, 6)), **options)
    order = ["well", "ill", "other"]
    assert [name for name in rows[0] if name.startswith("shift_")] == [f"shift_{name}" for name in order]
    reference = Reference(world, Mode[mode], states={name: members[name] for name in order})
    check(world, rows, reference)
    assert {row["cell"] for row in rows} <= set(members["ill"])
    kept = pq.read_table(tmp_path / "out" / "states.parquet").to_pylist()
    for row in kept:
        assert row["cells"] == len(members[row["state"]])
        np.testing.assert_allclose(row["embedding"], reference.states[row["state"]], atol=1e-5)


def test_what_changes_nothing_scores_exactly_one(world, tmp_path):
    (top,) = ids(world, 0)
    options = {"states": "state", "start": "ill", "goal": "well"}
    rows, _ = run(world, tmp_path, mode="overexpress", genes=top, **options)
    row = next(row for row in rows if row["cell"] == 0)
    assert row["rank"] == 0
    similarities = {name: value for name, value in row.items() if name.endswith("_similarity")}
    assert set(similarities.values()) == {1.0}
    assert {value for name, value in row.items() if "shift_" in name} == {0.0}
    still, _ = run(world, tmp_path, mode="shift", fraction=0.0, output=tmp_path / "still", max_cells=3)
    assert {row["gene_similarity"] for row in still} == {1.0}


@pytest.mark.parametrize("limit", ["perturb.PART_TOKENS", "parts.CPU_PART_TOKENS"])
def test_parts_and_packs_change_nothing(v1, tmp_path, monkeypatch, limit):
    whole, _ = run(v1, tmp_path, tokens=4096)
    monkeypatch.setattr(f"geneformer_pretrain.inference.{limit}", 2000)
    many, _ = run(v1, tmp_path, tokens=64, output=tmp_path / "many")
    assert len(list((tmp_path / "many" / "scores").glob("part-*.parquet"))) > 3
    keys = [(row["cell"], row["perturbation"], row["rank"]) for row in whole]
    assert keys == [(row["cell"], row["perturbation"], row["rank"]) for row in many]
    for name in ("gene_similarity", "cell_similarity"):
        np.testing.assert_allclose([row[name] for row in whole], [row[name] for row in many], atol=1e-6)


def test_replicates_are_in_the_scores(world, tmp_path):
    rows, _ = run(world, tmp_path, genes=",".join(ids(world, 0)), replicates="donor")
    assert all(row["donor"] == f"donor {row['cell'] % 4}" for row in rows)


def test_statistics_follow(v1, tmp_path):
    states = {"states": "state", "start": "ill", "goal": "well"}
    rows, _ = run(v1, tmp_path, statistics=True, **states)
    genes = pq.read_table(tmp_path / "out" / "genes.parquet")
    assert set(genes["perturbation"].to_pylist()) == {row["perturbation"] for row in rows}
    with pytest.raises(OutputError, match="complete"):
        run(v1, tmp_path, statistics=True, **states)


def test_out_of_memory_halves_the_packs(v1, tmp_path, monkeypatch, capsys):
    expected, _ = run(v1, tmp_path, max_cells=3)
    plain = Runner.hidden

    def hidden(self, parts):
        if len(parts.input_ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)
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


def test_goes_on_where_it_stopped(v1, tmp_path, monkeypatch):
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
    rows, summary = run(v1, tmp_path, tokens=128)
    assert rows[: len(written)] == written
    assert summary.values["perturbations"] == len(rows) - len(written)
    assert len(rows) == sum(map(len, v1.cells))


def test_estimate_comes_first(v1, tmp_path, capsys):
    _, summary = run(v1, tmp_path, genes=",".join(ids(v1, 0, 1)))
    line = next(line for line in capsys.readouterr().out.splitlines() if "about 0 s at" in line)
    assert line.startswith(f"{summary.values['perturbations']:,} perturbations of 10 cells, ")
    assert f"{summary.values['tokens']:,} tokens" in line


def test_genes_that_some_cells_lack_all(v1, tmp_path, capsys):
    everywhere = {gene for cell in v1.cells for gene in cell}
    absent = [v1.genes.tokens[token] for token in range(2, 82) if token not in everywhere]
    if not absent:
        pytest.skip("every gene occurs")
    run(v1, tmp_path, genes=",".join([absent[0], *ids(v1, 0)]))
    assert f"No cell has {absent[0]}" in capsys.readouterr().err
    with pytest.raises(DataError, match="No cell has the genes to perturb"):
        run(v1, tmp_path, genes=absent[0], output=tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "shift"}, "go together"),
        ({"fraction": 0.2}, "go together"),
        ({"mode": "shift", "fraction": 1.5}, "from -1 to 1"),
        ({"together": True}, "needs a list"),
        ({"genes": "S1,S2", "together": True, "anchor": "S3"}, "leave out --together"),
        ({"genes": "S1", "anchor": "S1"}, "--genes S1: names none besides the anchor"),
        ({"states": "state", "start": "ill"}, "go together"),
        ({"alternatives": ["other"]}, "needs --states"),
        ({"states": "state", "start": "ill", "goal": "ill"}, "named twice"),
        ({"states": "state", "start": "ill", "goal": "dead"}, "no cell has the value 'dead'; there are 'ill', "),
        ({"states": "donor", "start": "A", "goal": "B"}, "all cells have the value 'A'"),
        ({"states": "nothing", "start": "A", "goal": "B"}, "no column 'nothing'"),
        ({"replicates": "nothing"}, r"no column 'nothing' \(--replicates\)"),
        ({"genes": "ENSG404"}, "has no gene ENSG404; correct the ids .`gene-set show MODEL --tsv FILE` lists them"),
        ({"genes": "S1,S1"}, "S1 is named twice"),
        ({"max_cells": 0}, "must be above 0"),
        ({"tokens": 0}, "must be above 0"),
        ({"seed": -1}, "must not be negative"),
        ({"replicates": "perturbation"}, "scores have a column of this name"),
        ({"replicates": "length"}, r"no column 'length' \(--replicates\); it has: cell_id, state, donor"),
        ({"states": "input_ids", "start": "A", "goal": "B"}, "no column 'input_ids'"),
        ({"mode": "overexpress", "genes": "S1,S2,S3,S4", "together": True, "max_tokens": 3}, "4 genes in front leave"),
        ({"mode": "overexpress", "genes": "S1,S2,S3", "together": True, "max_tokens": 3}, "of up to 3 tokens"),
        ({"mode": "overexpress", "genes": ",".join(f"S{n}" for n in range(50)), "together": True}, "50 genes in front"),
    ],
)
def test_options_that_cannot_work(v1, tmp_path, options, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run(v1, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": "ENSG404"}, "has no gene ENSG404"),
        ({"states": "state", "start": "ill", "goal": "dead"}, "no cell has the value 'dead'"),
        ({"replicates": "donor", "statistics": True}, r"--replicates donor: the column is 'A' in all of the 10 cells"),
        ({"replicates": "nothing"}, "no column 'nothing'"),
    ],
)
def test_a_mistake_leaves_nothing_behind(v1, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(Runner, "run", None)  # nothing is computed
    with pytest.raises((ConfigError, DataError), match=message):
        run(v1, tmp_path, **options)
    assert not (tmp_path / "out").exists()


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


def _counts(world, path):
    adata = anndata.AnnData(csr_matrix(np.arange(1.0, 321).reshape(4, 80).astype(np.float32)))
    adata.var["ensembl_id"] = world.genes.tokens[2:]
    adata.obs["state"] = ["ill", "well", "ill", "well"]
    adata.write_h5ad(path)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"states": "phase", "start": "G1", "goal": "S"}, "phase"), ({"replicates": "donor"}, "donor")],
)
def test_columns_of_counts_are_looked_for_before_they_are_tokenized(v1, tmp_path, monkeypatch, options, named):
    _counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", None)
    with pytest.raises(DataError, match=rf"counts\.h5ad: no column '{named}' \(--{next(iter(options))}\)"):
        run(of_counts, tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_too_few_replicates_for_p_values_are_said_to_be(v1, tmp_path, capsys):
    table = pq.read_table(v1.path)
    place = table.column_names.index("donor")
    donors = pa.array(["A", "B"] * (len(table) // 2))
    pq.write_table(table.set_column(place, "donor", donors), tmp_path / "two.parquet")
    two = SimpleNamespace(model=v1.model, path=tmp_path / "two.parquet")
    run(two, tmp_path, replicates="donor", statistics=True, genes=",".join(ids(v1, 0)))
    assert "--replicates donor: 2 replicates; p-values need 3 and stay empty." in capsys.readouterr().out


def test_a_corrected_command_goes_on_with_the_cells_of_a_mistaken_one(v1, tmp_path, monkeypatch):
    _counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    with pytest.raises(DataError, match="no cell has the value 'nope'"):
        run(of_counts, tmp_path, states="state", start="nope", goal="well")
    assert list((tmp_path / "out" / "work").glob("cells-*.parquet"))
    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", None)
    rows, _ = run(of_counts, tmp_path, states="state", start="ill", goal="well")
    assert {row["cell"] for row in rows} == {0, 2}


def test_killed_in_its_statistics_it_does_not_tokenize_again(v1, tmp_path, monkeypatch):
    _counts(v1, tmp_path / "counts.h5ad")
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
    _counts(v1, tmp_path / "counts.h5ad")
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


def test_cells_are_cut_before_they_are_perturbed(world, tmp_path):
    rows, _ = run(world, tmp_path, max_tokens=10)
    added = "cls" in world.genes.special_tokens
    short = [[*cell[:9], 3] if added and len(cell) > 10 else cell[:10] for cell in world.cells]
    reference = Reference(SimpleNamespace(model=world.model, genes=world.genes, cells=short), Mode.delete)
    check(world, rows[::7], reference)
    assert len(rows) == sum(len(cell) - 2 * added for cell in short)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_company_in_a_pack_changes_nothing(v1, tmp_path_factory, data):
    """Scores are the same whatever the size of packs and parts and whichever cells are perturbed in the same job."""
    mode = data.draw(st.sampled_from(["delete", "overexpress", "shift"]))
    options = {"mode": mode, "fraction": 0.3 if mode == "shift" else None}
    chosen = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))
    together, _ = run(v1, tmp_path_factory.mktemp("all"), tokens=4096, **options)
    some = tmp_path_factory.mktemp("some")
    world = SimpleNamespace(
        model=v1.model, path=write_cells(some / "cells.parquet", [v1.cells[cell] for cell in chosen])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geneformer_pretrain.inference.perturb.PART_TOKENS", data.draw(st.integers(500, 5000)))
        apart, _ = run(world, some, tokens=data.draw(st.integers(48, 700)), **options)
    expected = [row for row in together if row["cell"] in chosen]
    keys = [(chosen.index(row["cell"]), row["perturbation"], row["rank"]) for row in expected]
    assert keys == [(row["cell"], row["perturbation"], row["rank"]) for row in apart]
    for name in ("gene_similarity", "cell_similarity"):
        np.testing.assert_allclose([row[name] for row in expected], [row[name] for row in apart], atol=1e-6)


def test_overexpressed_together_genes_leave_room_for_one(world, tmp_path):
    """One gene fewer than cells have room for."""
    k = MAX_TOKENS - 2 * ("cls" in world.genes.special_tokens) - 1
    genes = ",".join(f"S{number}" for number in range(k))
    rows, _ = run(world, tmp_path, mode="overexpress", genes=genes, together=True)
    check(world, rows, Reference(world, Mode.overexpress))
    assert len(rows) == 10


def test_a_long_list_of_genes_is_no_file(v1, tmp_path):
    """Sixteen Ensembl ids are longer than the name of a file may be."""
    genes = v1.genes.tokens[2:]
    rows, _ = run(v1, tmp_path, genes=",".join(genes), max_cells=1)
    assert {row["perturbation"] for row in rows} <= set(genes)


def test_files_of_genes(v1, tmp_path):
    genes = ids(v1, 0, 3)
    listed = tmp_path / "genes é.txt"
    listed.write_bytes(b"\xef\xbb\xbf\r\n" + "\r\n\r\n  ".join(genes).encode() + b"\r\n\r\n")
    rows, _ = run(v1, tmp_path, genes=str(listed))
    assert {row["perturbation"] for row in rows} == set(genes)
    for content, message in ((b"\xff\xfe\x00", "not a text file"), (b"\n \n", "names no gene")):
        listed.write_bytes(content)
        with pytest.raises(DataError, match=message):
            run(v1, tmp_path, genes=str(listed), output=tmp_path / "none")
    with pytest.raises(DataError, match=r"or the name of the file"):
        run(v1, tmp_path, genes="nofile.txt", output=tmp_path / "none")


def test_output_that_is_a_file(v1, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="is a file"):
        run(v1, tmp_path)


def test_folder_of_something_else(v1, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="something else"):
        run(v1, tmp_path)
