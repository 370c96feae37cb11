"""Parts and packs of `embed`: their sizes, lack of memory, and what is stopped and started again."""

import time
from dataclasses import replace

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse import csr_matrix

from geneformer_pretrain.errors import OutputError
from geneformer_pretrain.inference import merging
from geneformer_pretrain.inference import runner as runner_module
from geneformer_pretrain.inference.corpus import CountsOptions
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.parts import Lock
from geneformer_pretrain.inference.runner import Runner
from tests.unit.inference.embed.conftest import run, vectors
from tests.unit.inference.worlds import lack_memory_above, write_cells


def test_genes_after_their_sums_ran_out_of_memory(v1, tmp_path, monkeypatch):
    """A pack whose sums are taken from the device is added once, even if the device has no memory for more."""
    run(v1, tmp_path, genes=tmp_path / "expected.parquet", tokens=128)
    plain, left = torch.Tensor.nonzero, [1]

    def nonzero(self, *args, **kwargs):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
    run(v1, tmp_path, output=tmp_path / "again.parquet", genes=tmp_path / "genes.parquet", tokens=128)
    assert pq.read_table(tmp_path / "genes.parquet").equals(pq.read_table(tmp_path / "expected.parquet"))


def test_out_of_memory_halves_the_packs(v1, tmp_path, monkeypatch, capsys):
    lack_memory_above(200, monkeypatch)
    output, summary = run(v1, tmp_path, tokens=1024)
    monkeypatch.undo()
    expected, _ = run(v1, tmp_path, output=tmp_path / "expected.parquet")
    np.testing.assert_allclose(vectors(output), vectors(expected), atol=1e-6)
    assert summary.values["pack_tokens"] == 256
    assert "Out of memory with packs of" in capsys.readouterr().err


