"""Find the files of a corpus, and say what else lies at a path that holds none."""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_pretrain.data.parquet_cells import LOAD_DATASET_CACHE
from geneformer_pretrain.errors import DataError

DESCRIPTION_FILE = "corpus.json"
PLAN_FILE = "tokenize.json"
"""Lies in a corpus folder from the start of `tokenize`; ``corpus.json`` follows at its end."""
FORMAT_VERSION = 1

REMOTE = {
    "s3": "aws s3 sync {path} FOLDER",
    "gs": "gcloud storage cp -r {path} FOLDER",
    "hf": "hf download --repo-type dataset REPOSITORY --local-dir FOLDER",
}
"""Commands that copy from a remote address, by its scheme."""


@dataclass(frozen=True)
class CorpusGeneSet:
    """The gene set that a corpus was tokenized with, as far as its ``corpus.json`` describes it."""

    name: str
    fingerprint: str
    vocab_size: int
    special_tokens: dict[str, int]
    max_tokens: int


@dataclass(frozen=True)
class CorpusDescription:
    """Content of ``corpus.json``.

    Attributes
    ----------
    gene_set
        Gene set of the tokens.
    parts
        Parquet files, in the order of their cells.
    content
        The whole file.
    """

    gene_set: CorpusGeneSet
    parts: list[Path]
    content: dict[str, Any]


def read_description(folder: Path) -> CorpusDescription | None:
    """Read the ``corpus.json`` of a corpus folder; None if there is none.

    Raises
    ------
    DataError
        If it is not there yet, cannot be read, was written by a newer release, or lists a part that is missing.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        if (folder / PLAN_FILE).is_file():
            raise DataError(
                f"{folder}: an unfinished corpus; start the same `tokenize` command again, which goes on with it"
            )
        return None
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        if version > FORMAT_VERSION:
            raise DataError(
                f"{path}: written by a newer release (format {version}; this one reads up to {FORMAT_VERSION}); "
                "install that release"
            )
        gene_set = CorpusGeneSet(**{name: content["gene_set"][name] for name in CorpusGeneSet.__dataclass_fields__})
        parts = [folder / part["file"] for part in content["parts"]]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not as `tokenize` writes it ({error!r}); tokenize the cells again") from error
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {missing[0]} is missing{f' ({len(missing)} parts in all)' if len(missing) > 1 else ''}, which "
            f"{DESCRIPTION_FILE} lists; copy the folder again, or tokenize again"
        )
    return CorpusDescription(gene_set, parts, content)


def read_description_beside(files: Sequence[Path]) -> CorpusDescription | None:
    """Read the ``corpus.json`` of the folder in which all files lie; None if there is none, or they lie in several.

    Raises
    ------
    DataError
        As `read_description`.
    """
    return read_description(files[0].parent) if len({file.parent for file in files}) == 1 else None


def find_parquet(path: str | Path) -> list[Path]:
    """Find the parquet files of a corpus, in the order of their cells.

    Hidden files and those that start with an underscore, as Spark's ``_SUCCESS``, are none. A folder with partitions
    (``tissue=lung/...``) is searched below.

    Raises
    ------
    DataError
        If there are none; names what is there instead, and the remedy.
    """
    text, location = str(path), Path(path)
    if not location.exists():
        _refuse_other_than_a_path(text)
    if location.is_file():
        return [location]
    if location.is_dir():
        return _find_in_folder(location)
    if not glob.has_magic(text):
        raise DataError(f"{location}: no such file or folder; correct the path")
    files = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if os.path.isfile(name)]
    if not files:
        raise DataError(f"{location}: the pattern matches no file; correct the path")
    return files


def _refuse_other_than_a_path(text: str) -> None:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://?", text)
    if scheme:
        text = f"{scheme[1]}://{text[scheme.end() :]}"  # pathlib drops a slash
        command = REMOTE.get(scheme[1].lower())
        how = f", for instance with `{command.format(path=text)}`," if command else ""
        raise DataError(
            f"{text}: a remote address ({scheme[1]}), which is not read directly, since cells are read in random order "
            f"many times; copy it to a local or shared disk{how} and give that folder"
        )
    if "," in text and not glob.has_magic(text):
        raise DataError(
            f"{text}: looks like a list of paths, and one is expected; put the files (or links to them) into one "
            "folder and give that, or give a pattern such as 'FOLDER/*.parquet'"
        )


def _find_in_folder(folder: Path) -> list[Path]:
    files = sorted(child for child in folder.glob("*.parquet") if not child.name.startswith((".", "_")))
    below = f"for parquet files in folders below it, give {folder}/**/*.parquet"
    if not files and any(child.is_dir() for child in folder.glob("*=*")):
        files = sorted(file for file in folder.rglob("*.parquet") if _is_part_of_partition(file.relative_to(folder)))
    if not files:
        if (folder / "dataset_info.json").is_file() or any(folder.glob("*/*/*/dataset_info.json")):
            raise DataError(f"{folder}: {LOAD_DATASET_CACHE}")
        if any(folder.glob("*.arrow")):
            raise DataError(
                f"{folder}: holds Arrow files but no state.json, which save_to_disk writes beside them; copy the "
                "whole folder, or save the dataset again"
            )
        raise DataError(f"{folder}: holds neither *.parquet files nor a dataset saved with save_to_disk; {below}")
    if folder / "genes.parquet" in files and (folder / "gene_set.json").is_file():
        raise DataError(f"{folder}: holds a gene set and no cells; name a corpus, a folder that `tokenize` wrote")
    inner = next((file for file in files if file.is_dir()), None)
    if inner is not None:
        raise DataError(f"{folder}: {inner.name} in it is a folder, not a file; {below}")
    return files


def _is_part_of_partition(path: Path) -> bool:
    return "=" in path.parts[0] and not any(part.startswith((".", "_")) for part in path.parts)
