"""Open a corpus of tokenized cells as views of memory-mapped Arrow buffers.

Parquet files are converted once into a compact Arrow cache (see ``arrow_cache``); a folder written by
``datasets.Dataset.save_to_disk`` is read in place. Either way a corpus is a list of Arrow streams, mapped
into memory. Opening reads the record batches' headers and the cells' offsets, never the tokens: these are
paged in when a loader asks for them.
"""

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from geneformer_pretrain.console import amount
from geneformer_pretrain.data.arrow_cache import (
    DATA_FILE,
    CacheManifest,
    ParquetReader,
    SourceFile,
    ensure_cache,
    fingerprint,
)
from geneformer_pretrain.data.arrow_stream import Stream, StreamBatch, map_stream
from geneformer_pretrain.data.parquet_cells import COLUMN
from geneformer_pretrain.data.saved_folder import (
    STATE_FILE,
    SavedFolder,
    SelectedCells,
    map_saved_folder,
    read_saved_folder,
)
from geneformer_pretrain.data.sources import CorpusGeneSet, find_parquet, read_description, read_description_beside
from geneformer_pretrain.errors import DataError

TOKEN_DTYPES = {np.dtype(kind): np.dtype(kind) for kind in (np.uint16, np.int16, np.int32, np.int64)} | {
    np.dtype(np.uint32): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.int64),
}
"""Types that tokens are stored in, each with the one it is read as. Unsigned tokens too large for the signed type come
out negative, and are refused where they are used."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenized cells, numbered from 0 in the order of their files, in memory-mapped Arrow record batches.

    Cell r of batch b is ``values[offsets[r]:offsets[r + 1]]`` with ``values`` the array of ``token_dtype`` at
    address ``batch_values[b]`` and ``offsets`` the array of ``offset_dtype`` at address ``batch_offsets[b]``.
    The addresses are valid, and must only be read from, as long as the corpus lives.

    Attributes
    ----------
    num_cells, num_tokens
        Size of the corpus.
    lengths
        Tokens of each cell, int32 [num_cells].
    fingerprint
        Identifies the content: for parquet a hash of all tokens and lengths, for a saved folder a hash of its
        file names and sizes, all lengths and the fingerprint that ``datasets`` gave it.
    batch_first_cell
        Number of the first cell of each batch, then num_cells; int64 [num_batches + 1].
    batch_values
        Address of the value that offset 0 refers to, uint64 [num_batches].
    batch_offsets
        Address of the first cell's offset, uint64 [num_batches].
    token_dtype, offset_dtype
        Types at these addresses: uint16, int16, int32 or int64; int32 or int64.
    sources
        Files that the cells come from, in order.
    empty_files
        Files without rows that were left out.
    """

    num_cells: int
    num_tokens: int
    lengths: np.ndarray = field(repr=False)
    fingerprint: str
    batch_first_cell: np.ndarray = field(repr=False)
    batch_values: np.ndarray = field(repr=False)
    batch_offsets: np.ndarray = field(repr=False)
    token_dtype: np.dtype
    offset_dtype: np.dtype
    sources: tuple[SourceFile, ...] = field(repr=False)
    _batches: list[StreamBatch] = field(repr=False)  # keeps the mapped files alive
    empty_files: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the first file."""
        return Path(self.sources[0].path).parent

    def cell(self, index: int) -> np.ndarray:
        """Return a copy of the tokens of one cell, int64 [length]; slow."""
        self._require_cell(index)
        batch = int(np.searchsorted(self.batch_first_cell, index, side="right")) - 1
        row = index - int(self.batch_first_cell[batch])
        tokens = self._batches[batch].column.slice(row, 1).flatten()
        return np.from_dlpack(tokens).astype(np.int64)  # to_numpy() would import pandas: 0.3 s of each start

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a record batch and its cells' boundaries in them, int64 [cells + 1]."""
        batch = self._batches[number]
        return batch.column.flatten().to_numpy(), (batch.offsets - batch.offsets[0]).astype(np.int64)

    def describe_cell(self, index: int) -> str:
        """Return where a cell comes from, such as ``data/cells.parquet, row 17``, rows counted from 0."""
        self._require_cell(index)
        ends = np.cumsum([source.rows for source in self.sources])
        number = int(np.searchsorted(ends, index, side="right"))
        source = self.sources[number]
        return f"{source.path}, row {index - int(ends[number]) + source.rows}"

    def _require_cell(self, index: int) -> None:
        if not 0 <= index < self.num_cells:
            raise IndexError(f"cell {index} is not in the corpus of {self.num_cells} cells")


def open_corpus(
    path: str | Path, cache_dir: str | Path, *, vocab_size: int | None = None, show_progress: bool = False
) -> Corpus:
    """Open a corpus folder, parquet files or a Hugging Face ``save_to_disk`` folder.

    Parameters
    ----------
    path
        A corpus folder (``corpus.json``), a parquet file, a folder with ``*.parquet`` files, a glob pattern (``**``
        descends into folders), or a ``save_to_disk`` folder. Several parquet files are taken in the order of their
        names. The column ``input_ids`` holds lists of integers; other columns are ignored.
    cache_dir
        Folder for the Arrow cache of parquet files; not used for a saved folder, unless it selects rows.
    vocab_size
        If given, tokens of parquet files must be smaller. The tokens of a saved folder are not read here:
        whoever uses them has to check them.
    show_progress
        Show the progress of a conversion.

    Returns
    -------
    Corpus
        The opened corpus, with at least one cell and no empty cells.

    Raises
    ------
    DataError
        If nothing is found at ``path`` or a file cannot be used; the message names the file, the row and the value.
    OutputError
        If the cache cannot be written.
    """
    location = Path(path)
    if _is_saved_folder(location):
        return _open_saved_folder(read_saved_folder(location), Path(cache_dir), vocab_size, show_progress)
    description = read_description(location)
    files = find_parquet(path) if description is None else description.parts
    corpus = _open_parquet(files, Path(cache_dir), vocab_size, show_progress)
    if description is not None:
        listed = sum(part["cells"] for part in description.content["parts"])
        if listed != corpus.num_cells:
            raise DataError(
                f"{location}: its parts hold {amount(corpus.num_cells, 'cell')}, and corpus.json lists {listed:,}; "
                "copy the folder again, or tokenize again"
            )
    return corpus


