"""Embeddings against stock transformers, their files, and mistakes of users."""

import datetime
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_matrix

from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.inference import merging
from geneformer_pretrain.inference import runner as runner_module
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.parts import Lock
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.worlds import Stock, gene_set, make_cells, make_world, write_cells, write_model


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    types = [f"type {number % 3}" for number in range(24)]
    return make_world(tmp_path_factory.mktemp("v1"), "v1", cell_type=types, score=list(range(24)))


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("v2"), "v2")


def run(world, tmp_path, **options):
    output = options.pop("output", tmp_path / "out.parquet")
    summary = embed(EmbedOptions(world.model, [str(world.path)], output, **options))
    return output, summary


def vectors(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist())


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_mean_over_genes_as_stock_cell_by_cell(v1, tmp_path, layer):
    output, summary = run(v1, tmp_path, layer=layer, tokens=128)
    stock = Stock(v1.model, layer)
    np.testing.assert_allclose(vectors(output), [stock(cell).mean(0) for cell in v1.cells], atol=1e-5)
    assert summary.values["cells"] == 24
    assert summary.values["tokens"] == sum(map(len, v1.cells))


def test_special_tokens_are_no_genes(v2, tmp_path):
    output, _ = run(v2, tmp_path)
    stock = Stock(v2.model)
    np.testing.assert_allclose(vectors(output), [stock(cell)[1:-1].mean(0) for cell in v2.cells], atol=1e-5)


def test_cls(v2, tmp_path):
    output, _ = run(v2, tmp_path, pooling="cls")
    stock = Stock(v2.model)
    np.testing.assert_allclose(vectors(output), [stock(cell)[0] for cell in v2.cells], atol=1e-5)


def test_company_in_a_pack_changes_nothing(v1, tmp_path):
    many, _ = run(v1, tmp_path, tokens=4096)
    few, _ = run(v1, tmp_path, tokens=48, output=tmp_path / "few.parquet")
    alone = []
    for number, cell in enumerate(v1.cells[:5]):
        path = write_cells(tmp_path / f"{number}.parquet", [cell])
        embed(EmbedOptions(v1.model, [str(path)], tmp_path / f"alone-{number}.parquet"))
        alone.append(vectors(tmp_path / f"alone-{number}.parquet")[0])
    np.testing.assert_allclose(vectors(many), vectors(few), atol=1e-6)
    np.testing.assert_allclose(vectors(many)[:5], alone, atol=1e-6)


def test_columns_in_the_order_of_the_cells(v1, tmp_path):
    output, _ = run(v1, tmp_path)
    table = pq.read_table(output)
    assert table.column_names == ["cell", "cell_id", "cell_type", "score", "embedding"]
    assert table["cell"].to_pylist() == table["score"].to_pylist() == list(range(24))
    assert table["cell_id"].to_pylist() == [f"cell-{number}" for number in range(24)]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert not (tmp_path / "out.parquet.parts").exists()


def test_h5ad(v1, tmp_path):
    output, _ = run(v1, tmp_path, output=tmp_path / "out.h5ad")
    expected, _ = run(v1, tmp_path)
    data = anndata.read_h5ad(output)
    np.testing.assert_array_equal(data.obsm["X_geneformer"], vectors(expected).astype(np.float32))
    assert list(data.obs_names[:2]) == ["cell-0", "cell-1"]
    assert list(data.obs["cell_type"][:2]) == ["type 0", "type 1"]


def test_h5ad_of_columns_that_it_does_not_know(v1, tmp_path):
    columns = {
        "plain": [True, False] * 12,
        "gaps": [True, None] * 12,
        "day": [datetime.date(2024, 5, 17), None] * 12,
        "pair": [[1, 2], None] * 12,
        "nothing": [None] * 24,
        "no_text": pa.nulls(24, pa.string()),
        "text": ["a", None] * 12,
    }
    path = write_cells(tmp_path / "cells.parquet", v1.cells, **columns)
    embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.h5ad"))
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert obs["plain"].tolist() == columns["plain"]
    for name, value in {"gaps": "True", "day": "2024-05-17", "pair": "[1, 2]", "text": "a"}.items():
        assert obs[name].dropna().tolist() == [value] * 12
    assert obs["nothing"].isna().all()
    assert obs["no_text"].isna().all()


