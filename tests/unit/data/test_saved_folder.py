"""Opening folders of `save_to_disk`: the views against the source's own rows, every refusal, and what is read."""

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from geneformer_pretrain.data.corpus import open_corpus
from geneformer_pretrain.errors import DataError
from tests.corpora import (
    Cells,
    assert_holds,
    cache_folder,  # noqa: F401 - the fixture `cache`
    random_cells,
    write_streams,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_progress_bars() -> None:
    datasets.disable_progress_bars()


def save_dataset(folder: Path, cells: Cells, num_shards: int, kind: str = "int64") -> Path:
    features = datasets.Features({"length": datasets.Value("int64"), "input_ids": datasets.List(datasets.Value(kind))})
    columns = {"length": [999] * len(cells), "input_ids": cells}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder, num_shards=num_shards)
    return folder


@pytest.mark.parametrize("kind", ["int16", "uint16", "int32", "int64", "uint32", "uint64"])
def test_saved_folder_is_read_in_place(tmp_path: Path, cache: Path, kind: str) -> None:
    cells = random_cells(2500)
    if kind == "int16":
        cells = [[token // 2 for token in cell] for cell in cells]
    folder = save_dataset(tmp_path / "saved", cells, 3, kind)
    corpus = open_corpus(folder, cache)
    assert_holds(corpus, cells)
    assert corpus.token_dtype == np.dtype(kind.replace("uint32", "int32").replace("uint64", "int64"))
    assert corpus.describe_cell(0) == f"{tmp_path}/saved/data-00000-of-00003.arrow, row 0"
    assert corpus.describe_cell(834) == f"{tmp_path}/saved/data-00001-of-00003.arrow, row 0"
    assert corpus.describe_cell(2499) == f"{tmp_path}/saved/data-00002-of-00003.arrow, row 832"
    assert not cache.exists()


def test_saved_selection_is_what_was_selected(tmp_path: Path, cache: Path) -> None:
    cells = random_cells(60)
    dataset = datasets.Dataset.from_dict({"input_ids": cells}).select([5, 3, 59, 3])
    dataset.save_to_disk(tmp_path / "saved")
    assert_holds(open_corpus(tmp_path / "saved", cache), [cells[5], cells[3], cells[59], cells[3]])


def test_an_index_of_selected_rows_is_followed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = random_cells(60)
    rows = [5, 3, 59, 3]
    folder = add_index(save_dataset(tmp_path / "saved", cells, 3), rows)
    corpus = open_corpus(folder, cache)
    assert_holds(corpus, [cells[row] for row in rows])
    assert corpus.describe_cell(2).endswith("state.json (selected rows), row 2")
    with monkeypatch.context() as patch:
        patch.setattr("geneformer_pretrain.data.saved_folder.SelectedCells.read", None)  # it is flattened once
        assert open_corpus(folder, cache).fingerprint == corpus.fingerprint
    add_index(folder, [1, 2])
    assert_holds(open_corpus(folder, cache), [cells[1], cells[2]])


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())], ids=str)
def test_sliced_and_empty_record_batches(tmp_path: Path, cache: Path, kind: pa.DataType) -> None:
    cells = random_cells(30)
    whole = pa.array(cells, kind)
    shards = [[whole[:0], whole[:7], whole[7:7]], [whole[:0]], [whole[7:8], whole[8:]]]
    corpus = open_corpus(write_streams(tmp_path / "saved", shards), cache)
    assert_holds(corpus, cells)
    assert len(corpus.batch_values) == 3
    assert corpus.describe_cell(7) == f"{tmp_path}/saved/data-2.arrow, row 0"
    assert corpus.offset_dtype == (np.int64 if pa.types.is_large_list(kind) else np.int32)


def test_saved_fingerprint(tmp_path: Path, cache: Path) -> None:
    first = save_dataset(tmp_path / "first", [[1, 2], [3]], 1)
    fingerprint = open_corpus(first, cache).fingerprint
    shutil.copytree(first, tmp_path / "copy")
    assert open_corpus(tmp_path / "copy", cache).fingerprint == fingerprint
    other = save_dataset(tmp_path / "tokens", [[1, 2], [4]], 1)  # told apart by the dataset's own fingerprint
    assert open_corpus(other, cache).fingerprint != fingerprint
    shards = [
        [pa.array([[1, 2], [3]])],
        [pa.array([[1], [2, 3]])],
        [pa.array([[1, 2], [3]], pa.list_(pa.int64()))],
    ]
    a, b, c = (
        open_corpus(write_streams(tmp_path / f"{i}", [shard]), cache).fingerprint for i, shard in enumerate(shards)
    )
    assert a == c != b


