"""`split`: every cell in one part, the same each time, with all its columns."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.cli import main
from geneformer_pretrain.data import splitting
from geneformer_pretrain.data.corpus import named_gene_set, open_corpus
from tests.corpora import random_cells, write_corpus_folder, write_parquet, write_streams

pytestmark = pytest.mark.process


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["split", *map(str, arguments)])
    return int(ended.value.code or 0)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def donors(count: int) -> dict[str, list[str]]:
    return {"donor": [f"donor {number % 13}" for number in range(count)]}


@pytest.fixture(name="corpus")
def corpus_of_three_parts(tmp_path: Path) -> Path:
    cells = random_cells(1000)
    return write_corpus_folder(tmp_path / "corpus", [cells[:300], cells[300:301], cells[301:]], donors(1000))


def test_every_cell_is_in_one_part_with_all_its_columns(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(splitting, "CELLS_PER_PART", 128)
    monkeypatch.setattr(splitting, "CELLS_PER_ROW_GROUP", 50)
    report = tmp_path / "report.json"
    assert run(corpus, "--output", tmp_path / "out", "--fraction", 0.2, "--report", report) == 0
    parts = {name: rows(tmp_path / "out" / name) for name in ("train", "held_out")}
    everything = rows(corpus)
    order = {row["cell_id"]: number for number, row in enumerate(everything)}
    assert sorted(parts["train"] + parts["held_out"], key=lambda row: order[row["cell_id"]]) == everything
    for name, found in parts.items():
        assert [order[row["cell_id"]] for row in found] == sorted(order[row["cell_id"]] for row in found)
        opened = open_corpus(tmp_path / "out" / name, tmp_path / "cache")
        assert [opened.cell(number).tolist() for number in range(opened.num_cells)] == [
            row["input_ids"] for row in found
        ]
        named = named_gene_set(tmp_path / "out" / name)
        assert named is not None
        assert named[0].fingerprint == "f00d"
        described = json.loads((tmp_path / "out" / name / "corpus.json").read_text())
        assert described["cells"] == len(found)
        assert described["tokens"] == opened.num_tokens == sum(part["tokens"] for part in described["parts"])
        assert max(part["cells"] for part in described["parts"]) == 128
        assert described["split"]["fraction"] == 0.2
        assert json.loads(report.read_text())[name]["cells"] == len(found)
    assert 150 < len(parts["held_out"]) < 250  # 200 +- 4 standard deviations
    assert f"held_out  {len(parts['held_out']):,} cells" in capsys.readouterr().out


def test_a_cell_stays_on_its_side(tmp_path: Path, corpus: Path) -> None:
    """Whatever the order and number of the cells, and for a larger fraction."""
    cells = [row["input_ids"] for row in rows(corpus)]
    sides = []
    for number, (some, kind) in enumerate([(cells, pa.uint16()), (cells[500:0:-1], pa.int64())]):
        path = write_parquet(tmp_path / f"{number}.parquet", some, pa.list_(kind))
        assert run(path, "--output", tmp_path / f"out{number}", "--fraction", 0.3) == 0
        sides.append({tuple(row["input_ids"]) for row in rows(tmp_path / f"out{number}" / "held_out")})
        assert not (tmp_path / f"out{number}/train/corpus.json").exists()
    assert sides[1] == sides[0] & {tuple(cell) for cell in cells[1:501]}
    assert run(tmp_path / "0.parquet", "--output", tmp_path / "more", "--fraction", 0.5) == 0
    assert sides[0] < {tuple(row["input_ids"]) for row in rows(tmp_path / "more/held_out")}


def test_whole_groups(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, "--output", tmp_path / "named", "--by", "donor", "--hold-out", "donor 3,donor 11") == 0
    assert {row["donor"] for row in rows(tmp_path / "named/held_out")} == {"donor 3", "donor 11"}
    assert {row["donor"] for row in rows(tmp_path / "named/train")} == set(donors(13)["donor"]) - {
        "donor 3",
        "donor 11",
    }
    assert "held out  2 of 13 values of donor: donor 11, donor 3" in capsys.readouterr().out
    assert run(corpus, "--output", tmp_path / "hashed", "--by", "donor", "--fraction", 0.4) == 0
    sides = [{row["donor"] for row in rows(tmp_path / "hashed" / name)} for name in ("train", "held_out")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 13


def test_partitions_and_saved_folders(tmp_path: Path) -> None:
    table = pa.table({"input_ids": random_cells(40), "tissue": ["lung", "heart"] * 20})
    pq.write_to_dataset(table, tmp_path / "hive", partition_cols=["tissue"])
    assert run(tmp_path / "hive", "--output", tmp_path / "out", "--by", "tissue", "--hold-out", "lung") == 0
    assert [row["tissue"] for row in rows(tmp_path / "out/held_out")] == ["lung"] * 20
    saved = write_streams(tmp_path / "saved", [[pa.array(random_cells(30))], [pa.array(random_cells(30, seed=1))]])
    assert run(saved, "--output", tmp_path / "out2", "--fraction", 0.5) == 0
    cells = [row["input_ids"] for name in ("train", "held_out") for row in rows(tmp_path / "out2" / name)]
    assert sorted(cells) == sorted(random_cells(30) + random_cells(30, seed=1))


def test_the_corpus_itself_is_not_overwritten(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    for output in (corpus, tmp_path):
        for command in (["split", "--fraction", "0.5"], ["inspect"]):
            with pytest.raises(SystemExit):
                main([*command, str(corpus), "--output", str(output), "--overwrite"])
            assert f"Error: {output}: not overwritten" in capsys.readouterr().err
    assert run(corpus, "--output", tmp_path / "parts", "--fraction", 0.5) == 0
    capsys.readouterr()
    train = tmp_path / "parts/train"
    assert run(train, "--output", tmp_path / "parts", "--fraction", 0.5, "--overwrite") == 1
    assert re.match(rf"Error: {tmp_path}/parts: holds {train}/\S+, which is read; ", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before


def test_the_row_of_a_damaged_cell_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its file, beyond the rows that are read at once, where cells without ids are told apart by their tokens."""
    for name, bad in (("a", None), ("b", 5000)):
        cells = [[3, 4]] * 5001
        if bad is not None:
            cells[bad] = []
        pq.write_table(pa.table({"input_ids": cells}), tmp_path / f"{name}.parquet", row_group_size=700)
    assert run(tmp_path, "--output", tmp_path / "out", "--fraction", "0.5") == 1
    said = f"Error: {tmp_path}/b.parquet, row 5000: input_ids is empty; drop the row\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("arguments", [["--fraction", "0.5"], ["--by", "donor", "--fraction", "0.5"]])
