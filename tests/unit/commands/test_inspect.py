"""`inspect`: its numbers against plain counting, and pictures that are there."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from geneformer_pretrain.cli import main
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data import inspection
from geneformer_pretrain.data.packing import BatchShape
from geneformer_pretrain.data.stream import PackStream
from tests.corpora import GENE_SET, write_corpus_folder, write_streams
from tests.unit.inference.worlds import gene_set

pytestmark = pytest.mark.process


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_a_gene_set_is_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gene_set().save(tmp_path / "genes")
    assert run(tmp_path / "genes") == 1
    said = f"{tmp_path}/genes: holds a gene set and no cells; name a corpus, a folder that `tokenize` wrote"
    assert capsys.readouterr().err == f"Error: {said}\n"


def make_cells(count: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [(2 + generator.permutation(300)[: min(n, 200)]).tolist() for n in generator.integers(5, 260, count)]


def test_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = make_cells(700)
    columns = {"tissue": ["lung", None, "heart", "heart"] * 175, "barcode": [f"{i}x" for i in range(700)]}
    corpus = write_corpus_folder(
        tmp_path / "corpus", [cells[:400], [], cells[400:]], columns, GENE_SET | {"max_tokens": 200}
    )
    assert run(corpus, "--output", tmp_path / "out", "--report", tmp_path / "report.json") == 0
    values = json.loads((tmp_path / "report.json").read_text())
    assert json.loads((tmp_path / "out/inspect.json").read_text()) == values
    lengths = [len(cell) for cell in cells]
    assert (values["cells"], values["tokens"], values["files"], values["empty_files"]) == (700, sum(lengths), 2, 1)
    assert values["length"]["mean"] == pytest.approx(np.mean(lengths))
    assert values["length"]["median"] == np.median(lengths)
    assert values["cap"] == 200
    assert values["share_at_cap"] == lengths.count(200) / 700
    counts = Counter(token for cell in cells for token in cell)
    assert values["genes_seen"] == len(counts)
    assert values["genes_in_vocabulary"] == 25_424
    entropy = -sum(n / sum(lengths) * math.log(n / sum(lengths)) for n in counts.values())
    assert values["unigram_entropy"] == pytest.approx(entropy)
    assert list(values["columns"]) == ["tissue"]
    groups = {group["value"]: (group["cells"], group["tokens"]) for group in values["columns"]["tissue"]}
    for name, places in (("lung", (0,)), ("missing", (1,)), ("heart", (2, 3))):
        assert groups[name] == (175 * len(places), sum(n for i, n in enumerate(lengths) if i % 4 in places))
    for name in ("lengths", "genes", "tokens_by_tissue"):
        picture = (tmp_path / f"out/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    out = capsys.readouterr().out
    assert "cells          700 in 2 files, 1 more without cells" in out
    assert "cells are cut at 200" in out
    assert "tissue         3 values: heart 350, lung 175, missing 175" in out


@pytest.mark.parametrize(
    ("count", "max_tokens", "cap"),
    [(700, 200, 200), (700, 2048, None), (1, 2048, None), (60, None, 200), (20, None, None)],
)
def test_the_longest_cells_need_not_have_been_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, max_tokens: int | None, cap: int | None
) -> None:
    corpus = write_corpus_folder(
        tmp_path / "corpus", [make_cells(count)], gene_set=GENE_SET | {"max_tokens": max_tokens}
    )
    if max_tokens is None:  # a corpus of another tool: cut if many cells have the greatest length
        (corpus / "corpus.json").unlink()
    assert run(corpus, "--report", tmp_path / "report.json") == 0
    assert json.loads((tmp_path / "report.json").read_text())["cap"] == cap
    assert ("are cut at" in capsys.readouterr().out) is (cap is not None)


def test_steps_of_an_epoch_are_those_of_training(tmp_path: Path) -> None:
    cells = make_cells(900)
    corpus = write_corpus_folder(tmp_path / "corpus", [cells])
    assert run(corpus, "--gpus", 2, "--report", tmp_path / "report.json") == 0
    found = json.loads((tmp_path / "report.json").read_text())["configurations"]
    lengths = np.array([len(cell) for cell in cells], np.int32)
    assert set(found) >= {"l0_sanity", "10m", "106m", "4b"}
    for name, packing in found.items():
        config = load_config(name)
        shape = BatchShape.create(
            lengths,
            micro_batch_size=config.model.micro_batch_size,
            seq_length=config.model.seq_length,
            mlm_probability=0.15,
        )
        packs = PackStream(lengths, "f", 0, shape).plan(0).num_packs
        assert packing["packs"] == packs
        assert packing["steps_per_epoch"] == math.ceil(packs / 2)
        assert packing["fill"] == pytest.approx(lengths.sum() / (packs * shape.token_budget))
        assert packing["fill_when_padded"] == pytest.approx(lengths.mean() / config.model.seq_length)


def test_a_large_corpus_is_packed_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(10, 512, 50_000).astype(np.int32)
    whole = inspection.measure_packing(lengths, 8, 512)
    monkeypatch.setattr(inspection, "MOST_PLANNED_CELLS", 10_000)
    sampled = inspection.measure_packing(lengths, 8, 512)
    assert sampled.packs == pytest.approx(whole.packs, rel=0.02)
    assert sampled.fill == pytest.approx(whole.fill, rel=0.01)


def test_a_saved_folder_and_named_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = write_streams(tmp_path / "saved", [[pa.array(make_cells(50))] * 2, [pa.array(make_cells(20))]])
    assert run(saved, "--columns", "tissue") == 0
    out = capsys.readouterr().out
    assert "cells          120 in 2 files" in out
    assert "tissue         1 value: lung 120" in out
    assert run(saved, "--columns", "organ") == 1
    assert "no column 'organ', only tissue, input_ids" in capsys.readouterr().err
    assert run(tmp_path / "nowhere") == 1
    assert "nowhere: no such file or folder" in capsys.readouterr().err