def empty_cell(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]])], [pa.array([[1]]), pa.array([[2], [], [3]])]])


def null_cell(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1], None])]])


def null_token(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1], [2, 3]]), pa.array([[4], [5, None]])]])


def empty_dataset(folder: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": pa.array([], pa.list_(pa.int64())).to_pylist()}).cast(
        datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
    ).save_to_disk(folder)


def only_empty_cells(folder: Path) -> None:
    write_streams(folder, [[pa.array([[], []], pa.list_(pa.int64()))]])


def floats(folder: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1.5]]}).save_to_disk(folder)


def other_column(folder: Path) -> None:
    datasets.Dataset.from_dict({"tokens": [[1]], "length": [1]}).save_to_disk(folder)


def unsupported_integers(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]], pa.list_(pa.uint8()))]])


def mixed_types(folder: Path) -> None:
    write_streams(folder, [[pa.array([[1]], pa.list_(kind))] for kind in (pa.int32(), pa.int32(), pa.int64())])


def compressed(folder: Path) -> None:
    options = ipc.IpcWriteOptions(compression="zstd")
    write_streams(folder, [[pa.array([[1] * 5000] * 100)]], options)


def missing_shard(folder: Path) -> None:
    (save_dataset(folder, [[1], [2]], 2) / "data-00001-of-00002.arrow").unlink()


def zero_bytes(folder: Path) -> None:
    os.truncate(save_dataset(folder, [[1], [2]], 1) / "data-00000-of-00001.arrow", 0)


def cut_in_a_batch(folder: Path) -> None:
    path = write_streams(folder, [[pa.array([[1, 2, 3]] * 50)] * 3]) / "data-0.arrow"
    os.truncate(path, path.stat().st_size - 600)


def cut_between_batches(folder: Path) -> None:
    path = write_streams(folder, [[pa.array([[1, 2, 3]] * 50)] * 3]) / "data-0.arrow"
    os.truncate(path, path.stat().st_size - 8)


def not_arrow(folder: Path) -> None:
    (write_streams(folder, [[pa.array([[1]])]]) / "data-0.arrow").write_bytes(b"input_ids 1 2 3\n" * 9)


def decreasing_offsets(folder: Path) -> None:
    replace_offsets(folder, [0, 7, 2, 9])


def negative_offset(folder: Path) -> None:
    replace_offsets(folder, [-4, 2, 7, 9])


def offsets_beyond_the_values(folder: Path) -> None:
    replace_offsets(folder, [0, 2, 7, 900])


def replace_offsets(folder: Path, offsets: list[int]) -> None:
    path = write_streams(folder, [[pa.array([[1, 2], [1, 2, 3, 4, 5], [6, 7]])]]) / "data-0.arrow"
    old, new = (np.array(numbers, np.int32).tobytes() for numbers in ([0, 2, 7, 9], offsets))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))