@pytest.mark.parametrize("group_by", [None, "cell_type"])
@pytest.mark.parametrize("part_tokens", [150, 2**27])
def test_genes(v1, tmp_path, monkeypatch, group_by, part_tokens):
    monkeypatch.setattr("geneformer_pretrain.inference.embed.GENES_PART_TOKENS", part_tokens)
    run(v1, tmp_path, genes=tmp_path / "genes.parquet", group_by=group_by, tokens=128)
    stock = Stock(v1.model)
    expected: dict[tuple, list[np.ndarray]] = {}
    for number, cell in enumerate(v1.cells):
        group = (f"type {number % 3}",) if group_by else ()
        for token, vector in zip(cell, stock(cell), strict=True):
            expected.setdefault((*group, v1.genes.tokens[token]), []).append(vector)
    rows = pq.read_table(tmp_path / "genes.parquet").to_pylist()
    keys = [(*([row["cell_type"]] if group_by else []), row["gene_id"]) for row in rows]
    assert sorted(keys) == sorted(expected)
    for key, row in zip(keys, rows, strict=True):
        assert row["cells"] == len(expected[key])
        np.testing.assert_allclose(row["embedding"], np.mean(expected[key], axis=0), atol=1e-5)
        assert row["symbol"] == f"S{int(row['gene_id'][4:])}"


def test_genes_after_their_sums_ran_out_of_memory(v1, tmp_path, monkeypatch):
    """A pack whose sums are taken from the device is added once, even if the device has no memory for more."""
    run(v1, tmp_path, genes=tmp_path / "expected.parquet", tokens=128)
    plain, left = torch.Tensor.nonzero, [1]

    def nonzero(self, *args, **kwargs):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
    run(v1, tmp_path, output=tmp_path / "again.parquet", genes=tmp_path / "genes.parquet", tokens=128)
    assert pq.read_table(tmp_path / "genes.parquet").equals(pq.read_table(tmp_path / "expected.parquet"))


def test_counts_are_tokenized_on_the_way(v1, tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (9, 80)).astype(np.float32)
    counts[:, 0] = rng.integers(1, 4, 9)  # no cell is empty
    adata = anndata.AnnData(csr_matrix(counts))
    adata.var["ensembl_id"] = v1.genes.tokens[2:]
    adata.obs["tissue"] = pd.Categorical(["lung", "liver", "lung"] * 3)
    adata.write_h5ad(tmp_path / "counts.h5ad")
    embed(EmbedOptions(v1.model, [str(tmp_path / "counts.h5ad")], tmp_path / "out.parquet"))
    values = counts.astype(np.float64) / counts.sum(1, keepdims=True) * 10_000 / v1.genes.medians[2:]
    ranked = [2 + np.argsort(-row, kind="stable")[: min(48, (row > 0).sum())] for row in values]
    stock = Stock(v1.model)
    table = pq.read_table(tmp_path / "out.parquet")
    expected = [stock(cell.tolist()).mean(0) for cell in ranked]
    np.testing.assert_allclose(vectors(tmp_path / "out.parquet"), expected, atol=1e-5)
    assert table["tissue"].to_pylist() == ["lung", "liver", "lung"] * 3
    assert table["cell_id"].to_pylist() == list(adata.obs_names)
    with pytest.raises(DataError, match="name one corpus, or counts only"):
        embed(EmbedOptions(v1.model, [str(v1.path), str(tmp_path / "counts.h5ad")], tmp_path / "two.parquet"))
    options = {"genes": tmp_path / "genes.parquet", "group_by": "organ"}
    with pytest.raises(DataError, match=r"counts\.h5ad: no column 'organ' \(--group-by\); it has: .*tissue"):
        embed(EmbedOptions(v1.model, [str(tmp_path / "counts.h5ad")], tmp_path / "three.parquet", **options))


