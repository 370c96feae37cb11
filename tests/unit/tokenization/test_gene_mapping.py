"""Genes of a new gene set find their rows in a model's."""

from pathlib import Path

import numpy as np
import pytest

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_mapping import match_tokens, read_mapping
from geneformer_pretrain.tokenization.gene_set import SPECIAL_TOKENS, GeneSet

HUMAN = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]


def gene_set(genes: list[str], special: str = "v1", symbols: list[str | None] | None = None) -> GeneSet:
    first = SPECIAL_TOKENS[special]
    medians = np.array([*(np.nan for _ in first), *(1.0 for _ in genes)])
    return GeneSet("a", None, [*first, *genes], [*(None for _ in first), *(symbols or [None] * len(genes))], medians, 9)


def test_by_id_with_special_tokens_by_name() -> None:
    match = match_tokens(gene_set(["ENSG9", "ENSG3.4", "ensg1"], "v2"), gene_set(HUMAN))
    assert match.old_token.tolist() == [0, 1, -1, -1, -1, 4, 2]
    assert match.old_token.dtype == np.int32
    assert (match.special_tokens, match.by_id, match.by_table, match.unmatched) == (2, 2, 0, 3)
    assert match.lines()[0].startswith("4 of 7 tokens are known to the model: 2 genes by id, 0 through the table, 2")
    assert "for example ENSG9" in match.lines()[1]


def test_through_a_table_of_orthologs(tmp_path: Path) -> None:
    path = tmp_path / "orthologs.tsv"
    path.write_text(
        "mouse\thuman\n# comment\nENSMUSG1\tENSG1.2\nENSMUSG2\tENSG1\nENSMUSG3\tENSG3\nENSMUSG3\tENSG4\n"
        "ENSMUSG4\tENSG4\nENSMUSG4\tENSG99\nENSMUSG5\tENSG99\nENSG2\tENSG99\nENSG4\tENSG1\nENSG4\tENSG2\n"
    )
    new = gene_set([*(f"ENSMUSG{number}" for number in range(1, 7)), "ENSG2", "ENSG4"])
    match = match_tokens(new, gene_set(HUMAN), read_mapping(path))
    # 1 and 2 share a gene, 3 has two, 4 one that is known, 5 an unknown one, 6 none; ENSG2 and ENSG4 are there
    assert match.old_token.tolist() == [0, 1, 2, 2, -1, 5, -1, -1, 3, 5]
    assert (match.by_table, match.by_id, match.ambiguous, match.shared) == (3, 2, 1, 2)
    assert match.examples == ["ENSMUSG3", "ENSMUSG5", "ENSMUSG6"]


def test_symbols_are_not_compared() -> None:
    with pytest.raises(DataError, match=r"No gene of the gene set is known to the model \(ids such as TP53"):
        match_tokens(gene_set(["TP53"]), gene_set(HUMAN, symbols=["TP53", None, None, None]))


def test_a_table_the_other_way_round_is_named() -> None:
    new = gene_set(["ENSMUSG1"])
    with pytest.raises(DataError, match="the other way round"):
        match_tokens(new, gene_set(HUMAN), {"ENSG1": ["ENSMUSG1"]})
    with pytest.raises(DataError, match="Neither by id nor through the table"):
        match_tokens(new, gene_set(HUMAN), {"ENSMUSG7": ["ENSG1"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [("ENSMUSG1,ENSG1,1.0\n", "row 1: 3 fields"), ("ENSMUSG1\n", "row 1: 1 field;"), ("\n", "holds no pairs")],
)
def test_what_is_no_table_of_two_columns(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_mapping(path)
