"""Every format gives the same cells; files are found; columns of cells are read by rows."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization import matrices, transposed
from geneformer_pretrain.tokenization.counts import CountsFile, find_counts, open_counts
from tests.unit.tokenization.files import (
    CELLS,
    FORMATS,
    GENE_IDS,
    GENES,
    example_anndata,
    example_counts,
    write_h5ad,
    write_mtx,
)


def read_rows(counts: CountsFile, first: int, last: int) -> np.ndarray:
    """Read rows as a dense matrix, checking that the blocks follow each other."""
    parts, row = [], first
    for block in counts.blocks(first, last):
        assert block.first_row == row
        row += block.num_cells
        matrix = sp.csr_matrix((block.data, block.indices, block.indptr), shape=(block.num_cells, len(counts.gene_ids)))
        parts.append(matrix.toarray())
    assert row == last
    return np.concatenate(parts) if parts else np.empty((0, len(counts.gene_ids)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("small", [False, True], ids=["one block", "small blocks"])
def test_every_format_gives_the_same_cells(
    name: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(matrices, "BLOCK_VALUES", 50)
        monkeypatch.setattr(matrices, "MOST_BLOCK_VALUES", 50)
        monkeypatch.setattr(matrices, "BLOCK_ROWS", 16)
        monkeypatch.setattr(matrices, "DENSE_BYTES", 1000)
        monkeypatch.setattr(transposed, "BUCKET_VALUES", 60)
        monkeypatch.setattr(transposed, "CHUNK_VALUES", 37)
    write, options = FORMATS[name]
    expected = example_counts().toarray()
    with open_counts(write(tmp_path), **options) as counts:
        assert counts.num_cells == CELLS
        assert counts.gene_ids.tolist() == GENE_IDS
        np.testing.assert_array_equal(read_rows(counts, 0, CELLS), expected)
        np.testing.assert_array_equal(read_rows(counts, 13, 44), expected[13:44])
        assert read_rows(counts, 5, 5).shape == (0, GENES)
        assert counts.cell_ids(2, 4) == ["cell 2", "cell 3"]


@pytest.mark.parametrize("name", ["csr", "zarr v2 csr", "zarr v3 csr"])
def test_columns_of_cells(name: str, tmp_path: Path) -> None:
    with open_counts(FORMATS[name][0](tmp_path)) as counts:
        assert counts.obs_columns == ["cell_type", "donor", "age", "score", "good"]  # the order of the file
        table = counts.obs(["cell_type", "donor", "age", "good", "score"], 1, 4)
    assert table.to_pydict() == {
        "cell_type": ["B cell", None, "T cell"],
        "donor": ["donor 1", "donor 2", "donor 3"],
        "age": [1, 2, 3],
        "good": [True, True, True],
        "score": pytest.approx([1 / 69, 2 / 69, 3 / 69]),
    }
    assert table.schema.field("age").type == pa.int64()


def test_columns_of_odd_names(tmp_path: Path) -> None:
    """A column called as the index usually is, one with a slash, and two that differ in case alone."""
    path = write_h5ad(tmp_path / "a.h5ad")
    names = ["Donor", "_index", "deep/er/name"]
    with h5py.File(path, "a") as file:
        obs = file["obs"]
        obs.move("_index", "cell")
        for name in names:
            obs[name] = np.array([f"{name} {cell}" for cell in range(CELLS)], "S")
        obs.attrs["_index"], obs.attrs["column-order"] = "cell", [*obs.attrs["column-order"], *names]
    with open_counts(path) as counts:
        assert counts.cell_ids(0, 2) == ["cell 0", "cell 1"]
        assert set(counts.obs_columns) == {"age", "cell_type", "donor", "good", "score", *names}
        table = counts.obs([*names, "donor"], 1, 3).to_pydict()
    assert table == {name: [f"{name} 1", f"{name} 2"] for name in [*names, "donor"]}


def test_blank_lines_in_the_tables_of_a_10x_folder(tmp_path: Path) -> None:
    path = write_mtx(tmp_path, gz=False)
    for name in ("barcodes.tsv", "features.tsv"):
        (path / name).write_text((path / name).read_text() + "\n\n")
    with open_counts(path) as counts:
        assert counts.num_cells == CELLS
        assert counts.gene_ids.tolist() == GENE_IDS


def test_nullable_columns(tmp_path: Path) -> None:
    data = example_anndata(
        n=pd.array([None, *range(1, CELLS)], dtype="Int32"), b=pd.array([True, None] * 35, "boolean")
    )
    with open_counts(write_h5ad(tmp_path / "a.h5ad", data)) as counts:
        assert counts.obs(["n", "b"], 0, 2).to_pydict() == {"n": [None, 1], "b": [True, None]}


def _old_group(path: Path) -> Path:
    """h5ad as AnnData 0.7 wrote it: categories beside the codes, fixed-width and variable strings."""
    write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"], file["obs/donor"]
        file["obs/__categories/cell_type"] = np.array(["B cell", "T cell"], object)
        file["obs/cell_type"] = np.array([(1, 0, -1)[cell % 3] for cell in range(CELLS)], np.int8)
        file["obs/donor"] = np.array([f"donor {cell % 4}" for cell in range(CELLS)], "S")
        del file["X"].attrs["encoding-type"], file.attrs["encoding-type"]
        file["X"].attrs["encoding-type"] = "csr_matrix"
    return path


def _old_compound(path: Path) -> Path:
    """h5ad as AnnData 0.6 and before wrote it: tables as compound datasets, categories in uns, own sparse format."""
    counts = example_counts()
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", np.array(counts.shape)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        rows = [(f"cell {i}".encode(), (1, 0, -1)[i % 3], f"donor {i % 4}".encode()) for i in range(CELLS)]
        file["obs"] = np.array(rows, [("index", "S10"), ("cell_type", "i1"), ("donor", "S10")])
        file["uns/cell_type_categories"] = np.array([b"B cell", b"T cell"])
        genes = [(f"gene{i}".encode(), gene.encode()) for i, gene in enumerate(GENE_IDS)]
        file["var"] = np.array(genes, [("index", "S10"), ("ensembl_id", "S20")])
        file.copy(group, "raw.X")
        file.copy(file["var"], "raw.var")
    return path


@pytest.mark.parametrize(("write", "raw"), [(_old_group, False), (_old_compound, False), (_old_compound, True)])
def test_old_encodings(write: Any, raw: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "old.h5ad")
    with open_counts(path, raw=raw) as counts:
        np.testing.assert_array_equal(read_rows(counts, 0, CELLS), example_counts().toarray())
        assert counts.gene_ids.tolist() == GENE_IDS
        assert counts.cell_ids(0, 1) == ["cell 0"]
        table = counts.obs(["cell_type", "donor"], 0, 3).to_pydict()
    assert table == {"cell_type": ["T cell", "B cell", None], "donor": ["donor 0", "donor 1", "donor 2"]}


def test_names_of_genes_as_ids(tmp_path: Path) -> None:
    with open_counts(write_h5ad(tmp_path / "a.h5ad"), gene_id_column="index") as counts:
        assert counts.gene_ids[:2].tolist() == ["gene0", "gene1"]


@pytest.mark.parametrize("name", ["10x h5", "mtx"])
def test_features_that_are_no_genes_are_left_out(name: str, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path)
    if name == "mtx":
        lines = (path / "features.tsv").read_text().splitlines()
        lines[1] = lines[1].replace("Gene Expression", "Antibody Capture")
        (path / "features.tsv").write_text("\n".join(lines) + "\n")
    else:
        with h5py.File(path, "r+") as file:
            file["matrix/features/feature_type"][1] = b"Antibody"
    keep = [column for column in range(GENES) if column != 1]
    with open_counts(path) as counts:
        np.testing.assert_array_equal(read_rows(counts, 0, CELLS), example_counts().toarray()[:, keep])
        assert counts.gene_ids.tolist() == [GENE_IDS[column] for column in keep]
        assert "features that are no genes, left out: 1 (Antibody" in counts.notes[0]


def test_explicit_zeros_repeated_and_unsorted_columns_come_as_they_are(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(example_counts(cells=2)))
    with h5py.File(path, "r+") as file:
        del file["X/data"], file["X/indices"], file["X/indptr"]
        file["X/data"], file["X/indices"] = np.array([1, 0, 2, 3], "f4"), np.array([7, 5, 7, 1], "i4")
        file["X/indptr"] = np.array([0, 3, 4])
    with open_counts(path) as counts:
        (block,) = counts.blocks()
    assert (block.indices.tolist(), block.data.tolist()) == ([7, 5, 7, 1], [1, 0, 2, 3])


def test_a_row_wise_copy_is_made_once_and_kept_where_asked(tmp_path: Path) -> None:
    path, scratch = FORMATS["csc"][0](tmp_path), tmp_path / "scratch"
    with open_counts(path, scratch=scratch) as counts:
        list(counts.blocks())
    made = (scratch / "by_cell" / "layout.json").stat().st_mtime_ns
    with open_counts(path, scratch=scratch) as counts:
        np.testing.assert_array_equal(read_rows(counts, 0, CELLS), example_counts().toarray())
    assert (scratch / "by_cell" / "layout.json").stat().st_mtime_ns == made


def test_a_row_wise_copy_in_a_temporary_folder_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with open_counts(FORMATS["csc"][0](tmp_path)) as counts:
        list(counts.blocks())
        assert list((tmp_path / "temporary").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


def test_finding_files(tmp_path: Path) -> None:
    for name in ("b.h5ad", "a.h5ad", "deep/c.h5ad", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    run, store = write_mtx(tmp_path, gz=True), FORMATS["zarr v3 csr"][0](tmp_path)
    in_folder = [tmp_path / "a.h5ad", tmp_path / "b.h5ad", store, tmp_path / "deep" / "c.h5ad", run]
    assert find_counts([tmp_path]) == in_folder
    assert find_counts([tmp_path / "b.h5ad", str(tmp_path / "a*")]) == [tmp_path / "b.h5ad", tmp_path / "a.h5ad"]
    assert find_counts([run, store]) == [run, store]
    with pytest.raises(DataError, match="given twice"):
        find_counts([tmp_path / "a.h5ad", tmp_path / "deep" / ".." / "a.h5ad"])
    with pytest.raises(DataError, match="no such file"):
        find_counts([tmp_path / "z*.h5ad"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no counts in this folder"):
        find_counts([tmp_path / "empty"])
