"""Lists and tables of genes: CSV, TSV, GTF, and what is neither."""

import gzip
from pathlib import Path

import pytest

from geneformer_pretrain.errors import DataError
from geneformer_pretrain.tokenization.gene_table import GeneTable, read_gene_list, read_gene_table

GTF = (
    "#!genome-build GRCm39\n"
    '1\thavana\tgene\t1\t9\t.\t+\t.\tgene_id "ENSMUSG00000000001"; gene_version "5"; gene_name "Gnai3"; '
    'gene_biotype "protein_coding";\n'
    '1\thavana\ttranscript\t1\t9\t.\t+\t.\tgene_id "ENSMUSG00000000002"; gene_biotype "protein_coding";\n'
    '1\tHAVANA\tgene\t1\t9\t.\t+\t.\tgene_id "ENSMUSG00000000003.16"; gene_type "lncRNA"; gene_name "Pbsn";\n'
)


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "# mine\nENSG00000000003.15\n\n ensg00000000005 \r\nWBGene1\nENSG00000000003\n")
    assert read_gene_list(path).gene_ids == ["ENSG00000000003", "ENSG00000000005", "WBGene1"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_the_mark_that_spreadsheets_begin_with(tmp_path: Path, name: str) -> None:
    assert read_gene_list(write(tmp_path / name, "\ufeffWBGene1\r\nWBGene2\r\n")).gene_ids == ["WBGene1", "WBGene2"]
    table = read_gene_table(write(tmp_path / name, "\ufeffgene_id,symbol\r\nWBGene1,a\r\n"))
    assert table == GeneTable(["WBGene1"], ["a"])


def test_damaged_compression_and_a_quote_that_is_not_closed(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b"".join(b"WBGene%d\n" % number for number in range(9000))))
    content[2000:2100] = bytes(100)
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.gz is not a text in UTF-8, or its compression is damaged"):
        read_gene_list(tmp_path / "a.gz")
    path = write(tmp_path / "a.csv", 'gene_id,symbol\nWBGene1,a\nWBGene2,"' + "b\n" * 100_000)
    with pytest.raises(DataError, match=r"a\.csv, row 3: field larger than field limit .*; correct the row"):
        read_gene_table(path)


@pytest.mark.parametrize(
    ("text", "message"), [("ENSG1\nENSG2,TP53\n", "line 2: 'ENSG2,TP53' is more than"), ("# no\n", "holds no gene ids")]
)
def test_what_is_no_list(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_gene_list(write(tmp_path / "a.txt", text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'gene_id,gene_name,biotype\nENSMUSG1.5,Gnai3,protein_coding\n"ENSMUSG3",,"lncRNA"\n'),
        ("a.tsv", "Gene type\tGene stable ID\tGene name\nprotein_coding\tENSMUSG1\tGnai3\nlncRNA\tENSMUSG3\t\n"),
        ("a.csv.gz", "ENSMUSG1,Gnai3,5,1396,protein_coding\nENSMUSG3,,,1227,lncRNA\n"),
        ("a.tsv.gz", "ensembl_id\tsymbol\tfeature_type\nensmusg1\tGnai3\tprotein_coding\nENSMUSG3.2\t\tlncRNA\n"),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    assert read_gene_table(path) == GeneTable(["ENSMUSG1", "ENSMUSG3"], ["Gnai3", None])
    assert read_gene_table(path, ["protein_coding"]) == GeneTable(["ENSMUSG1"], ["Gnai3"])
    with pytest.raises(DataError, match=r"no gene has the biotype miRNA; there are: .*protein_coding \(1\)"):
        read_gene_table(path, ["protein_coding", "miRNA"])


@pytest.mark.parametrize("name", ["a.gtf", "a.gtf.gz"])
def test_a_gtf(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GTF)
    ids = ["ENSMUSG00000000001", "ENSMUSG00000000003"]
    assert read_gene_table(path) == GeneTable(ids, ["Gnai3", "Pbsn"])
    assert read_gene_table(path, ["lncRNA"]) == GeneTable(ids[1:], ["Pbsn"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,biotype\nA,b\n", "no column of gene ids; the header is 'name, biotype'"),
        ("gene_id,biotype\nA\n", "row 2: 1 field, the header has 2"),
        ("", "no column of gene ids"),
        ("gene_id,biotype\n", "holds no genes"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_gene_table(write(tmp_path / "a.csv", text))


def test_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"gene_id\nENSG1\n")[:-4])
    with pytest.raises(DataError, match="compression is damaged"):
        read_gene_table(tmp_path / "a.csv.gz")