def add_index(folder: Path, rows: list[int]) -> Path:
    """Select rows as earlier releases of datasets did: by an index in a file of its own."""
    table = pa.table({"indices": pa.array(rows, pa.uint64())})
    with (folder / "indices.arrow").open("wb") as sink, ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    state_file = folder / "state.json"
    state = json.loads(state_file.read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    state_file.write_text(json.dumps(state))
    return folder


def index_beyond_the_rows(folder: Path) -> None:
    add_index(save_dataset(folder, [[1], [2]], 1), [0, 2])


def lost_index(folder: Path) -> None:
    (add_index(save_dataset(folder, [[1], [2]], 1), [0]) / "indices.arrow").unlink()


def lfs_pointer(folder: Path) -> None:
    path = save_dataset(folder, [[1], [2]], 1) / "data-00000-of-00001.arrow"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def no_fingerprint(folder: Path) -> None:
    state_file = save_dataset(folder, [[1], [2]], 1) / "state.json"
    state_file.write_text(json.dumps({"_data_files": []}))


def garbled_state(folder: Path) -> None:
    os.truncate(save_dataset(folder, [[1], [2]], 1) / "state.json", 30)


def several_splits(folder: Path) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[1]]})
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_cell, r"data-1\.arrow, row 2: input_ids has 0 tokens; drop"),
        (only_empty_cells, r"data-0\.arrow, row 0: input_ids has 0 tokens; drop"),
        (null_cell, r"data-0\.arrow, row 1: input_ids is null; drop"),
        (null_token, r"data-0\.arrow, row 3: input_ids holds a null; drop"),
        (empty_dataset, r"saved: the dataset has no rows; correct|has type null"),
        (floats, r"0001\.arrow: column 'input_ids' has type list<.*double>, not .*; store"),
        (
            other_column,
            r"0001\.arrow: no column 'input_ids', only \['tokens', 'length'\]; rename",
        ),
        (unsupported_integers, r"data-0\.arrow: .* type uint8; cast them to one of \['uint16'"),
        (mixed_types, r"int32.* in .*data-0\.arrow but .*int64.* in .*data-2\.arrow; cast"),
        (compressed, r"data-0\.arrow: the Arrow stream is compressed; save it again"),
        (missing_shard, r"data-00001-of-00002\.arrow: the file is missing; save"),
        (zero_bytes, r"data-00000-of-00001\.arrow: the file is empty; save"),
        (cut_in_a_batch, r"data-0\.arrow: damaged after row 100 .*; save"),
        (cut_between_batches, r"data-0\.arrow: the file breaks off after row 150; save"),
        (not_arrow, r"data-0\.arrow: not an Arrow stream .*; save"),
        (decreasing_offsets, r"data-0\.arrow, row 1: input_ids has -5 tokens; drop"),
        (negative_offset, r"data-0\.arrow: damaged after row 0 .*; save"),
        (offsets_beyond_the_values, r"data-0\.arrow: damaged after row 0 .*; save"),
        (index_beyond_the_rows, r"saved: its index of rows asks for row 2 of 2; save"),
        (lost_index, r"indices\.arrow: the file is missing; copy"),
        (lfs_pointer, r"0001\.arrow: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (no_fingerprint, r"state\.json: .*_fingerprint.*; save"),
        (garbled_state, r"state\.json: .*JSONDecodeError.*; save"),
        (several_splits, r"saved: holds several datasets; .*\['test', 'train'\]"),
    ],
)
def test_unusable_saved_folder(tmp_path: Path, cache: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "saved")
    with pytest.raises(DataError, match=message):
        open_corpus(tmp_path / "saved", cache)


@pytest.mark.parametrize("hard", [4096, 64])
def test_more_shards_than_a_process_may_open_files(tmp_path: Path, cache: Path, hard: int) -> None:
    """The soft limit is raised; what the hard one forbids is an error with a remedy."""
    folder = write_streams(tmp_path / "saved", [[pa.array([[2, 3]])]] * 100)
    script = (
        "import resource, sys\n"
        "from geneformer_pretrain.data.corpus import open_corpus\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))\n"
        "print(open_corpus(sys.argv[1], sys.argv[2]).num_cells)\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    if hard > 100:
        assert done.stdout.strip() == "100", done.stderr
    else:
        assert "100 files, and this system allows a process 64 open ones" in done.stderr


def resident_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as region:
        content = np.frombuffer(region, np.uint8)
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)))
        assert libc.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)) == 0
        del content
        return int((pages & 1).sum()) * mmap.PAGESIZE


def test_opening_does_not_read_the_tokens(tmp_path: Path, cache: Path) -> None:
    batch = pa.array(np.ones((500, 500), np.int64).tolist())
    folder = write_streams(tmp_path / "saved", [[batch] * 16])
    path = folder / "data-0.arrow"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path) > 0:
        pytest.skip("this file system keeps files in memory")
    corpus = open_corpus(folder, cache)
    assert corpus.num_tokens == 16 * 500 * 500
    assert resident_bytes(path) < path.stat().st_size / 20
