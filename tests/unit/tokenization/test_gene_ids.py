"""Ids as files spell them find their genes; what is not certain finds none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_ids import GeneIndex, canonical, describe_summed, without_version

IDS = [None, "ENSG00000000003", "ENSG00000000005", "WBGene00000001", "2L52.1", "ENSG00000000419"]
INDEX = GeneIndex(
    IDS,
    [None, "TSPAN6", "TNMD", "aap-1", "2L52.1", "TNMD"],
    {"ENSG00000999999": "ENSG00000000003", "OLD1": "ENSG00000000005"},
)


@pytest.mark.parametrize(
    ("spelling", "place", "way"),
    [
        ("ENSG00000000003", 1, "exact"),
        ("ENSG00000000003.15", 1, "version"),
        ("ensg00000000003", 1, "case"),
        ("Ensg00000000003.2", 1, "case"),
        ("wbgene00000001", 3, "case"),
        ("2L52.1", 4, "exact"),
        ("ENSG00000999999", 1, "alias"),
        ("ensg00000999999.3", 1, "alias"),
        ("old1", 2, "alias"),
        ("TSPAN6", 1, "symbol"),
        ("Tspan6", 1, "symbol"),
        ("TNMD", -1, "ambiguous"),
        ("2L52", -1, "unmatched"),
        ("AC012345.1", -1, "unmatched"),
        ("<pad>", -1, "unmatched"),
        ("", -1, "unmatched"),
    ],
)
def test_spellings(spelling: str, place: int, way: str) -> None:
    assert INDEX.find(spelling) == (place, way)


def test_an_alias_wins_over_an_id_that_is_still_there() -> None:
    assert GeneIndex(["A", "B"], [None, None], {"A": "B"}).find("A") == (1, "alias")


def test_ids_that_differ_in_case_only_are_told_apart_and_a_third_spelling_finds_none() -> None:
    index = GeneIndex(["abc", "ABC"], [None, None], {})
    assert [index.find(name)[0] for name in ("abc", "ABC", "Abc")] == [0, 1, -1]


@given(st.from_regex(r"\A(ENS[A-Z]{0,4}[0-9]{3,11}(\.[0-9]{1,2})?|[A-Za-z0-9.-]{1,12})\Z"))
def test_the_canonical_id_is_stable_and_found(gene_id: str) -> None:
    bare = canonical(gene_id)
    assert canonical(bare) == bare
    assert without_version(bare) == bare or "." not in gene_id
    assert GeneIndex([bare], [None], {}).find(gene_id)[0] == 0


def test_a_report_has_shares_ways_and_both_spellings() -> None:
    match = INDEX.match(np.array(["ENSG00000000003.1", "TSPAN6", "XIST", "NEAT1"]))
    counts = np.array([30.0, 10.0, 20.0, 40.0])
    assert match.token_of_column.tolist() == [1, 1, -1, -1]
    assert match.token_of_column.dtype == np.int32
    assert match.share_of_counts(counts) == 0.4
    text = "\n".join(match.lines(counts))
    assert "2 of 4 genes matched (50.0%), with 40.0% of the counts" in text
    assert "1 by the id without its version" in text
    assert match.summed == {"genes": 1, "columns": 2, "examples": ["ENSG00000000003.1"]}
    assert "for example: NEAT1, XIST" in text  # the one with more counts first
    assert "ENSG00000000003" in text
    assert match.values(counts)["share_of_counts"] == 0.4


def test_genes_with_several_columns_are_counted_and_the_first_named() -> None:
    index = GeneIndex(ids := [f"ENSG{number:011d}" for number in range(9)], [None] * 9, {})
    assert index.match([*ids, "ENSG99", "ENSG99"]).summed is None  # not matched: nothing is summed
    match = index.match([ids[7], *ids[:4], "ENSG99", *ids[:2], ids[3], ids[7].lower(), ids[7]])
    assert match.summed == {"genes": 4, "columns": 9, "examples": [ids[7], ids[0], ids[1]]}
    assert describe_summed(match.summed) == (
        f"genes with several columns, whose counts are summed: 4 ({ids[7]}, {ids[0]}, {ids[1]}, ...), 9 columns"
    )


def test_a_file_of_other_genes_is_refused_with_examples() -> None:
    match = INDEX.match(["ENSMUSG00000000001", "ENSMUSG00000000003"])
    with pytest.raises(DataError, match=r"a\.h5ad: none of its 2 genes.*ENSMUSG00000000001.*ENSG00000000003"):
        match.require("a.h5ad")
    with pytest.raises(DataError, match="none of its 2 genes"):
        match.require("a.h5ad", np.ones(2), allow_low_match=True)


def test_less_than_half_of_the_counts_is_refused_unless_allowed() -> None:
    match = INDEX.match(["ENSG00000000003", "MALAT1"])
    match.require("a.h5ad", np.array([50.0, 50.0]))
    match.require("a.h5ad", np.zeros(2))
    with pytest.raises(DataError, match=r"only 49\.0% of its counts.*MALAT1.*--allow-low-match"):
        match.require("a.h5ad", np.array([49.0, 51.0]))
    match.require("a.h5ad", np.array([49.0, 51.0]), allow_low_match=True)
