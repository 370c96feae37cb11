"""A gene-set folder: what is written is read again, AutoTokenizer loads it, damage and newer formats are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_pretrain.errors import DataError, OutputError
from geneformer_pretrain.tokenization.gene_set import SPECIAL_TOKENS, GeneSet

FINGERPRINT = "abc771a756160d0df65190c8d70b376ef176dbb632f627dbede85f05da188de7"


def small(special: str = "v1", **changes: Any) -> GeneSet:
    tokens = [*SPECIAL_TOKENS[special], "ENSG1", "ENSG2", "gène"]
    medians = np.array([np.nan] * (len(tokens) - 3) + [1.5, np.nan, 0.1])
    symbols = [None] * (len(tokens) - 2) + ["B", None]
    return replace(GeneSet("small", "Homo sapiens", tokens, symbols, medians, 64, {"OLD": "ENSG1"}), **changes)


def assert_same(first: GeneSet, second: GeneSet) -> None:
    for name in ("name", "species", "tokens", "symbols", "max_tokens", "aliases", "target_sum", "origin"):
        assert getattr(first, name) == getattr(second, name), name
    np.testing.assert_array_equal(first.medians, second.medians)
    assert first.fingerprint == second.fingerprint


@settings(max_examples=25, deadline=None)
@given(
    special=st.sampled_from(sorted(SPECIAL_TOKENS)),
    genes=st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=8).filter(
            lambda name: not name.startswith("<") and name.split() == [name]
        ),
        st.tuples(st.none() | st.text(max_size=5), st.just(float("nan")) | st.floats(5e-324, 1e300)),
        min_size=1,
        max_size=8,
    ),
    origin=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
def test_a_saved_gene_set_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    special: str,
    genes: dict[str, tuple[str | None, float]],
    origin: dict[str, int],
) -> None:
    first = SPECIAL_TOKENS[special]
    gene_set = GeneSet(
        name="any",
        species=None,
        tokens=[*first, *genes],
        symbols=[*(None for _ in first), *(symbol for symbol, _ in genes.values())],
        medians=np.array([*(np.nan for _ in first), *(median for _, median in genes.values())]),
        max_tokens=100,
        aliases={"another": next(iter(genes))},
        origin=origin,
    )
    folder = tmp_path_factory.mktemp("genes") / "set"
    gene_set.save(folder)
    assert_same(GeneSet.load(folder), gene_set)


def test_files_of_the_folder(tmp_path: Path) -> None:
    small("v2").save(tmp_path / "genes")
    table = pq.read_table(tmp_path / "genes" / "genes.parquet")
    assert table.schema.names == ["token_id", "token", "kind", "symbol", "median"]
    assert table.schema.types == [pa.int32(), pa.string(), pa.string(), pa.string(), pa.float64()]
    assert table["kind"].to_pylist() == ["special"] * 4 + ["gene"] * 3
    assert table["median"].to_pylist() == [None] * 4 + [1.5, None, 0.1]
    assert pq.read_table(tmp_path / "genes" / "aliases.parquet").to_pylist() == [{"gene_id": "OLD", "token": "ENSG1"}]
    lines = (tmp_path / "genes" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["<pad>", "<mask>", "<cls>", "<eos>", "ENSG1", "ENSG2", "gène"]
    facts = json.loads((tmp_path / "genes" / "gene_set.json").read_text(encoding="utf-8"))
    assert facts["special_tokens"] == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert (facts["format_version"], facts["vocab_size"], facts["max_tokens"]) == (1, 7, 64)


def test_the_fingerprint_is_the_same_on_every_platform_and_release() -> None:
    assert small().fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 65},
        {"target_sum": 10_001},
        {"medians": np.array([np.nan, np.nan, 1.5, np.nan, np.nextafter(0.1, 1)])},
        {"medians": np.array([np.nan, np.nan, 1.5, 2.0, 0.1])},
        {"tokens": ["<pad>", "<mask>", "ENSG2", "ENSG1", "gène"]},
    ],
)
def test_the_fingerprint_follows_what_decides_the_tokens_of_a_cell(change: dict[str, Any]) -> None:
    assert small(**change).fingerprint != small().fingerprint


def test_the_fingerprint_ignores_names_and_the_bits_of_nan() -> None:
    medians = small().medians.copy()
    medians.view(np.uint64)[0] = 0xFFF8_0000_0000_0001
    assert small(name="x", species=None, origin={"a": 1}, aliases={}, medians=medians).fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["<pad>", "<mask>", "A", "A", "B"]}, "The token A is there twice"),
        ({"tokens": ["<pad>", "<mask>", "A", "B c", "D"]}, "Token 3 is 'B c'"),
        ({"tokens": ["<pad>", "<mask>", "A", "", "D"]}, "Token 3 is ''"),
        ({"tokens": ["<pad>", "A", "<mask>", "ENSG1", "D"]}, "<mask> has the id 2; special tokens come before"),
        ({"tokens": ["<pad>", "A", "B", "ENSG1", "D"]}, "no token <mask>"),
        ({"tokens": ["<pad>", "<mask>", "<cls>", "ENSG1", "D"]}, "both <cls> and <eos>"),
        ({"medians": np.array([np.nan, np.nan, 1, 0.0, 1])}, r"Gene ENSG2 has the median 0\.0"),
        ({"medians": np.array([np.nan, np.nan, 1, 1, np.inf])}, "Gene gène has the median inf"),
        ({"aliases": {"OLD": "gone"}}, "alias OLD leads to gone"),
        ({"max_tokens": 0}, "no room for genes"),
    ],
)
def test_what_is_no_gene_set_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(**change)


def test_a_folder_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    small().save(tmp_path / "genes")
    with pytest.raises(OutputError, match="--overwrite"):
        small("v2").save(tmp_path / "genes")
    assert GeneSet.load(tmp_path / "genes").vocab_size == 5
    small("v2").save(tmp_path / "genes", overwrite=True)
    assert GeneSet.load(tmp_path / "genes").vocab_size == 7
    assert [path.name for path in tmp_path.iterdir()] == ["genes"]


def test_files_may_lie_beside_those_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    small().write(tmp_path)
    assert_same(GeneSet.load(tmp_path), small())


def edit_facts(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "gene_set.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))

    return edit


def edit_medians(folder: Path) -> None:
    table = pq.read_table(folder / "genes.parquet")
    changed = table.set_column(4, "median", pa.array([None, None, 1.5, None, 0.2]))
    pq.write_table(changed, folder / "genes.parquet")


def drop_column(folder: Path) -> None:
    pq.write_table(pq.read_table(folder / "genes.parquet").drop_columns("median"), folder / "genes.parquet")


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40]) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "gene_set.json").unlink(),
            "is not a gene-set folder: it has no gene_set.json; `gene-set import` or `gene-set build` makes one",
        ),
        (lambda folder: (folder / "genes.parquet").unlink(), "genes.parquet is missing"),
        (cut("gene_set.json"), "gene_set.json is not the description of a gene set"),
        (cut("genes.parquet"), "genes.parquet is damaged"),
        (drop_column, "genes.parquet is damaged or not a table of a gene set"),
        (edit_medians, "do not belong together"),
        (edit_facts(max_tokens=32), "do not belong together"),
        (edit_facts(format_version=2), "written by a newer release .format 2; this one reads up to 1"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    small().save(tmp_path / "genes")
    damage(tmp_path / "genes")
    with pytest.raises(DataError, match=message):
        GeneSet.load(tmp_path / "genes")


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("special", ["v1", "v2"])
def test_auto_tokenizer_loads_the_folder(tmp_path: Path, special: str, with_model: bool) -> None:
    from transformers import AutoTokenizer, BertConfig

    gene_set = small(special)
    gene_set.write(tmp_path)
    if with_model:
        BertConfig(vocab_size=gene_set.vocab_size).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == gene_set.vocab_size
    assert tokenizer.convert_ids_to_tokens(list(range(gene_set.vocab_size))) == gene_set.tokens
    ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "cls", "eos")]
    assert ids == [gene_set.special_tokens.get(name) for name in ("pad", "mask", "cls", "eos")]
    assert tokenizer.model_max_length == 64
    genes = [gene_set.tokens.index(gene) for gene in ("gène", "ENSG1")]
    framed = [2, *genes, 3] if special == "v2" else genes
    assert tokenizer("gène ENSG1")["input_ids"] == framed
    batch = tokenizer([["gène", "ENSG1"], ["ENSG1"]], is_split_into_words=True, padding=True)
    assert batch["input_ids"][0] == framed
    assert batch["attention_mask"][1][-1] == 0
    with pytest.raises(Exception, match="UNK"):
        tokenizer("ENSG1 no_such_gene")


def test_a_corpus_names_the_gene_set_inside(tmp_path: Path) -> None:
    small().save(tmp_path / "corpus/gene_set")
    with pytest.raises(DataError, match=f"no gene_set.json; name {tmp_path}/corpus/gene_set, that of the corpus"):
        GeneSet.load(tmp_path / "corpus")