def test_cells_that_are_left_out_are_counted_by_reason(v1, tmp_path, capsys):
    """Cells without counts, without a known gene, with too few and not chosen; only with a reason that was there."""
    genes = v1.genes.tokens[2:]
    counts = np.tile(np.arange(1, 82, dtype=np.float32), (12, 1))
    counts[1] = 0
    counts[2:4, :-1] = 0
    counts[5, 3:] = 0
    adata = anndata.AnnData(csr_matrix(counts))
    adata.var["ensembl_id"] = [*genes, "ENSG99999999999"]
    adata.write_h5ad(tmp_path / "counts.h5ad")
    adata.obs["filter_pass"] = [1] * 8 + [0] * 4
    adata.write_h5ad(tmp_path / "filter.h5ad")

    def said(name, output, **options):
        given = CountsOptions(**options)
        embed(EmbedOptions(v1.model, [str(tmp_path / name)], tmp_path / output, counts=given))
        return capsys.readouterr().out

    assert "3 of 12 cells are left out: 1 without counts, 2 without a gene of the gene set.\n" in said(
        "counts.h5ad", "plain.parquet"
    )
    assert (
        "8 of 12 cells are left out: 4 not chosen by the filter column, 1 without counts, 2 without a gene of the gene "
        "set, 1 with fewer genes than --min-genes.\n" in said("filter.h5ad", "fewer.parquet", min_genes=4)
    )
    adata[4].copy().write_h5ad(tmp_path / "one.h5ad")
    assert "left out" not in said("one.h5ad", "one.parquet")
    adata[1:4].copy().write_h5ad(tmp_path / "none.h5ad")
    with pytest.raises(DataError, match=r"none\.h5ad: all 3 cells are left out \(1 without counts, 2 without a gene"):
        said("none.h5ad", "none.parquet", allow_low_match=True)
    adata[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(DataError, match=r"empty\.h5ad: no cells\."):
        said("empty.h5ad", "empty.parquet")


def test_saved_folder(v1, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"input_ids": v1.cells, "tissue": ["lung"] * 24}).save_to_disk(tmp_path / "saved")
    embed(EmbedOptions(v1.model, [str(tmp_path / "saved")], tmp_path / "saved.parquet"))
    expected, _ = run(v1, tmp_path)
    table = pq.read_table(tmp_path / "saved.parquet")
    np.testing.assert_array_equal(vectors(tmp_path / "saved.parquet"), vectors(expected))
    assert table["cell_id"].to_pylist() == list(map(str, range(24)))
    assert table["tissue"].to_pylist() == ["lung"] * 24


def test_bfloat16_is_near(v1, tmp_path):
    output, _ = run(v1, tmp_path, dtype="bfloat16")
    expected, _ = run(v1, tmp_path, output=tmp_path / "fp32.parquet")
    found, reference = vectors(output), vectors(expected)
    cosines = (found * reference).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(reference, axis=1)
    assert cosines.min() > 0.999
    assert np.abs(found - reference).max() > 1e-6


def test_out_of_memory_halves_the_packs(v1, tmp_path, monkeypatch, capsys):
    plain = Runner.hidden

    def hidden(self, parts):
        if len(parts.input_ids) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)
    output, summary = run(v1, tmp_path, tokens=1024)
    monkeypatch.undo()
    expected, _ = run(v1, tmp_path, output=tmp_path / "expected.parquet")
    np.testing.assert_allclose(vectors(output), vectors(expected), atol=1e-6)
    assert summary.values["pack_tokens"] == 256
    assert "Out of memory with packs of" in capsys.readouterr().err


def test_out_of_memory_with_the_smallest_packs(v1, tmp_path, monkeypatch):
    def hidden(self, parts):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Runner, "hidden", hidden)
    with pytest.raises(torch.OutOfMemoryError):
        run(v1, tmp_path)


@pytest.mark.parametrize("limit", ["embed.PART_TOKENS", "parts.CPU_PART_TOKENS"])
def test_goes_on_where_it_stopped(v1, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"geneformer_pretrain.inference.{limit}", 100)
    plain, done = Runner.hidden, []

    def hidden(self, parts):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(len(parts.input_ids))
        return plain(self, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        run(v1, tmp_path, tokens=64)
    assert list((tmp_path / "out.parquet.parts").glob("part-*.parquet"))
    with pytest.raises(OutputError, match=r"other settings \(layer was 2, is 3\)"):
        run(v1, tmp_path, layer=-1, tokens=64)
    monkeypatch.setattr(Runner, "hidden", plain)
    output, summary = run(v1, tmp_path, tokens=64)
    assert summary.values["tokens"] < sum(map(len, v1.cells))
    monkeypatch.undo()
    expected, _ = run(v1, tmp_path, output=tmp_path / "expected.parquet")
    np.testing.assert_allclose(vectors(output), vectors(expected), atol=1e-6)


def test_waiting_for_packs_is_reported(v1, tmp_path, monkeypatch):
    plain, built = Runner.pack_of, []

    def slow(self, *args, **kwargs):
        built.append(time.sleep(0.03))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "pack_of", slow)
    _, summary = run(v1, tmp_path, tokens=64)
    assert len(built) > 10
    assert summary.values["waited_for_packs_seconds"] > 0.02 * len(built)


def test_memory_is_bounded(v1, tmp_path, monkeypatch):
    """The builder is never more than a few packs ahead of the device."""
    built, ahead = [], []
    plain_start, plain_pack = Runner._start, Runner.pack_of

    def pack_of(self, *args, **kwargs):
        built.append(1)
        return plain_pack(self, *args, **kwargs)

    def start(self, pack):
        built.pop()
        ahead.append(len(built))
        return plain_start(self, pack)

    monkeypatch.setattr(Runner, "pack_of", pack_of)
    monkeypatch.setattr(Runner, "_start", start)
    run(v1, tmp_path, tokens=48)
    assert len(ahead) > 10
    assert max(ahead) <= runner_module.AHEAD + 3


