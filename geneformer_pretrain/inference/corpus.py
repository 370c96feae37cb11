"""The corpus of a command for inference: the one that it is given, or counts that are tokenized into one first."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from geneformer_pretrain.console import Progress, amount, say
from geneformer_pretrain.data.sources import find_parquet, read_description
from geneformer_pretrain.data.vocabulary import require_gene_set
from geneformer_pretrain.errors import DataError
from geneformer_pretrain.files import replacing
from geneformer_pretrain.inference.cells import TOKEN_COLUMNS
from geneformer_pretrain.inference.model import Model

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.counts import CountsFile


@dataclass(frozen=True)
class CountsOptions:
    """Options of `tokenize` that say where counts are in a file."""

    gene_id_column: str = "ensembl_id"
    n_counts_column: str | None = None
    filter_column: str | None = None
    layer: str | None = None
    raw: bool = False
    min_genes: int = 0
    allow_noninteger: bool = False
    allow_low_match: bool = False


def find_corpus(
    paths: Sequence[str | Path],
    model: Model,
    folder: Path,
    options: CountsOptions,
    *,
    is_main: bool,
    needed: Mapping[str, str | None] = MappingProxyType({}),
) -> Path:
    """Return the corpus to read: the one that is given, or counts tokenized into a file of `folder`.

    Parameters
    ----------
    paths
        One corpus, as `data.open_corpus` takes it; or files, folders and globs of counts.
    model
        Model that will read the cells.
    folder
        Folder for intermediate results; counts that were tokenized into it before are not tokenized again.
    options
        Where counts are in their files.
    is_main
        Print what is worth knowing.
    needed
        Columns that the cells must have, by the options that name them: of counts, looked for before the long work.

    Raises
    ------
    DataError
        Cells that the model cannot read, or counts without a needed column.
    """
    corpus = next((Path(path) for path in paths if is_corpus(path)), None)
    if corpus is None:
        return _tokenized(paths, model, folder, options, is_main, needed)
    if len(paths) > 1:
        raise DataError(f"{paths[0]}, {paths[1]}: name one corpus, or counts only; a glob takes several files.")
    _require_gene_set(corpus, model, is_main=is_main)
    return corpus


def is_corpus(path: str | Path) -> bool:
    """True for parquet files and folders of a corpus, false for counts."""
    location = Path(path)
    if location.is_dir():
        marks = ("corpus.json", "state.json", "dataset_dict.json")
        return any((location / mark).is_file() for mark in marks) or _has_parquet(location)
    return location.suffix == ".parquet"


def _has_parquet(folder: Path) -> bool:
    try:
        find_parquet(folder)
    except DataError:
        return False
    return True


def _require_gene_set(corpus: Path, model: Model, *, is_main: bool) -> None:
    """Check that a corpus was tokenized with the model's gene set; say so if the corpus does not name it.

    Raises
    ------
    DataError
        Naming the difference.
    """
    folder = corpus if corpus.is_dir() else corpus.parent
    description = read_description(folder)
    if description is not None:
        require_gene_set(description.gene_set, folder, model.gene_set)
    elif is_main:
        say(f"{corpus} does not name its gene set; its tokens are read as those of {model.gene_set.name}.")


def _tokenized(
    paths: Sequence[str | Path],
    model: Model,
    folder: Path,
    options: CountsOptions,
    is_main: bool,
    needed: Mapping[str, str | None],
) -> Path:
    """Return the file of cells that counts were tokenized into, now or before; its name tells counts and options."""
    from geneformer_pretrain.tokenization.counts import file_state, find_counts

    files = find_counts([str(path) for path in paths])
    states = [file_state(file) for file in files]
    made_of = [[str(file.absolute()), state] for file, state in zip(files, states, strict=True)]
    key = xxhash.xxh3_64_hexdigest(json.dumps([made_of, asdict(options), model.gene_set.fingerprint]).encode())
    output = folder / f"cells-{key}.parquet"
    if not output.exists():
        for file in files if any(needed.values()) else ():
            _require_columns(file, needed, options)
        _tokenize(files, model, output, options, is_main)
    # As old as its counts: made of the same ones again, it is the same corpus.
    changed = max(state["changed_ns"] for state in states)
    os.utime(output, ns=(changed, changed))
    return output


def _open(path: Path, options: CountsOptions) -> "CountsFile":
    from geneformer_pretrain.tokenization.counts import open_counts

    return open_counts(
        path,
        gene_id_column=options.gene_id_column,
        layer=options.layer,
        raw=options.raw,
        allow_noninteger=options.allow_noninteger,
    )


def _require_columns(path: Path, needed: Mapping[str, str | None], options: CountsOptions) -> None:
    """Raise DataError, naming the file and the option, if a column of the cells is not there."""
    with _open(path, options) as counts:
        known = ["cell_id", *(name for name in counts.obs_columns if name != "cell_id")]
        for option, name in needed.items():
            if name is not None and name not in known:
                raise DataError(f"{path}: no column {name!r} ({option}); it has: {', '.join(known)}.")


def _tokenize(files: Sequence[Path], model: Model, output: Path, options: CountsOptions, is_main: bool) -> None:
    """Tokenize counts into one parquet file, with ids and all columns of the cells."""
    from geneformer_pretrain.tokenization.repeated_ids import find_repeated_ids
    from geneformer_pretrain.tokenization.tokenizer import Tally, describe_left_out, tokenize_blocks

    writer: pq.ParquetWriter | None = None
    tally = Tally()
    with replacing(output) as temporary, Progress(None, "tokenize", "cell", enabled=is_main) as progress:
        try:
            for path in files:
                with _open(path, options) as counts:
                    for block in tokenize_blocks(
                        counts,
                        model.gene_set,
                        n_counts_column=options.n_counts_column,
                        filter_column=options.filter_column,
                        columns=counts.obs_columns,
                        min_genes=options.min_genes,
                        allow_low_match=options.allow_low_match,
                    ):
                        table = _table_of(block)
                        if writer is None:
                            writer = pq.ParquetWriter(temporary, table.schema)
                        elif set(table.column_names) == set(writer.schema.names):
                            table = table.select(writer.schema.names)
                        try:
                            writer.write_table(table.cast(writer.schema))
                        except (pa.ArrowException, ValueError) as error:
                            raise DataError(
                                f"{path}: its obs columns differ from earlier files' ({error}); make them alike."
                            ) from error
                        tally += block.tally
                        progress.advance(len(table))
        finally:
            if writer is not None:
                writer.close()
        left_out = describe_left_out(tally.left_out)
        if not tally.kept:
            why = f"no cell is left of {tally.cells:,} ({left_out})" if tally.cells else "no cells"
            raise DataError(f"{', '.join(map(str, files))}: {why}.")
        repeated = find_repeated_ids([temporary], tally.kept)
    if repeated is not None and is_main:
        say(repeated.describe("tell cells apart by their number, the column `cell`"), error=True)
    if left_out and is_main:
        out = tally.cells - tally.kept
        say(f"{out:,} of {amount(tally.cells, 'cell')} {'is' if out == 1 else 'are'} left out: {left_out}.")


def _table_of(block: Any) -> pa.Table:
    """A block of tokenized cells as rows of a corpus."""
    offsets = pa.array(block.offsets - block.offsets[0], pa.int32())
    tokens = pa.ListArray.from_arrays(offsets, pa.array(block.tokens))
    table = pa.table({"input_ids": tokens, "cell_id": pa.array(block.cell_ids, pa.string())})
    for field, column in zip(block.columns.schema, block.columns.columns, strict=True):
        if field.name in table.column_names or field.name in TOKEN_COLUMNS:
            continue
        if pa.types.is_dictionary(field.type):  # categories differ between files
            column = pc.cast(column, field.type.value_type)
        table = table.append_column(field.name, column)
    return table
