"""Columns of cells and genes, read by ranges of rows: AnnData's `obs` and `var` in every encoding it has had."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_pretrain.errors import DataError

Reader = Callable[[int, int], pa.Array]
"""Reads rows `first` to `last` of a column."""


@dataclass
class Frame:
    """A table whose columns are read when asked for.

    Attributes
    ----------
    length
        Number of rows.
    index
        Reads the names of the rows.
    columns
        Reader of each column, by name.
    """

    length: int
    index: Reader
    columns: dict[str, Reader] = field(default_factory=dict)


def to_arrow(values: Any) -> pa.Array:
    """Convert a slice of an HDF5 or zarr array, [n]; every kind of string becomes Arrow's string."""
    values = np.asarray(values)
    if values.dtype.kind == "S" or (values.dtype.kind == "O" and len(values) and isinstance(values[0], bytes)):
        return pa.array(values.astype(object), pa.binary()).cast(pa.string())
    if values.dtype.kind in "OTU":
        return pa.array(values.astype(object), pa.string())
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    return pa.array(values)


def array_reader(array: Any) -> Reader:
    """Read a column that is one array."""
    return lambda first, last: to_arrow(array[first:last])


def read_frame(node: Any, uns: Any, where: str) -> Frame:
    """Read an AnnData `obs` or `var`.

    Parameters
    ----------
    node
        Group (AnnData 0.7 and later) or compound dataset (before) of h5py or zarr.
    uns
        The file's `uns` group or None: before AnnData 0.7 it held the categories.
    where
        File and name of the frame, for errors.
    """
    if not hasattr(node, "keys"):
        if node.dtype.names is None:
            raise DataError(
                f"{where} is no table, as anndata leaves it when a column has no name; name that column, and write the "
                "file anew."
            )
        return _compound_frame(node, uns)
    index = node.attrs.get("_index", "_index")
    if index not in node:
        raise DataError(f"{where}: the column of names, {index!r}, is missing; write the file anew with anndata.")
    old_categories = node.get("__categories", {})
    in_order = [name for name in map(str, node.attrs.get("column-order", ())) if name in node]
    others = {index, "__categories", *(name.partition("/")[0] for name in in_order if "/" in name)}
    columns = {
        name: _reader(node[name], old_categories.get(name), f"{where}[{name!r}]")
        for name in dict.fromkeys([*in_order, *node])
        if name not in others
    }
    names = _reader(node[index], None, f"{where}[{index!r}]")
    return Frame(_length(node[index]), names, columns)


def _length(node: Any) -> int:
    array = node if not hasattr(node, "keys") else node["codes" if "codes" in node else "values"]
    return int(array.shape[0])


def _reader(node: Any, categories: Any, where: str) -> Reader:
    if not hasattr(node, "keys"):
        if categories is not None:
            return _categorical(node, categories)
        return array_reader(node)
    if "codes" in node and "categories" in node:
        return _categorical(node["codes"], node["categories"])
    if "values" in node and "mask" in node:
        return partial(_nullable, node["values"], node["mask"])

    def refuse(first: int, last: int) -> pa.Array:
        encoding = node.attrs.get("encoding-type", "unknown")
        raise DataError(f"{where}: cannot read a column of encoding {encoding!r}; convert it to strings or numbers.")

    return refuse


def _categorical(codes: Any, categories: Any, name: str | None = None) -> Reader:
    """Read a column of categories as their values; `name` is the codes' field in a compound dataset."""

    @cache  # the categories are read once, when a first range of rows is
    def values() -> pa.Array:
        return to_arrow(categories[:])

    def read(first: int, last: int) -> pa.Array:
        rows = codes[first:last]
        chosen = np.asarray(rows if name is None else rows[name]).astype(np.int64)
        return values().take(pa.array(chosen, mask=chosen < 0))

    return read


def _nullable(values: Any, mask: Any, first: int, last: int) -> pa.Array:
    kept = to_arrow(values[first:last])
    return pa.compute.if_else(pa.array(np.asarray(mask[first:last], bool)), pa.scalar(None, kept.type), kept)


def _compound_frame(dataset: Any, uns: Any) -> Frame:
    """Frame of a compound dataset; categories lie in `uns` as NAME_categories."""
    names = list(dataset.dtype.names)
    index = "index" if "index" in names else names[0]

    def reader(name: str) -> Reader:
        key = f"{name}_categories"
        if uns is not None and key in uns and uns[key].shape and dataset.dtype[name].kind in "iu":
            return _categorical(dataset, uns[key], name)
        return lambda first, last: to_arrow(dataset[first:last][name])

    columns = {name: reader(name) for name in names if name != index}
    return Frame(int(dataset.shape[0]), lambda first, last: to_arrow(dataset[first:last][index]), columns)


def gene_ids(frame: Frame, column: str, where: str) -> np.ndarray:
    """Read the gene ids of a `var` frame, [genes] of str; a missing one is the empty string.

    Parameters
    ----------
    column
        Name of a column, or "index" for the names of the genes.

    Raises
    ------
    DataError
        If there is no such column, or it holds no ids.
    """
    if column not in frame.columns and column != "index":
        have = ", ".join(frame.columns) or "none"
        raise DataError(
            f"{where} has no column {column!r} of gene ids; it has: {have}. Name one with --gene-id-column, "
            f"or --gene-id-column index for the names of the genes ({_examples(frame.index(0, min(3, frame.length)))})."
        )
    read = frame.columns.get(column, frame.index)
    values = read(0, frame.length)
    text = pa.types.is_string(values.type)
    if not text or (len(values) and all(value is None or value.isdigit() or not value for value in values.to_pylist())):
        raise DataError(
            f"{where}[{column!r}] holds no gene ids but {_examples(values[:3])}; name another column with "
            f"--gene-id-column. There are: {', '.join(['index', *frame.columns])}."
        )
    return np.array(values.fill_null("").to_pylist(), dtype=np.str_)


def _examples(values: pa.Array) -> str:
    return ", ".join(str(value) for value in values.to_pylist()) or "nothing"
