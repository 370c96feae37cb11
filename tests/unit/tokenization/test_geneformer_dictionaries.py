"""Geneformer's dictionaries are read without running what a pickle asks for, and written as their tools read them."""

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_set import GeneSet
from geneformer_pretrain.tokenization.geneformer_dictionaries import (
    FILE_NAMES,
    Dictionaries,
    export_dictionaries,
    read_dictionary,
)

TOKENS = {"<pad>": 0, "<mask>": 1, "ENSG1": np.int16(2), "ENSG2": np.int16(3), "ENSG3": np.int64(4)}
MEDIANS = {"ENSG1": np.float64(2.5), "ENSG2": np.float32(0.5), "ENSG9": 1.0}


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_with_numbers_of_numpy(tmp_path: Path, protocol: int) -> None:
    values = {
        **TOKENS,
        **{np.dtype(code).name: np.dtype(code).type(7) for code in ("u1", "i2", "u4", "i8", "f2", "f4", "f8")},
        "text": "ENSG1",
        "negative": np.int16(-3),
        "float": np.float64(0.1),
    }
    read = read_dictionary(write(tmp_path / "a.pkl", values, protocol))
    assert read == values
    assert {type(value) for value in read.values()} <= {int, float, str}


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_pickles_of_numpy_1_and_2(tmp_path: Path, module: bytes) -> None:
    content = pickle.dumps({"a": np.float64(0.25), "b": np.dtype(">f8").type(0.5)}, protocol=4)
    name = b"\x8c" + bytes([len(b"numpy._core.multiarray")]) + b"numpy._core.multiarray"
    assert name in content
    path = tmp_path / "a.pkl"
    path.write_bytes(content.replace(name, b"\x8c" + bytes([len(module)]) + module).replace(content[2:11], b"", 1))
    assert read_dictionary(path) == {"a": 0.25, "b": 0.5}


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch proof",)


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": Shell()}, "posix.system"),
        ({"a": Evaluated()}, "builtins.eval"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (collections.defaultdict(int, a=1), "collections.defaultdict"),
        ({"a": np.array([1.0])}, r"numpy\._core\.\w+\._\w+"),
        ({"a": Path("x")}, r"pathlib.*\.PosixPath"),
        ({"a": {1}}, "an entry is a str with a set"),
        ({"a": 1j}, "builtins.complex"),
        ({"a": np.complex128(1j)}, "numpy values that are not numbers"),
        ({"a": np.str_("x")}, "numpy values that are not numbers"),
        ({"a": np.datetime64("2020-01-01")}, "numpy values that are not numbers"),
        ({"a": [1]}, "an entry is a str with a list"),
        ({"a": None}, "an entry is a str with a NoneType"),
        ({1: "a"}, "an entry is a int with a str"),
        ([1, 2], "holds a list, not a dictionary"),
    ],
)
def test_anything_else_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"a\.pkl.*{named}"):
        read_dictionary(write(tmp_path / "a.pkl", content))
    assert not (tmp_path / "proof").exists()


def test_a_hidden_object_inside_a_number_is_refused(tmp_path: Path) -> None:
    """`scalar(dtype, anything)` of numpy itself would interpret objects; here it reads the bytes of one number."""
    content = pickle.dumps({"a": np.float64(1)}, protocol=4)
    path = tmp_path / "a.pkl"
    path.write_bytes(content.replace(b"f8", b"O8"))
    with pytest.raises(DataError, match="not numbers"):
        read_dictionary(path)


@pytest.mark.parametrize("cut", range(0, 150, 7))
def test_a_truncated_pickle_is_an_error_of_the_user(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(MEDIANS)[:cut])
    with pytest.raises(DataError, match=r"a\.pkl"):
        read_dictionary(path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(' \n{"a": 1, "b": 0.5}')
    assert read_dictionary(path) == {"a": 1, "b": 0.5}
    path.write_text('{"a": 1, "b": 2, "a": 3}')
    with pytest.raises(DataError, match=r"a\.json: a is there twice"):
        read_dictionary(path)
    path.write_text('{"a": 1')
    with pytest.raises(DataError, match="not a pickle or JSON"):
        read_dictionary(path)


def make(**changes: Any) -> GeneSet:
    tokens = {token: int(place) for token, place in TOKENS.items()}
    plain = {"tokens": tokens, "medians": {"ENSG1": 2.5, "ENSG2": 0.5, "ENSG9": 1.0}} | changes
    return Dictionaries(**plain).to_gene_set(name="test", origin={})


def test_json_as_windows_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"ENSG1": 2}\r\n')
    assert read_dictionary(tmp_path / "a.json") == {"ENSG1": 2}


