"""Corpora: their parts, the same bytes whoever makes them, going on, shards, and what is refused."""

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain import cli
from geneformer_pretrain.commands import tokenize
from geneformer_pretrain.console import Summary
from geneformer_pretrain.errors import ConfigError, DataError, OutputError
from geneformer_pretrain.tokenization import corpus_plan, corpus_writer
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.unit.tokenization.files import (
    FORMATS,
    GENE_IDS,
    example_anndata,
    example_counts,
    example_gene_set,
    write_h5ad,
)
from tests.unit.tokenization.test_tokenizer import expected_rows

pytestmark = pytest.mark.process

NO_SPACE = "No space left on device; free some where the output lies, and give the command again"


@pytest.fixture
def genes(tmp_path: Path) -> Path:
    """A gene-set folder."""
    example_gene_set().save(tmp_path / "genes")
    return tmp_path / "genes"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 70 and 45 cells, with genes in different orders."""
    first, second = example_anndata(), example_anndata(example_counts(cells=45, seed=1))
    second.obs_names = [f"other {cell}" for cell in range(45)]
    return [write_h5ad(tmp_path / "b.h5ad", first), write_h5ad(tmp_path / "a.h5ad", second[:, ::-1].copy())]


def run(*arguments: Any) -> Summary:
    """Run the command in this process; parts of 20 rows and one worker unless given."""
    parser = argparse.ArgumentParser()
    tokenize.add_arguments(parser)
    given = [str(argument) for argument in arguments]
    for option, value in (("--workers", "1"), ("--part-cells", "20")):
        given += [option, value] if option not in given else []
    return tokenize.run(parser.parse_args(given))


def contents(corpus: Path) -> dict[str, bytes]:
    """Bytes of every file of a corpus."""
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def cells_of(corpus: Path) -> dict[str, list[int]]:
    """Tokens by cell id, in the order of the corpus."""
    table = pq.read_table(sorted(corpus.glob("part-*.parquet")))
    assert table["length"].to_pylist() == [len(cell) for cell in table["input_ids"].to_pylist()]
    return dict(zip(table["cell_id"].to_pylist(), table["input_ids"].to_pylist(), strict=True))


def expected(first: int = 70, second: int = 45) -> dict[str, list[int]]:
    """Tokens of the two files by the reference."""
    gene_set = example_gene_set()
    rows = expected_rows(example_counts().toarray()[:first], gene_set)
    others = expected_rows(example_counts(cells=45, seed=1).toarray()[:second], gene_set)
    return {f"cell {row}": cell for row, cell in rows.items()} | {f"other {row}": cell for row, cell in others.items()}


def test_a_corpus(files: list[Path], genes: Path, tmp_path: Path) -> None:
    summary = run(*files, "--gene-set", genes, "--output", tmp_path / "corpus", "--columns", "donor,age,cell_type")
    corpus = tmp_path / "corpus"
    cells = cells_of(corpus)
    assert cells == expected()
    assert list(cells) == list(expected())
    parts = sorted(corpus.glob("part-*"))
    assert [path.name for path in parts] == [f"part-{number:05d}.parquet" for number in range(7)]
    schema = pq.read_schema(parts[0])
    assert [(field.name, str(field.type)) for field in schema] == [
        ("input_ids", "list<element: uint16>"),
        ("length", "int32"),
        ("cell_id", "string"),
        ("donor", "string"),
        ("age", "int64"),
        ("cell_type", "string"),
    ]
    described = json.loads((corpus / "corpus.json").read_text())
    tokens = sum(map(len, cells.values()))
    assert (described["format_version"], described["cells"], described["tokens"]) == (1, 113, tokens)
    assert described["gene_set"] == example_gene_set().describe()
    assert described["left_out"] == {"filter": 0, "empty": 2, "no_genes": 0, "few_genes": 0}
    assert [part["file"] for part in described["parts"]] == [path.name for path in parts]
    assert [part["cells"] for part in described["parts"]] == [pq.read_metadata(path).num_rows for path in parts]
    assert sum(part["tokens"] for part in described["parts"]) == tokens
    assert [(source["path"], source["cells"]) for source in described["sources"]] == [
        (str(files[0]), 70),
        (str(files[1]), 45),
    ]
    others = sorted(path.name for path in corpus.iterdir() if path not in parts)
    assert others == ["corpus.json", "gene_set", "tokenize.json"]
    assert GeneSet.load(corpus / "gene_set").fingerprint == example_gene_set().fingerprint
    assert summary.values["complete"]
    assert f"113 cells, {tokens:,} tokens" in summary.lines[0]
    assert "cells left out: 2 without counts" in summary.lines
    assert (
        "genes matched: 40 of 40 (100.0%) in the file with the fewest; they hold 100.0% of the counts" in summary.lines
    )


@pytest.mark.parametrize("name", ["csr", "csc", "csc gzip", "zarr v3 csc", "mtx gz", "10x h5", "loom"])
def test_the_same_bytes_for_any_format_workers_and_shards(name: str, genes: Path, tmp_path: Path) -> None:
    """Parts made by one process, by two, and by three shards in odd order; dense beside the others."""
    (tmp_path / "dense").mkdir()
    dense, path = FORMATS["dense"][0](tmp_path / "dense"), FORMATS[name][0](tmp_path)
    run(dense, "--gene-set", genes, "--output", tmp_path / "one")
    run(path, "--gene-set", genes, "--output", tmp_path / "two", "--workers", 2 if name in ("csr", "csc") else 1)
    for shard in ("2/3", "0/3", "1/3"):
        summary = run(path, "--gene-set", genes, "--output", tmp_path / "three", "--shard", shard)
        assert summary.values["complete"] == (shard == "1/3")
        assert (tmp_path / "three" / "corpus.json").exists() == (shard == "1/3")
    two, three = contents(tmp_path / "two"), contents(tmp_path / "three")
    assert two == three
    table = pq.read_table(sorted((tmp_path / "one").glob("part-*")))
    assert table.equals(pq.read_table(sorted((tmp_path / "two").glob("part-*"))))


def test_numbering_of_shards() -> None:
    assert [corpus_plan.parse_shard(text) for text in ("0/2", "1/2", "2/2")] == [(0, 2), (1, 2), (2, 2)]
    for text in ("3/2", "1", "a/b", "-1/2", "0/0", "1/2/3"):
        with pytest.raises(ConfigError, match="give I/N"):
            corpus_plan.parse_shard(text)


def test_going_on_makes_only_what_is_missing(files: list[Path], genes: Path, tmp_path: Path) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    run(*arguments)
    whole = contents(tmp_path / "corpus")
    kept = (tmp_path / "corpus" / "part-00001.parquet").stat().st_mtime_ns
    for name in ("part-00000.parquet", "part-00004.parquet", "corpus.json"):
        (tmp_path / "corpus" / name).unlink()
    (tmp_path / "corpus" / "part-00000.parquet.tmp").write_bytes(b"torn")
    (tmp_path / "corpus" / ".tokenize.lock").touch()
    assert "7 parts (there before: 5)" in run(*arguments).lines[0]
    assert contents(tmp_path / "corpus") == whole
    assert (tmp_path / "corpus" / "part-00001.parquet").stat().st_mtime_ns == kept
    assert "all were there before" in run(*arguments, "--workers", 2).lines[0]
    assert contents(tmp_path / "corpus") == whole


def test_other_settings_are_refused_with_the_difference(files: list[Path], genes: Path, tmp_path: Path) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    run(*arguments)
    whole = contents(tmp_path / "corpus")
    example_gene_set(max_tokens=9).save(tmp_path / "shorter")
    for changed, words in (
        ((*arguments, "--min-genes", 3), "--min-genes 0 before, 3 now"),
        ((*arguments, "--columns", "age"), r"--columns \[\] before, \['age'\] now"),
        ((*arguments, "--part-cells", 21), "--part-cells 20 before, 21 now"),
        ((*files, "--gene-set", tmp_path / "shorter", "--output", tmp_path / "corpus"), "gene set 'example' .* before"),
        ((files[0], "--gene-set", genes, "--output", tmp_path / "corpus"), r"other files, .*a\.h5ad"),
        ((*reversed(files), "--gene-set", genes, "--output", tmp_path / "corpus"), "the files in another order"),
    ):
        with pytest.raises(OutputError, match=words):
            run(*changed)
    assert contents(tmp_path / "corpus") == whole
    run(*arguments, "--min-genes", 3, "--overwrite")
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["rule"]["min_genes"] == 3


def test_a_part_of_something_else_is_refused(files: list[Path], genes: Path, tmp_path: Path) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    run(*arguments)
    run(*files, "--gene-set", genes, "--output", tmp_path / "other", "--min-genes", 3)
    part = tmp_path / "corpus" / "part-00002.parquet"
    part.write_bytes((tmp_path / "other" / part.name).read_bytes())
    with pytest.raises(OutputError, match=r"part-00002\.parquet is a part of another corpus; delete it"):
        run(*arguments)
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(OutputError, match=r"part-00002\.parquet is damaged; delete it"):
        run(*arguments)
    part.unlink()
    (tmp_path / "corpus" / "part-00099.parquet").touch()
    with pytest.raises(OutputError, match=r"part-00099\.parquet is no part of this corpus"):
        run(*arguments)


def test_a_changed_source_is_refused(files: list[Path], genes: Path, tmp_path: Path) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    run(*arguments, "--shard", "1/2")
    os.utime(files[1])
    with pytest.raises(DataError, match=r"a\.h5ad changed \(its time of change\) since the corpus .* was begun"):
        run(*arguments, "--shard", "2/2")


def test_a_source_that_changes_while_it_is_read(
    files: list[Path], genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that was being made is not committed."""
    reading = corpus_writer.tokenize_blocks

    def change(counts: Any, *args: Any, **kwargs: Any) -> Any:
        yield from reading(counts, *args, **kwargs)
        if kwargs["first"] == 20:
            os.utime(counts.path)

    monkeypatch.setattr(corpus_writer, "tokenize_blocks", change)
    with pytest.raises(DataError, match=r"b\.h5ad changed while it was read"):
        run(*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    assert sorted(path.name for path in (tmp_path / "corpus").glob("part*")) == ["part-00000.parquet"]


def test_a_source_that_changed_before_the_end(
    files: list[Path], genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_writer, "make_parts", lambda job, parts, workers: _make_and_touch(job, parts, files[0]))
    with pytest.raises(DataError, match=r"b\.h5ad changed since the corpus was begun"):
        run(*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def _make_and_touch(job: corpus_writer.Job, parts: list[corpus_plan.Part], path: Path) -> None:
    for part in parts:
        corpus_writer.write_part(job, part)
    os.utime(path)


def test_columns_that_differ_in_type(files: list[Path], genes: Path, tmp_path: Path) -> None:
    other = write_h5ad(tmp_path / "c.h5ad", example_anndata(age=["old"] * 70))
    with pytest.raises(DataError, match=r"c\.h5ad: column 'age' holds string values, in .*b\.h5ad int64"):
        run(*files, other, "--gene-set", genes, "--output", tmp_path / "corpus", "--columns", "age")
    run(*files, other, "--gene-set", genes, "--output", tmp_path / "corpus")


def test_columns_and_options_that_cannot_be(files: list[Path], genes: Path, tmp_path: Path) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    for options, words in (
        (("--columns", "cell_id"), "a corpus has a column of its own"),
        (("--columns", "age,age"), "names a column twice"),
        (("--columns", "sex"), "no column 'sex' describes the cells; there are: "),
        (("--n-counts-column", "total"), "no column 'total'"),
        (("--filter-column", "fine"), "no column 'fine'"),
        (("--min-genes", -1), "--min-genes -1 is negative"),
        (("--workers", 0), "--workers 0"),
        (("--part-cells", 0), "--part-cells 0 is not between"),
        (("--shard", "1/2", "--overwrite"), "would delete the parts of the other shards"),
    ):
        with pytest.raises((ConfigError, DataError), match=words):
            run(*arguments, *options)
    assert not (tmp_path / "corpus").exists()


def test_folders_that_are_no_corpus_stay(files: list[Path], genes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for more in ((), ("--overwrite",)):
        with pytest.raises(OutputError, match="mine"):
            run(*files, "--gene-set", genes, "--output", tmp_path / "mine", *more)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    run(files[0], "--gene-set", genes, "--output", tmp_path / "corpus")
    inside = files[1].rename(tmp_path / "corpus" / "a.h5ad")
    with pytest.raises(OutputError, match=r"corpus: holds .*a\.h5ad, which is read; name another output"):
        run(inside, "--gene-set", genes, "--output", tmp_path / "corpus", "--overwrite")
    with pytest.raises(OutputError, match=r"a\.h5ad: is a file; name a folder"):
        run(files[0], "--gene-set", genes, "--output", inside, "--overwrite")
    store = FORMATS["zarr v3 csr"][0](tmp_path)
    with pytest.raises(ConfigError, match="lies inside of the counts"):
        run(store, "--gene-set", genes, "--output", store / "corpus")


def test_a_corpus_without_cells_is_an_error(files: list[Path], genes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no cell is left of 115 \(2 without counts, 113 with fewer genes"):
        run(*files, "--gene-set", genes, "--output", tmp_path / "corpus", "--min-genes", 99)
    assert not (tmp_path / "corpus").exists()
    nothing = write_h5ad(tmp_path / "c.h5ad", example_anndata(example_counts()[:0]))
    with pytest.raises(DataError, match=r"c\.h5ad: no cells"):
        run(nothing, "--gene-set", genes, "--output", tmp_path / "none")
    run(*files, nothing, "--gene-set", genes, "--output", tmp_path / "some")
    assert cells_of(tmp_path / "some") == expected()


def test_a_mistake_before_the_first_part_leaves_nothing(files: list[Path], genes: Path, tmp_path: Path) -> None:
    """So that the remedy which the error names may be given; parts that are made stay, and so do those of shards."""
    counts = example_counts()
    counts.data[0] = 0.5
    wrong = write_h5ad(tmp_path / "c.h5ad", example_anndata(counts))
    arguments = ("--gene-set", genes, "--output", tmp_path / "corpus")
    with pytest.raises(DataError, match=r"c\.h5ad: row 0 .*--allow-noninteger"):
        run(wrong, *files, *arguments)
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(DataError, match=r"c\.h5ad: row 0"):
        run(*files, wrong, *arguments)
    assert len(list((tmp_path / "corpus").glob("part-*"))) == 7
    with pytest.raises(DataError, match=r"c\.h5ad: row 0"):
        run(wrong, *files, "--gene-set", genes, "--output", tmp_path / "shards", "--shard", "2/2")
    assert (tmp_path / "shards" / "tokenize.json").exists()


def test_cells_that_share_an_id_are_counted(
    files: list[Path], genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a file and across files; cells that are left out (3 is empty) do not count."""
    arguments = ("--gene-set", genes, "--columns", "donor")
    assert not any("share an id" in line for line in run(*files, *arguments, "--output", tmp_path / "unique").lines)
    assert json.loads((tmp_path / "unique" / "corpus.json").read_text())["repeated_ids"] is None
    joined, again = example_anndata(), example_anndata(example_counts(cells=45, seed=1))
    joined.obs_names = ["twice" if cell in (3, 20, 69) else f"cell {cell}" for cell in range(70)]
    again.obs_names = ["empty" if cell == 3 else "cell 33" if cell == 8 else f"other {cell}" for cell in range(45)]
    paths = [write_h5ad(tmp_path / name, data) for name, data in (("c.h5ad", joined), ("d.h5ad", again))]
    summary = run(*paths, *arguments, "--output", tmp_path / "repeated")
    line = (
        "WARNING 4 cells share an id with another one, such as 'twice': make ids unique before "
        "(obs_names_make_unique), or carry a column along that tells the samples apart (--columns)"
    )
    assert summary.lines.count(line) == 1
    assert summary.values["repeated_ids"] == {"cells": 4, "example": "twice"}


def test_a_full_disk_leaves_no_torn_part(
    files: list[Path], genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*files, "--gene-set", genes, "--output", tmp_path / "corpus")
    write = corpus_writer.pq.write_table

    def full(table: Any, file: Any, **options: Any) -> None:
        if Path(f"/proc/self/fd/{file.fileno()}").readlink().name == "part-00003.parquet.tmp":
            file.write(b"PAR1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(table, file, **options)

    monkeypatch.setattr(corpus_writer.pq, "write_table", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*part-00003\.parquet\.tmp'"):
        run(*arguments)
    assert sorted(path.name for path in (tmp_path / "corpus").glob("part-*")) == [
        f"part-{number:05d}.parquet" for number in range(3)
    ]
    monkeypatch.undo()
    run(*arguments)
    assert cells_of(tmp_path / "corpus") == expected()


def test_a_full_disk_for_the_row_wise_copy(
    genes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts are not called damaged."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("geneformer_pretrain.tokenization.transposed._distribute", full)
    command = ["tokenize", FORMATS["csc"][0](tmp_path), "--gene-set", genes, "--output", tmp_path / "corpus"]
    with pytest.raises(SystemExit):
        cli.main([str(word) for word in [*command, "--workers", 1]])
    part = tmp_path / "corpus" / "part-00000.parquet.tmp"
    assert capsys.readouterr().err == f"Error: {part}: {NO_SPACE}\n"


def test_errors_come_from_workers_in_one_line(
    files: list[Path], genes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = example_counts()
    counts.data[-1] = 0.5
    path = write_h5ad(tmp_path / "c.h5ad", example_anndata(counts))
    command = ["tokenize", *files, path, "--gene-set", genes, "--output", tmp_path / "corpus", "--part-cells", 20]
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in [*command, "--workers", 2]])
    assert end.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"Error: {path}: row 69 (cell cell 69), gene ")
    assert "\n" not in error
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in [*command, "--workers", 2, "--allow-noninteger"]])
    assert end.value.code == 0


def test_genes_in_other_orders_and_reports(files: list[Path], tmp_path: Path) -> None:
    """Summary of what was left out, of totals that differ, of genes without a median; the same in --report."""
    medians = example_gene_set().medians.copy()
    medians[5] = np.nan
    example_gene_set(medians=medians).save(tmp_path / "genes")
    totals = example_counts().toarray().sum(axis=1) * 2
    path = write_h5ad(tmp_path / "c.h5ad", example_anndata(total=totals, filter_pass=np.arange(70) != 8))
    command = ["tokenize", path, "--gene-set", tmp_path / "genes", "--output", tmp_path / "corpus"]
    command += ["--n-counts-column", "total", "--report", tmp_path / "report.json"]
    done = subprocess.run(
        [sys.executable, "-m", "geneformer_pretrain", *map(str, command)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "cells left out: 1 not chosen by the filter column, 1 without counts" in lines
    assert f"genes without a median, left out: 1 ({sorted(GENE_IDS)[3]})" in done.stdout
    assert "total differs from the sum of the counts in 68 cells, by a factor of up to 2; it was used as given" in lines
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cells"] == 68
    assert report["sums"]["other_totals"] == 68


def test_genes_with_several_columns_are_named(files: list[Path], genes: Path, tmp_path: Path) -> None:
    """Exact duplicates as well as ids in another case; files without any say nothing of it."""
    lines = run(*files, "--gene-set", genes, "--output", tmp_path / "plain").lines
    assert "several columns" not in "\n".join(lines)
    data, first, lower = example_anndata(), GENE_IDS[0], GENE_IDS[9].lower()
    for name, ids in (("few", [first]), ("most", [first, first, lower])):
        data.var["ensembl_id"] = [*GENE_IDS[:4], *ids, *GENE_IDS[4 + len(ids) :]]
        files.append(write_h5ad(tmp_path / f"{name}.h5ad", data))
    several = f"genes with several columns, whose counts are summed: 2 ({first}, {lower}), 5 columns"
    summary = run(*files, "--gene-set", genes, "--output", tmp_path / "several")
    assert f"{several} of most.h5ad, the file with the most" in summary.lines
    assert [source.get("genes_summed", {}).get("columns") for source in summary.values["sources"]] == [None, None, 2, 5]
    assert several in run(files[-1], "--gene-set", genes, "--output", tmp_path / "one").lines


def test_help_answers_at_once_without_heavy_imports() -> None:
    code = (
        "import sys\nfrom geneformer_pretrain.cli import main\n"
        "try: main(['tokenize', '--help'])\n"
        "finally: print(sorted({'numba', 'anndata', 'torch', 'numpy', 'pyarrow', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--shard $SLURM_ARRAY_TASK_ID/8" in done.stdout.replace("\n", " ")
