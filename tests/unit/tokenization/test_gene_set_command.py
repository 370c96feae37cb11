"""The command `gene-set`, from the command line to what it prints and writes."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from geneformer_pretrain import cli
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.unit.tokenization.memory_counts import MemoryCounts, ensembl, random_matrix

pytestmark = pytest.mark.process

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `gene-set` in a folder of its own and return what it prints; `error=True` if it is to fail in one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, error: bool = False) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(["gene-set", *arguments])
        printed = capsys.readouterr()
        assert end.value.code == int(error), printed.err
        if error:
            assert printed.err.startswith("Error: ")
            assert printed.err.count("\n") == 1
            return printed.err
        return printed.out

    return run


@pytest.fixture
def files() -> dict[str, MemoryCounts]:
    """Three files in memory."""
    return {
        f"{number}.h5ad": MemoryCounts(
            Path(f"{number}.h5ad"), random_matrix(50, 12, number), ensembl(range(number, number + 12))
        )
        for number in range(3)
    }


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, files: dict[str, MemoryCounts]) -> dict[str, Any]:
    """Options that `open_counts` was called with, to open one of the files."""
    options: dict[str, Any] = {}

    def open_counts(path: Path, **given: Any) -> MemoryCounts:
        options.update(given)
        return files[str(path)]

    module = ModuleType("counts")
    module.find_counts = lambda paths: [Path(path) for path in paths]  # type: ignore[attr-defined]
    module.open_counts = open_counts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "geneformer_pretrain.tokenization.counts", module)
    return options


def write_dictionaries(folder: Path) -> list[str]:
    (folder / "tokens.pkl").write_bytes(pickle.dumps({"<pad>": 0, "<mask>": 1, "ENSG1": 2, "ENSG2": 3}))
    (folder / "medians.json").write_text('{"ENSG1": 2.0, "ENSG7": 1.0}')
    (folder / "names.json").write_text('{"ONE": "ENSG1"}')
    return ["--token-dictionary", "tokens.pkl", "--gene-medians", "medians.json", "--gene-names", "names.json"]


def test_import_show_and_export(run: Run, tmp_path: Path) -> None:
    files = write_dictionaries(tmp_path)
    printed = run("import", *files, "--output", "genes", "--species", "Homo sapiens", "--report", "report.json")
    assert "genes: gene set genes, species Homo sapiens\n  4 tokens: 2 genes, <pad> 0, <mask> 1\n" in printed
    assert "genes without a median, which give no tokens: 1" in printed
    assert "medians of genes without a token, left out: 1" in printed
    report = json.loads(Path("report.json").read_text())
    assert report["fingerprint"] == GeneSet.load("genes").fingerprint
    assert (report["genes"], report["medians_without_token"], report["origin"]["names"]) == (2, 1, "names.json")

    assert run("show", "genes", "--tsv", "genes.tsv") == printed[: printed.index("  medians of genes without a token")]
    rows = [line.split("\t") for line in Path("genes.tsv").read_text().splitlines()]
    assert rows[0] == ["token_id", "token", "kind", "symbol", "median"]
    assert rows[3:] == [["2", "ENSG1", "gene", "ONE", "2.0"], ["3", "ENSG2", "gene", "", ""]]
    assert "genes.tsv" in run("show", "genes", "--tsv", "genes.tsv", error=True)
    run("show", "genes", "--tsv", "new/genes.tsv")
    assert Path("new/genes.tsv").read_text() == Path("genes.tsv").read_text()
    assert run("build", "--merge", "none.parquet", "--output", "merged", error=True) == (
        "Error: none.parquet: no such file.\n"
    )
    assert "genes: not overwritten, for it is no earlier output" in run(
        "export", "genes", "--output", "genes", "--overwrite", error=True
    )

    assert "genes without a median: 1; Geneformer's own tokenizer raises a KeyError" in run(
        "export", "genes", "--output", "dictionaries"
    )
    assert pickle.loads(Path("dictionaries/gene_median_dictionary.pkl").read_bytes()) == {"ENSG1": 2.0}


def test_outputs_that_exist_are_refused_before_any_work(run: Run, counts: dict[str, Any]) -> None:
    Path("out").mkdir()
    for arguments in (
        ["import", "--token-dictionary", "none", "--gene-medians", "none"],
        ["build", "0.h5ad"],
        ["build", "0.h5ad", "--partial"],
    ):
        assert "out: this output exists already" in run(*arguments, "--output", "out", error=True)


def test_build(run: Run, counts: dict[str, Any]) -> None:
    printed = run("build", "0.h5ad", "1.h5ad", "2.h5ad", "--output", "genes", "--special-tokens", "v2", "--raw")
    assert "18 tokens: 14 genes, <pad> 0, <mask> 1, <cls> 2, <eos> 3" in printed
    assert "medians within 0.5%, of 1" in printed
    assert "these genes hold 100.0% of the counts" in printed
    assert counts == {"gene_id_column": "ensembl_id", "layer": None, "raw": True, "allow_noninteger": False}
    exact = run("build", "0.h5ad", "1.h5ad", "2.h5ad", "--exact", "--special-tokens", "v2", "--output", "exact")
    assert "medians exact, of 1" in exact
    estimated, exactly = (GeneSet.load(folder).medians for folder in ("genes", "exact"))
    np.testing.assert_allclose(estimated, exactly, rtol=0.005)
    assert not np.array_equal(estimated, exactly, equal_nan=True)


def test_shares_are_those_of_the_genes_that_are_left(run: Run, counts: dict[str, Any]) -> None:
    printed = run("build", "0.h5ad", "1.h5ad", "--min-cells", "30", "--output", "genes", "--report", "report.json")
    dense, cells = np.zeros(13), np.zeros(13)
    for number in range(2):
        matrix = random_matrix(50, 12, number).toarray()
        dense[number : number + 12] += matrix.sum(axis=0)
        cells[number : number + 12] += (matrix > 0).sum(axis=0)
    left = cells >= 30
    assert 0 < left.sum() < 13
    share = dense[left].sum() / dense.sum()
    left_out = f"left out, with counts in fewer than 30 cells: {13 - left.sum()} of 13 genes"
    assert f"these genes hold {share:.1%} of the counts; {left_out}\n" in printed
    assert "matched" not in printed
    assert json.loads(Path("report.json").read_text())["share_of_counts"] == pytest.approx(share)


@pytest.mark.parametrize("finish", [(), ("--partial",), ("--genes", "list.txt")])
def test_genes_with_several_columns_are_named(
    run: Run, counts: dict[str, Any], files: dict[str, MemoryCounts], finish: tuple[str, ...]
) -> None:
    Path("list.txt").write_text("\n".join(ensembl(range(14))))
    assert "several columns" not in run("build", "0.h5ad", "1.h5ad", "--output", "none", *finish)
    files["1.h5ad"].gene_ids[[3, 4]] = files["1.h5ad"].gene_ids[0]
    several = f"  genes with several columns, whose counts are summed: 1 ({ensembl([1])[0]}), 3 columns"
    printed = run("build", "0.h5ad", "1.h5ad", "--output", "genes", *finish)
    assert printed.count(several) == 1
    assert f"{several} of 1.h5ad, the file with the most\n" in printed
    assert f"{several}\n" in run("build", "1.h5ad", "--output", "one", *finish)


def test_a_file_with_ids_of_another_kind_is_named(
    run: Run, counts: dict[str, Any], files: dict[str, MemoryCounts]
) -> None:
    assert "WARNING" not in run("build", "0.h5ad", "1.h5ad", "2.h5ad", "--output", "alike")
    files["1.h5ad"].gene_ids[1:] = [f"Actb{number}" for number in range(11)]
    printed = run("build", "0.h5ad", "1.h5ad", "2.h5ad", "--output", "mixed")
    assert printed.count("WARNING 1.h5ad: the files before it have only 1 of its 12 genes") == 1
    Path("list.txt").write_text("\n".join(ensembl(range(14))))
    chosen = ("--genes", "list.txt", "--allow-low-match")
    assert "WARNING" not in run("build", "0.h5ad", "1.h5ad", "--output", "chosen", *chosen)


def test_partial_results_merge_to_the_same(run: Run, counts: dict[str, Any]) -> None:
    finish = ("--special-tokens", "v2", "--max-tokens", "99", "--min-cells", "9", "--name", "mine", "--species", "fly")
    run("build", "0.h5ad", "1.h5ad", "2.h5ad", "--output", "one", *finish)
    run("build", "2.h5ad", "--partial", "--output", "b.parquet")
    assert "partial result of" in run("build", "--partial", "--output", "a.parquet", "0.h5ad", "1.h5ad")
    run("build", "--merge", "b.parquet", "a.parquet", "--output", "merged", *finish)
    one, merged = GeneSet.load("one"), GeneSet.load("merged")
    assert (merged.fingerprint, merged.species, merged.name) == (one.fingerprint, "fly", "mine")
    assert merged.origin["cells"] == one.origin["cells"]


def test_genes_of_a_list_and_of_a_table(run: Run, counts: dict[str, Any]) -> None:
    ids = ensembl(range(14))
    Path("list.txt").write_text("\n".join(ids[:9]))
    run("build", "0.h5ad", "--genes", "list.txt", "--output", "list")
    assert GeneSet.load("list").tokens[2:] == ids[:9].tolist()
    rows = [f"{gene_id},S{number},{'ab'[number % 6 == 0]}" for number, gene_id in enumerate(ids)]
    Path("table.csv").write_text("\n".join(["gene_id,gene_name,biotype", *rows]))
    run("build", "0.h5ad", "--gene-table", "table.csv", "--biotypes", "a, b", "--output", "all")
    assert GeneSet.load("all").symbols[2:] == [f"S{number}" for number in range(12)]
    run("build", "0.h5ad", "--gene-table", "table.csv", "--biotypes", "a", "--output", "some")
    assert GeneSet.load("some").vocab_size == 12
    refused = run("build", "0.h5ad", "--gene-table", "table.csv", "--biotypes", "b", "--output", "few", error=True)
    assert "--allow-low-match" in refused
    assert not Path("few").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name COUNTS to read, or partial results with --merge"),
        (["a", "--merge", "b"], "name no COUNTS beside it"),
        (["--merge", "b", "--raw"], "--raw was decided when the partial results were made"),
        (["--merge", "b", "--genes", "c"], "--genes was decided"),
        (["--merge", "b", "--gene-id-column", "index"], "--gene-id-column was decided"),
        (["a", "--partial", "--min-cells", "3"], "--min-cells is decided when partial results are merged"),
        (["a", "--partial", "--exact"], "not allowed with argument"),
        (["a", "--biotypes", "miRNA"], "--biotypes needs a --gene-table"),
        (["a", "--min-cells", "-1"], "--min-cells -1 is negative"),
        (["a", "--raw", "--layer", "b"], "not allowed with argument"),
    ],
)
def test_options_that_would_do_nothing_are_refused(run: Run, arguments: list[str], message: str) -> None:
    assert message in run("build", "--output", "genes", *arguments, error=True)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "pyarrow", "numba", "torch", "anndata")
    script = (
        "import sys\nfrom geneformer_pretrain import cli\n"
        "try:\n    cli.main(['gene-set', 'build', '--help'])\n"
        f"finally:\n    print('loaded', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--merge" in done.stdout
    assert done.stdout.endswith("loaded []\n")