def test_out_of_memory_with_the_smallest_packs(v1, tmp_path, monkeypatch):
    lack_memory_above(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        run(v1, tmp_path)


@pytest.mark.parametrize("limit", ["embed.PART_TOKENS", "parts.CPU_PART_TOKENS"])
def test_goes_on_where_it_stopped(v1, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(f"geneformer_pretrain.inference.{limit}", 100)
    plain, done = Runner.hidden, []

    def hidden(self, parts):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(len(parts.input_ids))
        return plain(self, parts)

    monkeypatch.setattr(Runner, "hidden", hidden)
    with pytest.raises(KeyboardInterrupt):
        run(v1, tmp_path, tokens=64)
    assert list((tmp_path / "out.parquet.parts").glob("part-*.parquet"))
    with pytest.raises(OutputError, match=r"other settings \(layers computed was 2, is 3\)"):
        run(v1, tmp_path, layer=-1, tokens=64)
    monkeypatch.setattr(Runner, "hidden", plain)
    output, summary = run(v1, tmp_path, tokens=64)
    assert summary.values["tokens"] < sum(map(len, v1.cells))
    monkeypatch.undo()
    expected, _ = run(v1, tmp_path, output=tmp_path / "expected.parquet")
    np.testing.assert_allclose(vectors(output), vectors(expected), atol=1e-6)


def test_waiting_for_packs_is_reported(v1, tmp_path, monkeypatch):
    plain, built = Runner.pack_of, []

    def slow(self, *args, **kwargs):
        built.append(time.sleep(0.03))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "pack_of", slow)
    _, summary = run(v1, tmp_path, tokens=64)
    assert len(built) > 10
    assert summary.values["waited_for_packs_seconds"] > 0.02 * len(built)


def test_memory_is_bounded(v1, tmp_path, monkeypatch):
    """The builder is never more than a few packs ahead of the device."""
    built, ahead = [], []
    plain_start, plain_pack = Runner._start, Runner.pack_of

    def pack_of(self, *args, **kwargs):
        built.append(1)
        return plain_pack(self, *args, **kwargs)

    def start(self, pack):
        built.pop()
        ahead.append(len(built))
        return plain_start(self, pack)

    monkeypatch.setattr(Runner, "pack_of", pack_of)
    monkeypatch.setattr(Runner, "_start", start)
    run(v1, tmp_path, tokens=48)
    assert len(ahead) > 10
    assert max(ahead) <= runner_module.AHEAD + 3


@pytest.mark.parametrize(
    ("length", "in_a_pack", "room"), [(2048, 4, 16), (400, 20, 32), (100, 81, 128), (10, 128, 128)]
)
def test_a_pack_has_no_more_room_for_cells_than_it_needs(v1, length, in_a_pack, room):
    runner = Runner(load_model(v1.model), -2, longest=2048, tokens=8192)
    packs = list(runner.plan(np.full(3 * in_a_pack, length)))
    assert [len(chosen) for chosen, _ in packs] == [in_a_pack] * 3
    assert {(shape.tokens, shape.max_cells) for _, shape in packs} == {(8192, room)}


def test_parts_of_tiny_cells_are_no_larger_files(v1, tmp_path, monkeypatch):
    """Cells of one gene count as the room that they take in a pack."""
    monkeypatch.setattr("geneformer_pretrain.inference.parts.CPU_PART_TOKENS", 64 * 10)
    path = write_cells(tmp_path / "tiny.parquet", [[5]] * 40)
    found, plain = [], merging.write_part
    monkeypatch.setattr(
        "geneformer_pretrain.inference.embed.write_part",
        lambda path, columns, vectors: (found.append(len(vectors)), plain(path, columns, vectors)),
    )
    embed(EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet"))
    assert sum(found) == 40
    assert max(found) == 10


@pytest.mark.parametrize("name", ["out.parquet", "out.h5ad"])
def test_an_output_that_cannot_be_written_does_not_keep_the_genes_from_going_on(v1, tmp_path, monkeypatch, name):
    output, genes = tmp_path / name, tmp_path / "genes.parquet"
    plain = merging.replacing
    with monkeypatch.context() as patch:
        patch.setattr(merging, "replacing", lambda path: 1 / 0 if path == output else plain(path))
        with pytest.raises(ZeroDivisionError):
            run(v1, tmp_path, output=output, genes=genes)
    assert genes.exists()
    assert not output.exists()
    other = tmp_path / "other.parquet"
    other.write_text("mine")
    with pytest.raises(OutputError, match=r"other\.parquet: this output exists already"):
        run(v1, tmp_path, output=output, genes=other)
    run(v1, tmp_path, output=output, genes=genes)
    assert output.exists()
    assert other.read_text() == "mine"
    with pytest.raises(OutputError, match="exists already"):
        run(v1, tmp_path, output=tmp_path / "second.parquet", genes=genes)


def test_a_corpus_that_is_replaced_is_noticed(v1, tmp_path, monkeypatch):
    """Another file with the same rows, lengths and size ends a job that was stopped."""
    path = tmp_path / "cells.parquet"
    plain = Runner.hidden
    write_cells(path, v1.cells)
    monkeypatch.setattr(Runner, "hidden", lambda *_: 1 / 0)
    options = EmbedOptions(v1.model, [str(path)], tmp_path / "out.parquet")
    with pytest.raises(ZeroDivisionError):
        embed(options)
    monkeypatch.setattr(Runner, "hidden", plain)
    write_cells(path, [cell[::-1] for cell in v1.cells])
    with pytest.raises(OutputError, match=r"other settings \(cells was"):
        embed(options)


def test_overwrite_leaves_a_job_at_work_alone(v1, tmp_path):
    work = tmp_path / "out.parquet.parts"
    with Lock(work):
        (work / "part-00000.parquet").write_text("theirs")
        with pytest.raises(OutputError, match="another process works on it"):
            run(v1, tmp_path, overwrite=True)
        assert (work / "part-00000.parquet").read_text() == "theirs"
    output, _ = run(v1, tmp_path, overwrite=True)
    assert len(vectors(output)) == 24
    assert not work.exists()


def test_counts_that_changed_are_tokenized_again(v1, tmp_path, monkeypatch):
    """Cells that an earlier start tokenized are used for the same counts and options alone."""
    adata = anndata.AnnData(csr_matrix(np.arange(1.0, 161).reshape(2, 80).astype(np.float32)))
    adata.var["ensembl_id"] = v1.genes.tokens[2:]
    adata.write_h5ad(tmp_path / "counts.h5ad")
    plain = Runner.hidden
    monkeypatch.setattr(Runner, "hidden", lambda *_: 1 / 0)
    options = EmbedOptions(v1.model, [str(tmp_path / "counts.h5ad")], tmp_path / "out.parquet")
    with pytest.raises(ZeroDivisionError):
        embed(options)
    monkeypatch.setattr(Runner, "hidden", plain)
    adata[:, ::-1].copy().write_h5ad(tmp_path / "counts.h5ad")
    with pytest.raises(OutputError, match="other settings"):
        embed(replace(options, counts=CountsOptions(min_genes=1)))