def test_an_empty_dictionary_is_refused() -> None:
    with pytest.raises(DataError, match="token dictionary: it is empty"):
        Dictionaries({}, {}).to_gene_set(name="none", origin={})


def test_a_gene_set_of_dictionaries() -> None:
    gene_set = make(
        names={"ONE": "ENSG1", "UNO": "ENSG1", "TWO": "OLD2", "NINE": "ENSG9"},
        mapping={"ENSG1": "ENSG1", "OLD2": "ENSG2", "OLD9": "ENSG9", "OLDPAD": "<pad>"},
    )
    assert gene_set.tokens == list(TOKENS)
    np.testing.assert_array_equal(gene_set.medians, [np.nan, np.nan, 2.5, 0.5, np.nan])
    assert gene_set.symbols == [None, None, "ONE", "TWO", None]
    assert gene_set.aliases == {"OLD2": "ENSG2", "UNO": "ENSG1"}
    assert (gene_set.max_tokens, gene_set.special_tokens) == (2048, {"pad": 0, "mask": 1})


def test_dictionaries_with_cls_are_those_of_v2() -> None:
    gene_set = make(tokens={"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG1": 4})
    assert (gene_set.max_tokens, gene_set.num_added_tokens) == (4096, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"<pad>": 0, "<mask>": 1, "ENSG1": 3}}, "no token has the id 2"),
        ({"tokens": {"<pad>": 0, "<mask>": 1, "ENSG1": 1}}, "<mask> and ENSG1 have the same id, 1"),
        ({"medians": {"ENSG1": 0.0}}, r"ENSG1 has the median 0\.0"),
        ({"medians": {"ENSG1": float("nan")}}, "ENSG1 has the median nan"),
        ({"medians": {"ENSG1": "2"}}, "ENSG1 has the median '2'"),
        ({"medians": {"ENSMUSG1": 1.0}}, "do not belong together"),
        ({"names": {"ENSG1": "ONE"}}, r"must be \{symbol: gene id\}"),
    ],
)
def test_dictionaries_that_cannot_be_right_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(**changes)


def test_token_ids_are_whole_numbers() -> None:
    with pytest.raises(DataError, match=r"ENSG1 has the id 2\.0"):
        Dictionaries({"<pad>": 0, "<mask>": 1, "ENSG1": 2.0}, {"ENSG1": 1.0}).to_gene_set(name="a", origin={})


@pytest.mark.parametrize("suffix", ["pkl", "json"])
def test_export_is_read_by_plain_pickle_and_comes_back_as_it_was(tmp_path: Path, suffix: str) -> None:
    gene_set = make(names={"ONE": "ENSG1"}, mapping={"old2": "ENSG2"})
    files = export_dictionaries(gene_set, tmp_path / "out")
    assert {file.stem for file in files} == set(FILE_NAMES.values())
    plain = {
        attribute: json.loads((tmp_path / "out" / f"{name}.json").read_text())
        if suffix == "json"
        else pickle.loads((tmp_path / "out" / f"{name}.pkl").read_bytes())
        for attribute, name in FILE_NAMES.items()
    }
    assert plain["tokens"] == {token: int(place) for token, place in TOKENS.items()}
    assert plain["medians"] == {"ENSG1": 2.5, "ENSG2": 0.5}
    assert plain["names"] == {"ONE": "ENSG1"}
    assert plain["mapping"] == {"ENSG1": "ENSG1", "ENSG2": "ENSG2", "ENSG3": "ENSG3", "OLD2": "ENSG2"}
    again = {
        attribute: read_dictionary(tmp_path / "out" / f"{name}.{suffix}") for attribute, name in FILE_NAMES.items()
    }
    assert Dictionaries(**again).to_gene_set(name="again", origin={}).fingerprint == gene_set.fingerprint
