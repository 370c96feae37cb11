"""Corpora as other tools leave them: found, or refused by what they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.data.corpus import named_gene_set, open_corpus, require_corpus
from geneformer_pretrain.errors import DataError
from tests.corpora import (
    assert_holds,
    cache_folder,  # noqa: F401 - the fixture `cache`
    random_cells,
    write_corpus_folder,
    write_parquet,
)


def refusal(path: Path | str, cache: Path) -> str:
    with pytest.raises(DataError) as error:
        open_corpus(path, cache)
    return str(error.value)


def test_folders_of_spark(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(20)
    folder = tmp_path / "cells.parquet"
    write_parquet(folder / "part-00000-c000.snappy.parquet", cells[:9])
    write_parquet(folder / "part-00001-c000.snappy.parquet", [])
    write_parquet(folder / "part-00002-c000.snappy.parquet", cells[9:])
    for name in ("_SUCCESS", "_metadata.parquet", ".part-00000-c000.snappy.parquet.crc", "._x.parquet"):
        (folder / name).touch()
    assert_holds(open_corpus(folder, cache), cells)


def test_hive_partitions_are_searched(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(30)
    table = pa.table({"input_ids": cells, "tissue": ["lung", "heart", "a b"] * 10, "sex": ["f"] * 15 + ["m"] * 15})
    pq.write_to_dataset(table, tmp_path / "hive", partition_cols=["tissue", "sex"])
    (tmp_path / "hive/_SUCCESS").touch()
    write_parquet(tmp_path / "hive/_temporary/0/part.parquet", [[1]])
    write_parquet(tmp_path / "hive/tissue=lung/.staging/part.parquet", [[1]])
    corpus = open_corpus(tmp_path / "hive", cache)
    assert sorted(corpus.cell(number).tolist() for number in range(30)) == sorted(cells)
    assert "sex=f" in corpus.describe_cell(0)
    require_corpus(tmp_path / "hive")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "cells.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert refusal(path, cache) == f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"


def test_the_cache_of_load_dataset_is_explained(tmp_path: Path, cache: Path) -> None:
    inner = tmp_path / "parquet/default-0123/0.0.0/abcd"
    inner.mkdir(parents=True)
    (inner / "dataset_info.json").write_text("{}")
    (inner / "parquet-train.arrow").write_bytes(b"\xff" * 100)
    for path in (inner, inner / "parquet-train.arrow", tmp_path / "parquet"):
        message = refusal(path, cache)
        assert "private cache of datasets.load_dataset" in message
        assert "save_to_disk(FOLDER) and give that folder" in message
    (inner / "dataset_info.json").unlink()
    assert "Arrow files but no state.json" in refusal(inner, cache)


@pytest.mark.parametrize(
    "given", ["s3://bucket/cells", "hf://datasets/ctheodoris/Genecorpus-30M", "https://x.org/a.parquet"]
)
def test_remote_addresses_are_named(cache: Path, given: str) -> None:
    for path in (given, Path(given)):  # Path drops one of the slashes
        message = refusal(path, cache)
        assert f"a remote address ({given.split(':')[0]})" in message
        assert "copy it to a local or shared disk" in message
    assert ("aws s3 sync s3://bucket/cells FOLDER" in refusal(given, cache)) == given.startswith("s3")
    with pytest.raises(DataError, match="remote address"):
        require_corpus(given)


def test_a_list_of_paths_is_named(tmp_path: Path, cache: Path) -> None:
    paths = [write_parquet(tmp_path / name, [[1, 2]]) for name in ("a.parquet", "b.parquet", "c,d.parquet")]
    assert "looks like a list of paths, and one is expected" in refusal(f"{paths[0]},{paths[1]}", cache)
    assert open_corpus(paths[2], cache).num_cells == 1


def test_a_corpus_folder(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(25)
    folder = write_corpus_folder(tmp_path / "corpus", [cells[:10], [], cells[10:]])
    for path in (folder, folder / "part-*.parquet"):
        corpus = open_corpus(path, cache)
        assert_holds(corpus, cells)
        named = named_gene_set(path)
        assert named is not None
        assert named[0].fingerprint == "f00d"
        assert named[0].special_tokens == {"pad": 0, "mask": 1}
    assert named_gene_set(write_parquet(tmp_path / "plain.parquet", cells)) is None


def damaged(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(content | changes))


def test_corpus_folders_that_are_refused(tmp_path: Path, cache: Path) -> None:
    folders = [write_corpus_folder(tmp_path / str(i), [random_cells(5), random_cells(3)]) for i in range(6)]
    (folders[0] / "part-00001.parquet").unlink()
    assert "part-00001.parquet is missing, which corpus.json lists" in refusal(folders[0], cache)
    damaged(folders[1], format_version=2)
    assert "written by a newer release (format 2; this one reads up to 1)" in refusal(folders[1], cache)
    (folders[2] / "corpus.json").write_text("{")
    assert "corpus.json: not as `tokenize` writes it" in refusal(folders[2], cache)
    damaged(folders[3], gene_set={"name": "x"})
    assert "corpus.json: not as `tokenize` writes it (KeyError" in refusal(folders[3], cache)
    write_parquet(folders[4] / "part-00001.parquet", random_cells(4))
    assert "its parts hold 9 cells, and corpus.json lists 8" in refusal(folders[4], cache)
    (folders[5] / "corpus.json").rename(folders[5] / "tokenize.json")
    assert "an unfinished corpus; start the same `tokenize` command again" in refusal(folders[5], cache)
