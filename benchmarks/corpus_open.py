"""Time the opening of a large corpus and measure the memory that converting parquet takes.

    python benchmarks/corpus_open.py                          # 30M tiny cells as save_to_disk lays them out
    python benchmarks/corpus_open.py --convert-megabytes 300  # also convert that much parquet

Everything is written into a temporary folder and deleted at the end. "Cold" means that the corpus has been
put out of the page cache before it is opened. Memory is RssAnon: resident, mapped files not counted.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.data.corpus import open_corpus


class PeakMemory:
    """Sample RssAnon while in the context; ``grown`` is the peak's rise above the start, in MB."""

    def __enter__(self) -> "PeakMemory":
        """Start sampling."""
        self.start = self.peak = anonymous_megabytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_megabytes())

    @property
    def grown(self) -> float:
        """Rise of the peak above the start, MB."""
        return self.peak - self.start


def anonymous_megabytes() -> float:
    """Return this process's resident memory that is not file-backed, MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def write_saved_folder(folder: Path, cells: int, tokens_per_cell: int, batch_rows: int, shards: int) -> None:
    """Write a folder as ``datasets.Dataset.save_to_disk`` does, repeating one record batch."""
    schema = pa.schema([("input_ids", pa.list_(pa.int64())), ("length", pa.int64())])
    tokens = np.random.default_rng(0).integers(2, 25_426, batch_rows * tokens_per_cell)
    offsets = np.arange(batch_rows + 1, dtype=np.int32) * tokens_per_cell
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    batch = pa.RecordBatch.from_arrays([column, pa.array(np.full(batch_rows, tokens_per_cell))], schema=schema)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        rows = cells * (number + 1) // shards - cells * number // shards
        with (folder / name).open("wb") as sink, ipc.new_stream(sink, schema) as writer:
            for _ in range(rows // batch_rows):
                writer.write_batch(batch)
            writer.write_batch(batch.slice(0, rows % batch_rows))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "benchmark"}
    (folder / "state.json").write_text(json.dumps(state))


def put_out_of_page_cache(folder: Path) -> None:
    """Write a folder's files to disk and drop them from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report_opening(state: str, folder: Path) -> None:
    """Open a corpus and print what it took."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        corpus = open_corpus(folder, folder / "cache")
        seconds = time.perf_counter() - start
    print(
        f"open, {state}: {seconds:.2f} s for {corpus.num_cells:,} cells, {corpus.num_tokens:,} tokens, "
        f"{len(corpus.batch_values):,} batches; memory +{memory.grown:.0f} MB, "
        f"of which {corpus.lengths.nbytes / 1e6:.0f} MB are the lengths"
    )


def report_conversion(folder: Path, megabytes: int) -> None:
    """Convert a parquet file of the given size, in large row groups, and print what it took."""
    rows, source = 50_000, folder / "cells.parquet"
    generator = np.random.default_rng(0)
    schema = pa.schema([("input_ids", pa.list_(pa.uint16()))])
    # As `tokenize` writes its parts.
    with pq.ParquetWriter(source, schema, compression="zstd") as writer:
        while source.stat().st_size < megabytes * 1e6:
            lengths = np.exp(generator.normal(np.log(900), 0.557, rows)).clip(200, 2048).astype(np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)])
            tokens = generator.integers(2, 25_426, offsets[-1], dtype=np.uint16)
            cells = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
            writer.write_table(pa.table([cells], schema=schema), row_group_size=rows)
    del cells, tokens, offsets
    pa.default_memory_pool().release_unused()
    size = source.stat().st_size
    with PeakMemory() as memory:
        start = time.perf_counter()
        corpus = open_corpus(source, folder / "cache", show_progress=True)
        seconds = time.perf_counter() - start
    print(
        f"convert: {seconds:.1f} s for {size / 1e6:.0f} MB of parquet, {corpus.num_cells:,} cells, "
        f"{corpus.num_tokens / seconds / 1e6:.0f}M tokens/s, {seconds / corpus.num_cells * 1e6:.1f} s per million; "
        f"memory +{memory.grown:.0f} MB"
    )
    start = time.perf_counter()
    open_corpus(source, folder / "cache")
    print(f"open again, from the cache: {time.perf_counter() - start:.3f} s")


def main() -> None:
    """Make the corpora, open them and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=30_000_000, help="cells in the saved folder")
    parser.add_argument("--tokens-per-cell", type=int, default=2, help="tokens in each of them")
    parser.add_argument("--batch-rows", type=int, default=1000, help="cells in a record batch")
    parser.add_argument("--shards", type=int, default=8, help="files in the saved folder")
    parser.add_argument(
        "--convert-megabytes", type=int, default=0, help="size of parquet to convert too; default: none"
    )
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_saved_folder(folder, arguments.cells, arguments.tokens_per_cell, arguments.batch_rows, arguments.shards)
        put_out_of_page_cache(folder)
        report_opening("cold", folder)
        report_opening("warm", folder)
    if arguments.convert_megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            report_conversion(Path(name), arguments.convert_megabytes)


if __name__ == "__main__":
    main()