def named_gene_set(path: str | Path) -> tuple[CorpusGeneSet, Path] | None:
    """Find the gene set that a corpus names, and the folder of its ``corpus.json``; None if it names none.

    Raises
    ------
    DataError
        As `open_corpus`; tokens are not read.
    """
    location = Path(path)
    if _is_saved_folder(location):
        return None
    description = read_description(location) or read_description_beside(find_parquet(path))
    return None if description is None else (description.gene_set, description.parts[0].parent)


def require_corpus(path: str | Path) -> None:
    """Check that there is something to open, without opening it.

    Raises
    ------
    DataError
        If nothing is found at ``path``.
    """
    if not _is_saved_folder(Path(path)) and read_description(Path(path)) is None:
        find_parquet(path)


def _is_saved_folder(location: Path) -> bool:
    if (location / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in location.iterdir() if (child / STATE_FILE).is_file())
        raise DataError(f"{location}: holds several datasets; name one of its folders {splits}")
    return (location / STATE_FILE).is_file()


def _open_parquet(files: Sequence[Path], cache_dir: Path, vocab_size: int | None, show_progress: bool) -> Corpus:
    cache = ensure_cache(files, lambda: ParquetReader(files), cache_dir, show_progress=show_progress)
    return _open_cache(*cache, vocab_size)


def _open_cache(folder: Path, manifest: CacheManifest, vocab_size: int | None) -> Corpus:
    if vocab_size is not None and manifest.max_token >= vocab_size:
        raise DataError(
            f"{manifest.max_token_path}, row {manifest.max_token_row}: token {manifest.max_token} is outside "
            f"the vocabulary of {vocab_size}; set data.vocab_path to the vocabulary that the cells were made with and "
            f"model.vocab_size to its size (at least {manifest.max_token + 1}), or tokenize the cells again"
        )
    advice = f"delete the folder {folder} and start again"
    corpus = _assemble([map_stream(folder / DATA_FILE, advice)], manifest.sources, manifest.tokens_hash)
    if corpus.fingerprint != manifest.fingerprint:
        raise DataError(f"{folder / DATA_FILE}: the corpus cache is damaged; {advice}")
    return replace(corpus, empty_files=manifest.empty_files)


def _open_saved_folder(saved: SavedFolder, cache_dir: Path, vocab_size: int | None, show_progress: bool) -> Corpus:
    def open_all() -> Corpus:
        streams = map_saved_folder(saved)
        sources = tuple(SourceFile(str(stream.path), stream.num_rows) for stream in streams)
        files = [[name, len(stream.region), stream.num_rows] for name, stream in zip(saved.names, streams, strict=True)]
        return _assemble(streams, sources, json.dumps([saved.identity, files]))

    if not saved.index_names:
        return open_all()
    cache = ensure_cache(saved.files, lambda: SelectedCells(saved, open_all()), cache_dir, show_progress=show_progress)
    return _open_cache(*cache, vocab_size)


def _assemble(streams: list[Stream], sources: tuple[SourceFile, ...], identity: str) -> Corpus:
    """Join the batches of all streams; lengths come from the offsets."""
    stored = np.dtype(streams[0].kind.value_type.to_pandas_dtype())
    if stored not in TOKEN_DTYPES:
        raise DataError(
            f"{streams[0].path}: the tokens in {COLUMN} have type {stored}; cast them to one of "
            f"{[dtype.name for dtype in TOKEN_DTYPES]}"
        )
    batches = [batch for stream in streams for batch in stream.batches]
    batch_first_cell = np.zeros(len(batches) + 1, np.int64)
    np.cumsum([len(batch.column) for batch in batches], out=batch_first_cell[1:])
    lengths = np.empty(batch_first_cell[-1], np.int32)
    for batch, first in zip(batches, batch_first_cell.tolist(), strict=False):
        end = first + len(batch.column)
        np.subtract(batch.offsets[1:], batch.offsets[:-1], out=lengths[first:end], casting="same_kind")
    # A corpus that fits into memory ends up there: sooner, if the kernel reads ahead. A larger one would only
    # push itself out.
    physical_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(len(stream.region) for stream in streams) < physical_memory // 2:
        for stream in streams:
            stream.region.madvise(mmap.MADV_NORMAL)
    return Corpus(
        num_cells=len(lengths),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        lengths=lengths,
        fingerprint=fingerprint(identity, xxhash.xxh3_128_hexdigest(lengths.data)),
        batch_first_cell=batch_first_cell,
        batch_values=np.array([batch.values_address for batch in batches], np.uint64),
        batch_offsets=np.array([batch.offsets.ctypes.data for batch in batches], np.uint64),
        token_dtype=TOKEN_DTYPES[stored],
        offset_dtype=batches[0].offsets.dtype,
        sources=sources,
        _batches=batches,
    )
