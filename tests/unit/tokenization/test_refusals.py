"""Counts that cannot be used are refused in one line with file, row, gene and remedy."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.tokenization.counts import open_counts
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


def refused(path: Path, **options: Any) -> str:
    """Read a file and return the error; it is one line and names the file."""
    with pytest.raises(DataError) as error, open_counts(path, **options) as counts:
        for _ in counts.blocks():
            pass
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (-2, "-2 is negative"),
        (-0.5, "-0.5 is negative (a scaled matrix?)"),
        (np.nan, "nan is not finite"),
        (np.inf, "inf is not finite"),
        (1.5, "1.5 is not a whole number"),
        (3.001, "3.001 is not a whole number"),
    ],
)
def test_values_that_are_no_counts(value: float, fault: str, dense: bool, tmp_path: Path) -> None:
    counts = example_counts().toarray()
    counts[9] = np.arange(GENES) + 2
    counts[9, 4] = value
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(counts if dense else sp.csr_matrix(counts)))
    text = refused(path)
    assert f"row 9 (cell cell 9), gene {GENE_IDS[4]}: {fault}, not a count. Give a file with the raw counts" in text
    whole = value > 0 and np.isfinite(value)
    assert ("--allow-noninteger" in text) == whole
    if whole:
        with open_counts(path, allow_noninteger=True) as opened:
            assert sum(block.num_cells for block in opened.blocks()) == CELLS
    else:
        refused(path, allow_noninteger=True)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (np.ones((CELLS, 2)), "cannot be read (only handle 1-dimensional arrays)"),
        (np.ones(CELLS - 1), "has fewer rows than there are cells"),
        (np.array([b"\xff"] * CELLS), "cannot be read (Invalid UTF8 payload)"),
        (np.ones(CELLS, complex), "cannot be read (Unsupported numpy type"),
        (np.zeros(CELLS, [("a", "i4")]), "cannot be read (Unsupported numpy type"),
        (3, "cannot be read (Illegal slicing argument"),
        (h5py.Empty("f4"), "cannot be read (Empty datasets"),
        ("codes", "cannot be read (Index 5 out of bounds)"),
    ],
)
def test_columns_of_the_cells_that_are_none(values: Any, fault: str, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        if isinstance(values, str):
            group = file["obs"].create_group("odd")
            group["codes"], group["categories"] = np.full(CELLS, 5, np.int8), np.array([b"a", b"b"])
        else:
            file["obs"]["odd"] = values
    with open_counts(path) as counts, pytest.raises(DataError) as error:
        counts.obs(["odd"], 0, CELLS)
    assert str(error.value).startswith(f"{path}: the column 'odd' of the cells {fault}")
    assert "\n" not in str(error.value)


def test_a_column_without_a_name(tmp_path: Path) -> None:
    """Anndata itself replaces all of obs by such a column."""
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(**{"": np.arange(CELLS)}))
    assert "obs is no table, as anndata leaves it when a column has no name" in refused(path)


def test_negative_integers(tmp_path: Path) -> None:
    counts = example_counts("int16")
    counts.data[7] = -1
    assert "-1 is negative" in refused(write_h5ad(tmp_path / "a.h5ad", example_anndata(counts)))


def test_float_noise_passes(tmp_path: Path) -> None:
    counts = example_counts("float32")
    counts.data *= np.float32(1 + 3e-7)
    with open_counts(write_h5ad(tmp_path / "a.h5ad", example_anndata(counts))) as opened:
        assert sum(block.num_cells for block in opened.blocks()) == CELLS


def test_normalised_values_are_named_as_such(tmp_path: Path) -> None:
    counts = example_counts("float64").toarray() + np.eye(CELLS, GENES)
    scaled = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 10_000
    data = example_anndata(sp.csr_matrix(np.log1p(scaled)))
    data.raw, data.layers["umi"] = example_anndata(), example_counts()
    text = refused(write_h5ad(tmp_path / "log.h5ad", data))
    assert "is log-normalised (log(1 + x), x summing to 10,000 in this cell), not a count" in text
    assert "Read other values of this file with --raw or --layer umi (--counts-layer where a model is named)" in text
    text = refused(write_h5ad(tmp_path / "scaled.h5ad", example_anndata(sp.csr_matrix(scaled))))
    assert "is normalised (summing to 10,000 in this cell), not a count" in text


def test_logarithms_that_are_allowed_are_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = example_counts("float64").toarray() + np.eye(CELLS, GENES)
    scaled = counts / counts.sum(axis=1, keepdims=True) * 10_000
    data = example_anndata(sp.csr_matrix(np.log1p(scaled)))
    data.raw = example_anndata()
    corrected = sp.csr_matrix(counts * np.random.default_rng(0).uniform(0.8, 1, counts.shape))
    paths = [
        write_h5ad(tmp_path / "log.h5ad", data),
        write_h5ad(tmp_path / "soupx.h5ad", example_anndata(corrected)),
        write_h5ad(tmp_path / "counts.h5ad", example_anndata()),
    ]
    for path in [*paths, *paths]:
        with open_counts(path, allow_noninteger=True) as opened:
            assert sum(block.num_cells for block in opened.blocks()) == CELLS
    assert capsys.readouterr().err == (
        f"WARNING {paths[0]}: row 0 (cell {data.obs_names[0]}) is log-normalised (log(1 + x), x summing to 10,000); "
        "its ranks are not those of counts. Read other values of this file with --raw.\n"
    )


def test_only_the_rows_that_are_read_are_checked(tmp_path: Path) -> None:
    counts = example_counts()
    counts.data[counts.indptr[50]] = 0.5
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(counts))
    with open_counts(path) as opened:
        assert sum(block.num_cells for block in opened.blocks(0, 50)) == 50
    refused(path)


def test_missing_parts_of_a_file(tmp_path: Path) -> None:
    data = example_anndata()
    data.layers["umi"] = data.X
    path = write_h5ad(tmp_path / "a.h5ad", data)
    assert "no layer 'spliced'; it has: umi" in refused(path, layer="spliced")
    assert "no matrix raw.X; it has --layer umi: add one of these" in refused(path, raw=True)
    assert "no column 'symbol' of gene ids; it has: ensembl_id, number" in refused(path, gene_id_column="symbol")
    assert "--gene-id-column index for the names of the genes (gene0, gene1, gene2)" in refused(
        path, gene_id_column="symbol"
    )
    assert "holds no gene ids but 0, 1, 2" in refused(path, gene_id_column="number")
    with pytest.raises(ConfigError, match="--raw and --layer"):
        open_counts(path, raw=True, layer="umi")
    with open_counts(path) as counts, pytest.raises(DataError, match="no column 'x' describes the cells; there are: "):
        counts.obs(["x"], 0, 1)
    data.X = None
    assert "no matrix X; it has --layer umi: add one of these" in refused(write_h5ad(tmp_path / "no_x.h5ad", data))


def test_gene_ids_that_are_numbers_as_text(tmp_path: Path) -> None:
    data = example_anndata()
    data.var["ensembl_id"] = [str(number) for number in range(GENES)]
    assert "holds no gene ids but 0, 1, 2" in refused(write_h5ad(tmp_path / "a.h5ad", data))


def test_files_that_are_no_counts(tmp_path: Path) -> None:
    text, empty, other = tmp_path / "a.h5ad", tmp_path / "b.h5ad", tmp_path / "c.h5"
    text.write_text("gene,count\n")
    empty.write_bytes(b"")
    h5py.File(other, "w").close()
    for path in (text, empty):
        assert "neither HDF5 (h5ad, 10x, loom) nor a zarr" in refused(path)
    assert "HDF5, but neither AnnData (obs, var), loom (row_attrs) nor 10x (barcodes)" in refused(other)
    assert "no such file" in refused(tmp_path / "none.h5ad")
    (tmp_path / "folder").mkdir()
    assert "neither a zarr store nor a folder with a matrix.mtx" in refused(tmp_path / "folder")


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_h5ad(kept: float, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "cannot be read" in refused(path)


def test_damaged_chunk(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(path) as file:
        place = file["X/data"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 20] = b"\xff" * 20
    path.write_bytes(content)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("indices", [0, GENES], "have column numbers outside of 0 to 39"),
        ("indices", [0, -1], "have column numbers outside of 0 to 39"),
        ("indptr", [0, 2, 1], "row pointers (indptr) are damaged"),
        ("indptr", [0, 1, 3], "row pointers (indptr) are damaged"),
    ],
)
def test_damaged_sparse_matrix(name: str, values: list[int], words: str, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(sp.csr_matrix(np.eye(2, GENES, dtype="f4"))))
    with h5py.File(path, "r+") as file:
        file[f"X/{name}"][:] = values
    assert words in refused(path)


@pytest.mark.parametrize(("name", "values"), [("indices", [0, CELLS]), ("indptr", None)])
def test_damaged_matrix_by_genes(name: str, values: list[int] | None, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(sp.csc_matrix(np.eye(CELLS, GENES, dtype="f4"))))
    with h5py.File(path, "r+") as file:
        if values is None:
            file["X/indptr"][3] = 10_000
        else:
            file["X/indices"][:2] = values
    assert "damaged" in refused(path)


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", example_anndata(example_counts().toarray()))
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X"].attrs)
        del file["X"]
        file["X"] = np.zeros((CELLS - 1, GENES), "f4")
        file["X"].attrs.update(attributes)
    assert "the matrix has 69 cells x 40 genes, the annotation 70 x 40" in refused(path)


def test_wrong_encodings(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "bsr_matrix"
    assert "a matrix of encoding 'bsr' cannot be read" in refused(path)
    data = example_anndata(np.zeros((CELLS, GENES), "S1"))
    assert "values of type |S1 are no counts" in refused(write_h5ad(tmp_path / "b.h5ad", data))


def test_matrix_market_faults(tmp_path: Path) -> None:
    path = write_mtx(tmp_path, gz=False)
    lines = (path / "matrix.mtx").read_text().splitlines()

    def changed(number: int, text: str) -> str:
        (path / "matrix.mtx").write_text("\n".join([*lines[:number], text, *lines[number + 1 :]]) + "\n")
        return refused(path)

    assert "line 1 is not '%%MatrixMarket matrix coordinate" in changed(0, "%%MatrixMarket matrix array real general")
    size = next(number for number, line in enumerate(lines) if not line.startswith("%"))
    assert "its size is 41 x 70, but there are 40 features and 70 barcodes" in changed(size, f"41 {CELLS} 10")
    assert "entries instead of 9" in changed(size, f"{GENES} {CELLS} 9")
    assert "row numbers outside of 0 to 69" in changed(size + 1, f"1 {CELLS + 1} 1")
    assert "column numbers outside of 0 to 39" in changed(size + 1, f"{GENES + 1} 1 1")
    assert "cannot be read" in changed(size + 1, "one two three")
    (path / "barcodes.tsv").unlink()
    assert "barcodes.tsv is missing beside matrix.mtx" in refused(path)


def test_layers_of_formats_that_have_none(tmp_path: Path) -> None:
    for name, words in (("mtx", "one matrix"), ("10x h5", "one matrix"), ("loom", "loom has no raw.X")):
        (tmp_path / name).mkdir()
        assert words in refused(FORMATS[name][0](tmp_path / name), raw=True)


def test_zarr_that_is_no_anndata(tmp_path: Path) -> None:
    import zarr

    zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    assert "this zarr store is no AnnData" in refused(tmp_path / "a.zarr")


def test_a_column_of_an_unknown_encoding_is_named_only_when_read(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        file.create_group("obs/odd").attrs["encoding-type"] = "awkward-array"
    with open_counts(path) as counts, pytest.raises(DataError, match="encoding 'awkward-array'"):
        counts.obs(["odd"], 0, 1)
