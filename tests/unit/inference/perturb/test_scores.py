"""Scores of perturbations against stock transformers, copy by copy."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.inference.edits import Mode
from tests.unit.inference.perturb.conftest import ids, run
from tests.unit.inference.test_edits import edited
from tests.unit.inference.worlds import MAX_TOKENS, Stock, write_cells


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
def test_states(world, tmp_path, mode, monkeypatch, capsys):
    monkeypatch.setattr("geneformer_pretrain.console.PLAIN_INTERVAL", 0.0)
    members = {name: range(place, 10, 3) for place, name in enumerate(["ill", "well", "other"])}
    options = {"states": "state", "start": "ill", "goal": "well", "alternatives": ["other"]}
    rows, _ = run(world, tmp_path, mode=mode, genes=",".join(ids(world, 0, 6)), **options)
    assert "embed states: 10 of 10 cells" in capsys.readouterr().err
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
    files = sorted((tmp_path / "many" / "scores").glob("part-*.parquet"))
    cells = [set(pq.read_table(file)["cell"].to_pylist()) for file in files]
    assert len(cells) > 3
    assert any(one & other for one, other in pairwise(cells)), "no part begins within a cell"
    keys = [(row["cell"], row["perturbation"], row["rank"]) for row in whole]
    assert keys == [(row["cell"], row["perturbation"], row["rank"]) for row in many]
    for name in ("gene_similarity", "cell_similarity"):
        np.testing.assert_allclose([row[name] for row in whole], [row[name] for row in many], atol=1e-6)


def test_replicates_are_in_the_scores(world, tmp_path):
    rows, _ = run(world, tmp_path, genes=",".join(ids(world, 0)), replicates="donor")
    assert all(row["donor"] == f"donor {row['cell'] % 4}" for row in rows)


@pytest.mark.parametrize("missing", [float("nan"), "", None])
@pytest.mark.parametrize("as_category", [False, True])
def test_a_missing_donor_is_no_donor(v1, tmp_path, missing, as_category):
    """AnnData writes missing numbers as NaN, and some tools missing texts as empty ones."""
    names = [1.0, 2.0, 3.0, missing] if isinstance(missing, float) else ["A", "B", "C", missing]
    donors, states = (pa.array([values[n % 4] for n in range(10)]) for values in (names, names[::-1]))
    if as_category:
        donors, states = donors.dictionary_encode(), states.dictionary_encode()
    table = pq.read_table(v1.path).drop_columns(["donor", "state"])
    path = tmp_path / "cells.parquet"
    pq.write_table(table.append_column("donor", donors).append_column("state", states), path)
    some = SimpleNamespace(model=v1.model, path=path)
    rows, _ = run(
        some, tmp_path, replicates="donor", statistics=True, genes=",".join(ids(v1, 0, 1)), mode="overexpress"
    )
    assert {row["donor"] for row in rows if row["cell"] % 4 == 3} == {None}
    replicates = json.loads((tmp_path / "out" / "summary.json").read_text())["replicates"]
    assert len(replicates["names"]) == 3
    assert replicates["scores_without"] == 4
    with pytest.raises(DataError, match=r"there are ('1', '2', '3'|'A', 'B', 'C'|'3', '2', '1'|'C', 'B', 'A')\."):
        run(some, tmp_path, states="state", start="nan", goal="", output=tmp_path / "states")


def test_statistics_follow(v1, tmp_path):
    states = {"states": "state", "start": "ill", "goal": "well"}
    rows, _ = run(v1, tmp_path, statistics=True, **states)
    genes = pq.read_table(tmp_path / "out" / "genes.parquet")
    assert set(genes["perturbation"].to_pylist()) == {row["perturbation"] for row in rows}
    with pytest.raises(OutputError, match="complete"):
        run(v1, tmp_path, statistics=True, **states)


def test_estimate_comes_first(v1, tmp_path, capsys):
    rows, summary = run(v1, tmp_path, genes=",".join(ids(v1, 0, 1)))
    line = next(line for line in capsys.readouterr().out.splitlines() if "about 0 s at" in line)
    assert line.startswith(
        f"{summary.values['perturbations']:,} perturbations of {len({row['cell'] for row in rows})} "
    )
    assert f"{summary.values['tokens']:,} tokens" in line


def test_cells_with_nothing_to_perturb_are_not_counted_among_the_perturbed(v1, tmp_path, capsys):
    genes = ids(v1, 0, 1, 2, 3)
    rows, summary = run(v1, tmp_path, genes=",".join(genes), together=True)
    tokens = [v1.genes.tokens.index(gene) for gene in genes]
    number = sum(set(tokens) <= set(cell) for cell in v1.cells)
    assert len(rows) == number
    assert 0 < number < 10
    noun = "perturbation" if number == 1 else "perturbations"
    said = f"{number} {noun} of {number} of 10 cells (the others have nothing to perturb), "
    assert said in capsys.readouterr().out
    assert said in summary.lines[0]


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