def test_existing_output(v1, tmp_path):
    run(v1, tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        run(v1, tmp_path)
    run(v1, tmp_path, overwrite=True)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        run(v1, tmp_path, overwrite=True, output=tmp_path / "folder.parquet")


@pytest.mark.parametrize(
    ("length", "in_a_pack", "room"), [(2048, 4, 16), (400, 20, 32), (100, 81, 128), (10, 128, 128)]
)
def test_a_pack_has_no_more_room_for_cells_than_it_needs(v1, length, in_a_pack, room):
    runner = Runner(load_model(v1.model), -2, longest=2048, tokens=8192)
    packs = list(runner.plan(np.full(3 * in_a_pack, length)))
    assert [len(chosen) for chosen, _ in packs] == [in_a_pack] * 3
    assert {(shape.tokens, shape.max_cells) for _, shape in packs} == {(8192, room)}


def test_parts_of_tiny_cells_are_no_larger_files(v1, tmp_path, monkeypatch):
    """Cells of one gene count as the room that they take in a pack."""
    monkeypatch.setattr("geneformer_pretrain.inference.parts.CPU_PART_TOKENS", 64 * 10)
    path = write_cells(tmp_path / "tiny.parquet", [[5]] * 40)
    found, plain = [], merging.write_part
    monkeypatch.setattr(
        "geneformer_pretrain.inference.embed.write_part",
        lambda path, columns, vectors: (found.append(len(vectors)), plain(path, columns, vectors)),
    )
    embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet"))
    assert sum(found) == 40
    assert max(found) == 10


@pytest.mark.parametrize("name", ["out.parquet", "out.h5ad"])
def test_an_output_that_cannot_be_written_does_not_keep_the_genes_from_going_on(v1, tmp_path, monkeypatch, name):
    output, genes = tmp_path / name, tmp_path / "genes.parquet"
    plain = merging.replacing
    with monkeypatch.context() as patch:
        patch.setattr(merging, "replacing", lambda path: 1 / 0 if path == output else plain(path))
        with pytest.raises(ZeroDivisionError):
            run(v1, tmp_path, output=output, genes=genes)
    assert genes.exists()
    assert not output.exists()
    other = tmp_path / "other.parquet"
    other.write_text("mine")
    with pytest.raises(OutputError, match=r"other\.parquet: this output exists already"):
        run(v1, tmp_path, output=output, genes=other)
    run(v1, tmp_path, output=output, genes=genes)
    assert output.exists()
    assert other.read_text() == "mine"
    with pytest.raises(OutputError, match="exists already"):
        run(v1, tmp_path, output=tmp_path / "second.parquet", genes=genes)


def test_a_corpus_that_is_replaced_is_noticed(v1, tmp_path, monkeypatch):
    """Another file with the same rows, lengths and size ends a job that was stopped."""
    path = tmp_path / "cells.parquet"
    plain = Runner.hidden
    write_cells(path, v1.cells)
    monkeypatch.setattr(Runner, "hidden", lambda *_: 1 / 0)
    options = EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet")
    with pytest.raises(ZeroDivisionError):
        embed(options)
    monkeypatch.setattr(Runner, "hidden", plain)
    write_cells(path, [cell[::-1] for cell in v1.cells])
    with pytest.raises(OutputError, match=r"other settings \(cells was"):
        embed(options)


def test_partitioned_corpus(v1, tmp_path):
    for tissue, cells in (("liver", v1.cells[:3]), ("lung", v1.cells[3:5])):
        folder = tmp_path / "corpus" / f"tissue={tissue}"
        folder.mkdir(parents=True)
        write_cells(folder / "p.parquet", cells)
    embed(EmbedOptions(v1.model, [str(tmp_path / "corpus")], tmp_path / "out.parquet"))
    stock = Stock(v1.model)
    expected = [stock(cell).mean(0) for cell in v1.cells[:5]]
    np.testing.assert_allclose(vectors(tmp_path / "out.parquet"), expected, atol=1e-5)


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


def test_overwrite_leaves_a_job_at_work_alone(v1, tmp_path):
    work = tmp_path / "out.parquet.parts"
    with Lock(work):
        (work / "part-00000.parquet").write_text("theirs")
        with pytest.raises(OutputError, match="another process works on it"):
            run(v1, tmp_path, overwrite=True)
        assert (work / "part-00000.parquet").read_text() == "theirs"
    output, _ = run(v1, tmp_path, overwrite=True)
    assert len(vectors(output)) == 24
    assert not work.exists()


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


def test_weights_that_are_not_finite(tmp_path):
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(write_model(tmp_path / "model"))
    model.bert.encoder.layer[1].output.dense.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"encoder\.layer\.1\.output\.dense\.weight holds NaN"):
        load_model(tmp_path / "model")


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


