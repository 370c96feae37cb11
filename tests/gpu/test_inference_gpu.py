"""Inference on a GPU against stock transformers in FP32: kernels, compiled layers, packs and scores."""

import gc
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch.testing import assert_close

from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.packs import Pack
from geneformer_pretrain.inference.perturb import perturb
from geneformer_pretrain.inference.perturbations import PerturbOptions
from geneformer_pretrain.inference.pooling import mean_of_genes, sums_by_cell_in_torch
from geneformer_pretrain.inference.runner import Runner
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.unit.inference.worlds import write_cells

# Warnings of compilers are not ours to mend.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

VOCAB, MAX_TOKENS = 2048, 512


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of the width of 10m with weights that are not tiny, and cells of 1 to 512 genes."""
    folder = tmp_path_factory.mktemp("world")
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_act="relu",
        max_position_embeddings=MAX_TOKENS,
        layer_norm_eps=1e-12,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "model")
    tokens = ["<pad>", "<mask>", *(f"ENSG{number:011d}" for number in range(VOCAB - 2))]
    medians = np.ones(VOCAB)
    medians[:2] = np.nan
    genes = GeneSet("toy", None, tokens, [None] * VOCAB, medians, MAX_TOKENS)
    genes.write(folder / "model")
    rng = np.random.default_rng(0)
    lengths = [MAX_TOKENS, 1, 2, 127, 128, 129, *rng.integers(1, MAX_TOKENS + 1, 60)]
    cells = [(2 + rng.permutation(VOCAB - 2)[:length]).tolist() for length in lengths]
    path = write_cells(folder / "cells.parquet", cells)
    stock = transformers.BertForMaskedLM.from_pretrained(folder / "model", attn_implementation="eager").cuda().eval()
    return SimpleNamespace(model=folder / "model", path=path, cells=cells, stock=stock)


def stock_means(world):
    means = []
    for cell in world.cells:
        with torch.no_grad():
            states = world.stock(torch.tensor([cell]).cuda(), output_hidden_states=True).hidden_states
        means.append(states[-2][0].double().mean(0).cpu().numpy())
    return np.array(means)


def vectors(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist())


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(("dtype", "tokens"), [("bfloat16", 8192), ("bfloat16", 512), ("float32", 8192)])
def test_embeddings_as_stock_in_float32(world, tmp_path, dtype, tokens):
    output = tmp_path / "out.parquet"
    embed(EmbedOptions(world.model, [str(world.path)], output, dtype=dtype, tokens=tokens))
    expected = stock_means(world)
    assert cosines(vectors(output), expected).min() > (0.999 if dtype == "bfloat16" else 1 - 1e-6)
    if dtype == "float32":
        np.testing.assert_allclose(vectors(output), expected, atol=1e-4)


def test_embeddings_without_a_layer_and_means_of_genes(world, tmp_path):
    """Recorded passes of no layers; genes are added up from what is replayed, in packs of several shapes."""
    genes = tmp_path / "genes.parquet"
    embed(EmbedOptions(world.model, [str(world.path)], tmp_path / "out.parquet", layer=0, tokens=4096, genes=genes))
    cells, sums, counts = [], np.zeros((VOCAB, 256)), np.zeros(VOCAB, np.int64)
    for cell in world.cells:
        with torch.no_grad():
            states = world.stock(torch.tensor([cell]).cuda(), output_hidden_states=True).hidden_states[0][0]
        found = states.double().cpu().numpy()
        cells.append(found.mean(0))
        sums[cell] += found
        counts[cell] += 1
    assert cosines(vectors(tmp_path / "out.parquet"), np.array(cells)).min() > 0.9999
    table = pq.read_table(genes)
    tokens = [2 + int(gene[4:]) for gene in table["gene_id"].to_pylist()]
    assert table["cells"].to_pylist() == counts[tokens].tolist()
    assert cosines(vectors(genes), sums[tokens] / counts[tokens, None]).min() > 0.9999


def test_company_in_a_pack_changes_nothing(world, tmp_path):
    for name, tokens in (("many", 32768), ("few", 512)):
        embed(EmbedOptions(world.model, [str(world.path)], tmp_path / f"{name}.parquet", tokens=tokens))
    many, few = vectors(tmp_path / "many.parquet"), vectors(tmp_path / "few.parquet")
    assert cosines(many, few).min() > 0.9999


def test_compiled_as_eager(world):
    torch._dynamo.reset()
    lengths = np.array([len(cell) for cell in world.cells])
    tokens, offsets = np.concatenate(world.cells).astype(np.int32), np.concatenate([[0], lengths.cumsum()])
    found = {}
    for compiled in (False, True):
        model = load_model(world.model, dtype="float32")  # in BF16 this project's kernels are not compiled
        runner = Runner(model, -2, longest=MAX_TOKENS, tokens=4096, compiled=compiled)
        assert runner.compiled_tokens == (4096 if compiled else 0)
        result = np.empty((len(lengths), 256), np.float32)
        packs = [
            runner.pack_of(chosen, shape, tokens, offsets, lambda pack, hidden, parts: mean_of_genes(hidden, parts), 0)
            for chosen, shape in runner.plan(lengths)
        ]
        assert any(pack.shape.tokens == 4096 for pack in packs)
        for pack, rows in runner.run(packs):
            result[pack.items] = rows
        found[compiled] = result
    assert cosines(found[False], found[True]).min() > 0.9999


def test_replayed_as_launched(world):
    """Every bit, with packs of several shapes in turn."""
    lengths = np.array([len(cell) for cell in world.cells])
    tokens, offsets = np.concatenate(world.cells).astype(np.int32), np.concatenate([[0], lengths.cumsum()])
    found = []
    for replayed in (True, False):
        runner = Runner(load_model(world.model), -2, longest=MAX_TOKENS, tokens=4096)
        assert runner._graphs is not None
        if not replayed:
            runner._graphs = None
        results, shapes = np.empty((2, len(lengths), 256), np.float32), []

        def head(pack, hidden, parts):
            return mean_of_genes(hidden, parts)

        def packs(runner=runner, shapes=shapes, head=head):
            for time in range(2):
                for some in (np.arange(len(lengths)), np.arange(3), np.arange(6, 20)):
                    for chosen, shape in runner.plan(lengths[some]):
                        shapes.append(shape)
                        yield runner.pack_of(some[chosen], shape, tokens, offsets, head, time)

        for pack, rows in runner.run(packs()):
            results[pack.owner, pack.items] = rows
        assert len(set(shapes)) > 2
        found.append(results)
    np.testing.assert_array_equal(found[0][0], found[0][1])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("width", [256, 768, 1152])
@pytest.mark.parametrize("compares", [False, True])
def test_sums_by_cell(width, compares):
    from geneformer_pretrain.inference.kernels import sums_by_cell

    torch.manual_seed(0)
    lengths = torch.tensor([1, 300, 128, 0, 129, 2000, 42, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().cuda()
    hidden = torch.randn(2600, width, device="cuda", dtype=torch.bfloat16)
    rows = torch.randint(-2, 50, (2600,), dtype=torch.int32, device="cuda")
    store = torch.randn(50, width, device="cuda", dtype=torch.bfloat16) if compares else None
    found = sums_by_cell(hidden, rows, cu_seqlens, store)
    expected = sums_by_cell_in_torch(hidden, rows, cu_seqlens, store)
    assert_close(found[0], expected[0], atol=2e-2, rtol=1e-4)
    columns = slice(0, 3 if compares else 1)
    assert_close(found[1][:, columns], expected[1][:, columns], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_perturbation_as_stock_in_float32(world, tmp_path, mode):
    options = {"mode": mode, "max_cells": 6, "seed": 1, "statistics": False, "tokens": 4096}
    for dtype in ("float32", "bfloat16"):
        perturb(PerturbOptions(world.model, [str(world.path)], tmp_path / dtype, dtype=dtype, **options))
    exact, fast = (pq.read_table(tmp_path / dtype / "scores") for dtype in ("float32", "bfloat16"))
    assert exact["perturbation"].equals(fast["perturbation"])
    for name in ("gene_similarity", "cell_similarity"):
        np.testing.assert_allclose(exact[name].to_numpy(), fast[name].to_numpy(), atol=5e-3)
    row = exact.slice(5, 1).to_pylist()[0]
    cell, token = world.cells[row["cell"]], 2 + int(row["perturbation"][4:])
    rest = [gene for gene in cell if gene != token]
    copy = rest if mode == "delete" else [token, *rest]
    with torch.no_grad():
        after, before = (
            world.stock(torch.tensor([genes]).cuda(), output_hidden_states=True).hidden_states[-2][0].double()
            for genes in (copy, cell)
        )
    kept = [place for place, gene in enumerate(cell) if gene != token]
    score = torch.cosine_similarity(after[-len(rest) :], before[kept], dim=1).mean().item()
    assert row["gene_similarity"] == pytest.approx(score, abs=2e-5)


def test_goes_on_after_running_out_of_memory(world, tmp_path, capsys):
    """A limit of memory that the first packs exceed: they are cut and the results stay."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    expected = tmp_path / "expected.parquet"
    embed(EmbedOptions(world.model, [str(world.path)], expected))
    gc.collect()  # recordings of the job before
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        embed(EmbedOptions(world.model, [str(world.path)], tmp_path / "out.parquet", tokens=131_072))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with" in capsys.readouterr().err
    assert cosines(vectors(tmp_path / "out.parquet"), vectors(expected)).min() > 0.9999


