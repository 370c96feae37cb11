"""Mistakes of users of `embed`."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.embed.conftest import run
from tests.unit.inference.worlds import gene_set, make_cells, write_cells, write_model


def test_existing_output(v1, tmp_path):
    run(v1, tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        run(v1, tmp_path)
    run(v1, tmp_path, overwrite=True)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        run(v1, tmp_path, overwrite=True, output=tmp_path / "folder.parquet")


@pytest.mark.parametrize("options", [{"output": Path("/proc/out.h5ad")}, {"genes": Path("/proc/genes.parquet")}])
def test_places_that_cannot_be_written_to_are_refused_before_the_work(v1, tmp_path, monkeypatch, options):
    monkeypatch.setattr("geneformer_pretrain.inference.embed.load_model", None)
    with pytest.raises(OutputError, match=r"/proc/\w+\.\w+: /proc cannot be written to .*; name another place"):
        run(v1, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_selected_rows_are_refused_before_anything_is_computed(v1, tmp_path, monkeypatch):
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"input_ids": v1.cells}).save_to_disk(saved)
    table = pa.table({"indices": pa.array([4, 2, 7], pa.uint64())})
    with ipc.new_stream(saved / "indices.arrow", table.schema) as writer:
        writer.write_table(table)
    state = json.loads((saved / "state.json").read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(Runner, "run", None)
    with pytest.raises(DataError, match=r"saved: an index selects its rows; apply Dataset\.flatten_indices"):
        embed(EmbedOptions(v1.model, [str(saved)], tmp_path / "out.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "has 3 layers"),
        ({"layer": -5}, "has 3 layers"),
        ({"pooling": "cls"}, "no token <cls>"),
        ({"group_by": "cell_type"}, "add --genes"),
        ({"tokens": 0}, "must be above 0"),
        ({"genes": Path("genes.csv")}, r"name a \.parquet"),
        ({"genes": Path("out.parquet")}, "a file each"),
        ({"genes": Path("genes.parquet"), "group_by": "donor"}, "no column 'donor'"),
        ({"genes": Path("genes.parquet"), "group_by": "length"}, "no column 'length'"),
        ({"genes": Path("genes.parquet"), "group_by": "cells"}, "genes have a column of this name themselves"),
        ({"tokens": 2**31 // 96}, "--pack-tokens 22369621: choose at most 22,369,536"),
        ({"genes": Path("missing/genes.parquet")}, "there is no folder .*missing; make it"),
    ],
)
def test_options_that_cannot_work(v1, tmp_path, options, message):
    if "genes" in options:
        options["genes"] = tmp_path / options["genes"]
    with pytest.raises((ConfigError, DataError), match=message):
        run(v1, tmp_path, **options)


@pytest.mark.parametrize("values", [pa.array([[1]] * 24), pa.array([{"a": 1}] * 24), pa.array([b"\xff"] * 24)])
def test_groups_that_have_no_text(v1, tmp_path, values):
    path = write_cells(tmp_path / "cells.parquet", v1.cells, tags=values)
    options = {"genes": tmp_path / "genes.parquet", "group_by": "tags"}
    with pytest.raises(
        DataError, match=r"cells\.parquet: column 'tags' \(--group-by\) holds .*; name a column of text"
    ):
        embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet", **options))
    assert not (tmp_path / "genes.parquet").exists()


def test_model_without_genes(v1, tmp_path):
    write_model(tmp_path / "bare", with_genes=False)
    with pytest.raises(DataError, match="add --gene-set"):
        load_model(tmp_path / "bare")
    gene_set().save(tmp_path / "genes")
    assert load_model(tmp_path / "bare", gene_set=tmp_path / "genes").max_tokens == 48
    gene_set("v2").save(tmp_path / "others")
    with pytest.raises(DataError, match=r"82 tokens, the gene set 'toy' 84"):
        load_model(tmp_path / "bare", gene_set=tmp_path / "others")
    with pytest.raises(DataError, match="trained with another one"):
        load_model(v1.model, gene_set=tmp_path / "others")


def test_a_gene_set_holds_no_cells(v1, tmp_path):
    gene_set().save(tmp_path / "genes")
    with pytest.raises(
        DataError, match=r"genes: holds a gene set and no cells; name counts, or, to embed, .* a corpus"
    ):
        embed(EmbedOptions(v1.model, [str(tmp_path / "genes")], tmp_path / "out.parquet"))


def test_a_model_of_the_hub_is_downloaded_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"with `hf download ctheodoris/Geneformer --local-dir FOLDER` and name FOLDER"):
        load_model("ctheodoris/Geneformer")
    (tmp_path / "runs").mkdir()
    for path in ("runs/final_modle", "Geneformer", tmp_path / "a/b"):
        with pytest.raises(DataError, match=r"no config\.json; name a model"):
            load_model(path)


def spoil(folder, name, value):
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(folder)
    model.get_parameter(name).data[3, 4] = value
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense.weight", "cls.predictions.transform.dense.weight"])
def test_weights_that_are_not_finite(tmp_path, name):
    spoil(write_model(tmp_path / "model"), name, float("nan"))
    with pytest.raises(DataError, match=rf"{re.escape(name)} holds NaN"):
        load_model(tmp_path / "model")


def test_finite_weights_that_overflow(v1, tmp_path):
    model = write_model(tmp_path / "model")
    spoil(model, "bert.encoder.layer.0.output.dense.weight", 3e38)
    with pytest.raises(DataError, match=r"cells\.parquet, row \d+: its embedding is not finite"):
        embed(EmbedOptions(model, [str(v1.path)], tmp_path / "out.parquet"))
    assert not (tmp_path / "out.parquet").exists()


def test_what_is_no_model(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="'gpt2'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="no weights"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    gene_set().write(tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(tmp_path)


def test_corpus_of_another_gene_set(v1, tmp_path):
    facts = {"format_version": 1, "parts": [{"file": "part-0.parquet", "cells": 24}]}
    write_cells(tmp_path / "part-0.parquet", v1.cells)
    other = facts | {"gene_set": gene_set("v2", "other").describe()}
    (tmp_path / "corpus.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"gene set 'other', .* \(vocab_size 84 there, 82 here; "):
        embed(EmbedOptions(v1.model, [str(tmp_path)], tmp_path / "out.parquet"))
    (tmp_path / "corpus.json").write_text(json.dumps(facts | {"gene_set": gene_set().describe()}))
    embed(EmbedOptions(v1.model, [str(tmp_path)], tmp_path / "out.parquet"))


def test_cells_that_are_too_long(v1, tmp_path):
    path = write_cells(tmp_path / "cells.parquet", [*v1.cells[:3], list(range(2, 60))])
    with pytest.raises(DataError, match=r"cells\.parquet, row 3: 58 tokens"):
        embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet"))


def test_cells_are_not_overwritten(v1, tmp_path):
    path = write_cells(tmp_path / "cells.parquet", v1.cells)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="the cells themselves"):
        embed(EmbedOptions(v1.model, [str(path)], path, overwrite=True))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("kind", "cell"), [("v1", [1]), ("v2", [2, 3]), ("v2", [1])])
def test_cells_without_genes(v1, v2, tmp_path, kind, cell):
    world = v1 if kind == "v1" else v2
    path = write_cells(tmp_path / "cells.parquet", [*world.cells[:9], cell])
    with pytest.raises(DataError, match=r"cells\.parquet, row 9: has no genes; drop the row"):
        embed(EmbedOptions(world.model, [str(path)], tmp_path / "out.parquet"))


def test_cells_that_do_not_begin_with_cls(v2, tmp_path):
    path = write_cells(tmp_path / "cells.parquet", [*v2.cells[:9], v2.cells[9][1:]])
    with pytest.raises(DataError, match=r"cells\.parquet, row 9: the cell does not begin with <cls>"):
        embed(EmbedOptions(v2.model, [str(path)], tmp_path / "out.parquet", pooling="cls"))
    embed(EmbedOptions(v2.model, [str(path)], tmp_path / "out.parquet", overwrite=True))


@pytest.mark.parametrize(("token", "message"), [(0, "is padding"), (82, "outside of the model's 82")])
def test_tokens_that_are_no_genes(v1, tmp_path, token, message):
    import datasets

    cells = [*make_cells(10), [5, 6, token]]
    datasets.Dataset.from_dict({"input_ids": cells}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=rf"row 10: token {token} at position 2 .*{message}"):
        embed(EmbedOptions(v1.model, [str(tmp_path / "saved")], tmp_path / "out.parquet"))