def test_cells_longer_than_those_of_the_training(v1, v2, tmp_path, capsys):
    for world, added in ((v1, 0), (v2, 1)):
        model = tmp_path / f"model {added}"
        shutil.copytree(world.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"geneformer_max_tokens": 20}))
        short = [cell[:20] if len(cell) <= 20 or not added else [*cell[:19], cell[-1]] for cell in world.cells]
        stock = Stock(world.model)
        expected = [stock(cell)[added : len(cell) - added].mean(0) for cell in short]
        for name, options in (("default", {}), ("asked for", {"max_tokens": 20})):
            output = tmp_path / f"{name} {added}.parquet"
            embed(EmbedOptions(model if name == "default" else world.model, [str(world.path)], output, **options))
            np.testing.assert_allclose(vectors(output), expected, atol=1e-5)
            longer = sum(len(cell) > 20 for cell in world.cells)
            assert f"{longer} of 24 cells are cut to their first 20 tokens" in capsys.readouterr().out
        whole = tmp_path / f"whole {added}.parquet"
        embed(EmbedOptions(model, [str(world.path)], whole, max_tokens=48))
        expected = [stock(cell)[added : len(cell) - added].mean(0) for cell in world.cells]
        np.testing.assert_allclose(vectors(whole), expected, atol=1e-5)
        with pytest.raises(ConfigError, match="--max-tokens 49: choose from 3 to 48"):
            embed(EmbedOptions(model, [str(world.path)], tmp_path / "none.parquet", max_tokens=49))


def test_cells_are_not_overwritten(v1, tmp_path):
    path = write_cells(tmp_path / "cells.parquet", v1.cells)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="the cells themselves"):
        embed(EmbedOptions(v1.model, [str(path)], path, overwrite=True))
    assert path.read_bytes() == before


def test_ids_that_are_odd(v1, tmp_path):
    tokens = pa.array(v1.cells[:3], pa.list_(pa.uint16()))
    pq.write_table(pa.table({"input_ids": tokens, "cell_id": ["é 日本", "twice", "twice"]}), tmp_path / "cells.parquet")
    embed(EmbedOptions(v1.model, [str(tmp_path / "cells.parquet")], tmp_path / "out.h5ad"))
    with pytest.warns(UserWarning, match="not unique"):
        data = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(data.obs_names) == ["é 日本", "twice", "twice"]


def test_counts_that_changed_are_tokenized_again(v1, tmp_path, monkeypatch):
    """Cells that an earlier start tokenized are used for the same counts and options alone."""
    adata = anndata.AnnData(csr_matrix(np.arange(1.0, 161).reshape(2, 80).astype(np.float32)))
    adata.var["ensembl_id"] = v1.genes.tokens[2:]
    adata.write_h5ad(tmp_path / "counts.h5ad")
    plain = Runner.hidden
    monkeypatch.setattr(Runner, "hidden", lambda *_: 1 / 0)
    options = EmbedOptions(v1.model, [str(tmp_path / "counts.h5ad")], tmp_path / "out.parquet")
    with pytest.raises(ZeroDivisionError):
        embed(options)
    monkeypatch.setattr(Runner, "hidden", plain)
    adata[:, ::-1].copy().write_h5ad(tmp_path / "counts.h5ad")
    with pytest.raises(OutputError, match="other settings"):
        embed(replace(options, counts=CountsOptions(min_genes=1)))


def test_columns_that_only_some_files_have(v1, tmp_path):
    write_cells(tmp_path / "a.parquet", v1.cells[:3], tissue=["lung"] * 3, score=[1, 2, 3])
    write_cells(tmp_path / "b.parquet", v1.cells[3:5], score=[0.5, 1.5], donor=["x", "y"])
    embed(EmbedOptions(v1.model, [str(tmp_path)], tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["tissue"].to_pylist() == ["lung"] * 3 + [None] * 2
    assert table["donor"].to_pylist() == [None] * 3 + ["x", "y"]
    assert table["score"].to_pylist() == [1, 2, 3, 0.5, 1.5]


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