def test_goes_on_where_a_recording_finds_no_memory(world, tmp_path, capsys, monkeypatch):
    """CUDA, not PyTorch, lacks memory for the graph of the first shape."""
    expected = tmp_path / "expected.parquet"
    embed(EmbedOptions(world.model, [str(world.path)], expected))
    end, failures = torch.cuda.CUDAGraph.capture_end, []

    def capture_end(graph):
        end(graph)
        if not failures:
            failures.append(1)
            raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", capture_end)
    embed(EmbedOptions(world.model, [str(world.path)], tmp_path / "out.parquet"))
    assert "going on with" in capsys.readouterr().err
    assert cosines(vectors(tmp_path / "out.parquet"), vectors(expected)).min() > 0.9999


def test_results_do_not_depend_on_order(world):
    """The same pack twice gives the same bits."""
    lengths = np.array([len(cell) for cell in world.cells])
    tokens, offsets = np.concatenate(world.cells).astype(np.int32), np.concatenate([[0], lengths.cumsum()])
    runner = Runner(load_model(world.model), -2, longest=MAX_TOKENS, tokens=4096)
    chosen, shape = next(runner.plan(lengths))

    def pack() -> Pack:
        return runner.pack_of(chosen, shape, tokens, offsets, lambda _, hidden, parts: mean_of_genes(hidden, parts), 0)

    (_, first), (_, second) = runner.run([pack(), pack()])
    np.testing.assert_array_equal(first, second)