def test_two_columns_of_one_name(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cells = pa.table({"input_ids": [[3, 4], [5]]})
    for donor in ("a", "b"):
        cells = cells.append_column("donor", pa.array([donor] * 2))
    pq.write_table(cells, tmp_path / "cells.parquet")
    assert run(tmp_path / "cells.parquet", "--output", tmp_path / "out", *arguments) == 1
    assert capsys.readouterr().err == (
        f"Error: {tmp_path}/cells.parquet: has several columns called 'donor'; give each a name of its own\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --fraction F, or --by COLUMN"),
        (["--fraction", "1.5"], "--fraction is 1.5; it must lie between 0 and 1"),
        (["--fraction", "1e-9"], "no cell would be in held_out"),
        (["--hold-out", "donor 1", "--fraction", "0.1"], "--hold-out names values of a column"),
        (
            ["--by", "donor", "--hold-out", "donor_1"],
            "donor has no value 'donor_1'; did you mean donor 1? It has: donor 0, donor 1, donor 10, donor 11, "
            "donor 12 and 8 more\n",
        ),
        (["--by", "donor", "--hold-out", "X"], "no value 'X'; it has: donor 0, donor 1,"),
        (["--by", "doner"], "no column 'doner', only input_ids, length, cell_id, donor"),
        (["--by", "donor", "--fraction", "1e-9"], "none of its 13 groups would be held out"),
    ],
)
def test_mistakes_are_plain_lines(
    tmp_path: Path, corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(corpus, "--output", tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_an_existing_output_is_kept(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes").touch()
    assert run(corpus, "--output", tmp_path / "out", "--fraction", 0.1) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out/notes").exists()
    assert run(corpus, "--output", tmp_path / "out", "--fraction", 0.1, "--overwrite") == 1
    (tmp_path / "out/notes").unlink()
    for fraction, cells in ((0.5, 120), (0.1, 200)):
        assert run(corpus, "--output", tmp_path / "out", "--fraction", fraction, "--overwrite") == 0
        assert len(rows(tmp_path / "out/train")) > cells


@pytest.mark.parametrize("command", ["split", "inspect"])
def test_help_needs_no_heavy_imports(command: str) -> None:
    script = (
        "import sys\nfrom geneformer_pretrain.cli import main\n"
        f"try: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numba', 'pyarrow', 'numpy', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
