"""Embeddings against stock transformers, and their files."""

import datetime
import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix

from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from tests.unit.inference.embed.conftest import run, vectors
from tests.unit.inference.worlds import Stock, write_cells


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


def test_h5ad_of_names_that_it_does_not_take(v1, tmp_path):
    """Those with a slash, an empty one and that of its own index; names that differ in case alone are two."""
    names = {"_index": "index_", "index": "index", "": "unnamed", "a/b": "a_b_", "a_b": "a_b", "A_b": "A_b"}
    path = write_cells(tmp_path / "cells.parquet", v1.cells, **{name: [name] * 24 for name in names})
    embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.h5ad"))
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert list(obs.columns) == ["cell", *names.values()]
    assert [obs[written].unique().tolist() for written in names.values()] == [[name] for name in names]


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


def test_counts_are_tokenized_on_the_way(v1, tmp_path, capsys):
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
    assert "share an id" not in capsys.readouterr().err
    adata[:4].write_h5ad(tmp_path / "more.h5ad")
    both = [str(tmp_path / "counts.h5ad"), str(tmp_path / "more.h5ad")]
    embed(EmbedOptions(v1.model, both, tmp_path / "both.parquet"))
    name = adata.obs_names[0]
    assert f"WARNING 8 cells share an id with another one, such as '{name}': make ids" in capsys.readouterr().err
    options = {"genes": tmp_path / "genes.parquet", "group_by": "organ"}
    with pytest.raises(DataError, match=r"counts\.h5ad: no column 'organ' \(--group-by\); it has: .*tissue"):
        embed(EmbedOptions(v1.model, [str(tmp_path / "counts.h5ad")], tmp_path / "three.parquet", **options))


def test_files_of_counts_whose_columns_stand_in_another_order(v1, tmp_path):
    adata = anndata.AnnData(csr_matrix(np.arange(1.0, 321).reshape(4, 80).astype(np.float32)))
    adata.var["ensembl_id"] = v1.genes.tokens[2:]
    adata.obs["tissue"], adata.obs["age"] = ["heart", "liver"] * 2, [20, 30, 40, 50]
    adata.write_h5ad(tmp_path / "one.h5ad")
    adata.obs = adata.obs[["age", "tissue"]]
    adata.write_h5ad(tmp_path / "two.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("one", "two")]
    embed(EmbedOptions(v1.model, files, tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["cell", "cell_id", "tissue", "age", "embedding"]
    assert table["age"].to_pylist() == [20, 30, 40, 50] * 2


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
    with pytest.raises(DataError, match=r"none\.h5ad: no cell is left of 3 \(1 without counts, 2 without a gene"):
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


def test_partitioned_corpus(v1, tmp_path):
    for tissue, cells in (("liver", v1.cells[:3]), ("lung", v1.cells[3:5])):
        folder = tmp_path / "corpus" / f"tissue={tissue}"
        folder.mkdir(parents=True)
        write_cells(folder / "p.parquet", cells)
    embed(EmbedOptions(v1.model, [str(tmp_path / "corpus")], tmp_path / "out.parquet"))
    stock = Stock(v1.model)
    expected = [stock(cell).mean(0) for cell in v1.cells[:5]]
    np.testing.assert_allclose(vectors(tmp_path / "out.parquet"), expected, atol=1e-5)


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
            assert f"{longer} of 24 cells are cut to the first 20 tokens" in capsys.readouterr().out
        whole = tmp_path / f"whole {added}.parquet"
        embed(EmbedOptions(model, [str(world.path)], whole, max_tokens=48))
        expected = [stock(cell)[added : len(cell) - added].mean(0) for cell in world.cells]
        np.testing.assert_allclose(vectors(whole), expected, atol=1e-5)
        with pytest.raises(ConfigError, match="--max-tokens 49: choose from 3 to 48"):
            embed(EmbedOptions(model, [str(world.path)], tmp_path / "none.parquet", max_tokens=49))


def test_ids_that_are_odd(v1, tmp_path):
    tokens = pa.array(v1.cells[:3], pa.list_(pa.uint16()))
    pq.write_table(pa.table({"input_ids": tokens, "cell_id": ["é 日本", "twice", "twice"]}), tmp_path / "cells.parquet")
    embed(EmbedOptions(v1.model, [str(tmp_path / "cells.parquet")], tmp_path / "out.h5ad"))
    with pytest.warns(UserWarning, match="not unique"):
        data = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(data.obs_names) == ["é 日本", "twice", "twice"]


def test_columns_that_only_some_files_have(v1, tmp_path):
    write_cells(tmp_path / "a.parquet", v1.cells[:3], tissue=["lung"] * 3, score=[1, 2, 3])
    write_cells(tmp_path / "b.parquet", v1.cells[3:5], score=[0.5, 1.5], donor=["x", "y"])
    embed(EmbedOptions(v1.model, [str(tmp_path)], tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["tissue"].to_pylist() == ["lung"] * 3 + [None] * 2
    assert table["donor"].to_pylist() == [None] * 3 + ["x", "y"]
    assert table["score"].to_pylist() == [1, 2, 3, 0.5, 1.5]
