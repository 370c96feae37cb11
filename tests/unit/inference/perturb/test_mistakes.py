"""Mistakes of users of `perturb`."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.perturb.conftest import ids, run, write_counts


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


@pytest.mark.parametrize(
    ("options", "named"),
    [({"states": "phase", "start": "G1", "goal": "S"}, "phase"), ({"replicates": "donor"}, "donor")],
)
def test_columns_of_counts_are_looked_for_before_they_are_tokenized(v1, tmp_path, monkeypatch, options, named):
    write_counts(v1, tmp_path / "counts.h5ad")
    of_counts = SimpleNamespace(model=v1.model, path=tmp_path / "counts.h5ad")
    monkeypatch.setattr("geneformer_pretrain.inference.corpus._tokenize", None)
    with pytest.raises(DataError, match=rf"counts\.h5ad: no column '{named}' \(--{next(iter(options))}\)"):
        run(of_counts, tmp_path, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"states": "tags", "start": "G1", "goal": "S"}, {"replicates": "tags"}])
def test_columns_of_lists(v1, tmp_path, options):
    table = pq.read_table(v1.path)
    pq.write_table(table.append_column("tags", pa.array([["G1"]] * len(table))), tmp_path / "tags.parquet")
    tagged = SimpleNamespace(model=v1.model, path=tmp_path / "tags.parquet")
    with pytest.raises(
        DataError, match=rf"'tags' \(--{next(iter(options))}\) holds list<.*> values; name a column of text"
    ):
        run(tagged, tmp_path, statistics=True, **options)


def test_too_few_replicates_for_p_values_are_said_to_be(v1, tmp_path, capsys):
    table = pq.read_table(v1.path)
    place = table.column_names.index("donor")
    donors = pa.array(["A", "B"] * (len(table) // 2))
    pq.write_table(table.set_column(place, "donor", donors), tmp_path / "two.parquet")
    two = SimpleNamespace(model=v1.model, path=tmp_path / "two.parquet")
    run(two, tmp_path, replicates="donor", statistics=True, genes=",".join(ids(v1, 0)))
    assert "--replicates donor: 2 replicates; p-values need 3 and stay empty." in capsys.readouterr().out


def test_one_replicate(v1, tmp_path):
    with pytest.raises(DataError, match="statistics need at least 2 replicates, p-values 3; choose another column"):
        run(v1, tmp_path, replicates="donor", statistics=True)


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


def test_finite_weights_that_overflow(v1, tmp_path):
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(v1.model)
    model.bert.encoder.layer[0].output.dense.weight.data[3, 4] = 3e38
    model.save_pretrained(tmp_path / "model")
    v1.genes.write(tmp_path / "model")
    spoiled = SimpleNamespace(model=tmp_path / "model", path=v1.path)
    with pytest.raises(DataError, match=r"cells\.parquet, row \d: its scores are not finite"):
        run(spoiled, tmp_path)
    assert not list((tmp_path / "out").glob("scores/part-*.parquet"))
