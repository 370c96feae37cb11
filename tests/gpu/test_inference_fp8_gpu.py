"""`--dtype fp8` on a Hopper GPU: kernels against float64, embeddings and scores against FP32. Measured cosines: -s."""

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.inference_tools.inputs import SIZES, write_corpus, write_model
from geneformer_pretrain.cli import main
from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.fp8 import take_linear_layers
from geneformer_pretrain.inference.model import load_model
from geneformer_pretrain.inference.perturb import perturb
from geneformer_pretrain.inference.perturbations import PerturbOptions
from geneformer_pretrain.inference.pooling import mean_of_genes
from geneformer_pretrain.inference.runner import Runner
from modeling_bert_te import BertForMaskedLM
from tests.unit.inference.fp8_reference import Fp8Reference

# Warnings of compilers are not ours to mend.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", autouse=True)
def _hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FP8 inference runs on Hopper GPUs")


@pytest.fixture(scope="module", params=["10m", "106m"])
def world(request, tmp_path_factory):
    """A model with random weights, and cells of 1 to 2,048 genes."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "model", request.param)
    lengths = np.array([2048, 1, 2, 127, 128, 129, *np.random.default_rng(0).integers(1, 2049, 42)])
    write_corpus(folder / "cells.parquet", request.param, lengths)
    cells = pq.read_table(folder / "cells.parquet")["input_ids"].to_pylist()
    tokens, offsets = np.concatenate(cells).astype(np.int32), np.concatenate([[0], lengths.cumsum()])
    names = {"name": request.param, "model": folder / "model", "path": folder / "cells.parquet"}
    return SimpleNamespace(**names, lengths=lengths, tokens=tokens, offsets=offsets)


def vectors(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist())


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_embeddings_as_in_float32(world, tmp_path):
    """Of cells, and of genes as means over cells, through the command."""
    for dtype in ("float32", "bfloat16", "fp8"):
        output, genes = (str(tmp_path / f"{dtype}-{kind}.parquet") for kind in ("cells", "genes"))
        command = ["embed", str(world.model), str(world.path), "--dtype", dtype, "--output", output, "--genes", genes]
        assert main(command) == 0
    for kind, least in (("cells", 0.999), ("genes", 0.995)):
        exact, *others = (vectors(tmp_path / f"{dtype}-{kind}.parquet") for dtype in ("float32", "bfloat16", "fp8"))
        half, low = (cosines(exact, other) for other in others)
        print(
            f"\n{world.name}, random weights, {kind}: cosine to FP32 at least {low.min():.6f}, mean {low.mean():.6f}; "
            f"BF16 at least {half.min():.6f}"
        )
        # Of a cell of a few genes, nothing is averaged.
        assert low[world.lengths > 100 if kind == "cells" else slice(None)].min() > least


def hidden(world, runner):
    """Hidden states of the first pack, by the runner."""
    chosen, shape = next(runner.plan(world.lengths))
    pack = runner.pack_of(chosen, shape, world.tokens, world.offsets, lambda *_: None, None)
    with torch.no_grad():
        return runner.hidden(shape.split(pack.buffer.cuda()))[: pack.num_tokens].double()


def test_kernels_as_products_of_the_same_tensors_in_float64(world):
    runner = Runner(load_model(world.model, dtype="fp8"), -2, longest=2048, tokens=4096)
    found = hidden(world, runner)
    model = BertForMaskedLM.from_pretrained(world.model).cuda().eval()
    for layer, linears in zip(
        runner.model.bert.encoder["layer"].children(), take_linear_layers(model, 2, 2048), strict=True
    ):
        layer.set_fused_kernels(Fp8Reference(linears))
    expected = hidden(world, runner)
    cosine = torch.cosine_similarity(found, expected).min().item()
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"\n{world.name}: kernels against float64: cosine at least {cosine:.6f}, relative error {error:.4f}")
    # A sum that rounds to the FP8 number beside the right one is off by 6%; few do.
    assert cosine > 0.998


def test_company_in_a_pack_changes_nothing(world, tmp_path):
    for name, tokens in (("many", 32768), ("few", 2048)):
        options = EmbedOptions(world.model, [str(world.path)], tmp_path / f"{name}.parquet", dtype="fp8", tokens=tokens)
        embed(options)
    many, few = vectors(tmp_path / "many.parquet"), vectors(tmp_path / "few.parquet")
    found, averaged = cosines(many, few), world.lengths > 100
    print(
        f"\n{world.name}: other company: cosine {found.min():.7f} and more, over 100 genes {found[averaged].min():.7f}"
    )
    assert found[averaged].min() > 0.9999
    assert found.min() > 0.999


def test_compiled_as_eager_and_twice_the_same_bits(world):
    if world.name != "10m":
        pytest.skip("compiling takes long")
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = load_model(world.model, dtype="fp8")
        runner = Runner(model, -2, longest=2048, tokens=8192, compiled=compiled)
        chosen, shape = next(runner.plan(world.lengths))
        packs = [
            runner.pack_of(chosen, shape, world.tokens, world.offsets, lambda _, h, parts: mean_of_genes(h, parts), 0)
            for _ in range(2)
        ]
        (_, first), (_, second) = runner.run(packs)
        np.testing.assert_array_equal(first, second)
        results.append(first)
    assert cosines(*results).min() > 0.9999


def test_perturbations_as_in_float32(world, tmp_path):
    options = {"mode": "delete", "max_cells": 6, "max_tokens": 256, "statistics": False}
    for dtype in ("float32", "bfloat16", "fp8"):
        perturb(PerturbOptions(world.model, [str(world.path)], tmp_path / dtype, dtype=dtype, **options))
    exact, half, low = (pq.read_table(tmp_path / dtype / "scores") for dtype in ("float32", "bfloat16", "fp8"))
    assert exact["perturbation"].equals(low["perturbation"])
    for name in ("gene_similarity", "cell_similarity"):
        expected, of_half, found = (table[name].to_numpy() for table in (exact, half, low))
        print(
            f"\n{world.name}, random weights, {name}: in FP32 {np.median(1 - expected):.2e} below 1 (median); off by "
            f"up to {np.abs(found - expected).max():.2e} in FP8, {np.abs(of_half - expected).max():.2e} in BF16"
        )
        np.testing.assert_allclose(found, expected, atol=1e-2)


def test_what_changes_nothing_scores_exactly_one(world, tmp_path):
    options = PerturbOptions(
        world.model, [str(world.path)], tmp_path / "out", mode="shift", fraction=0.0, max_cells=2, statistics=False,
        dtype="fp8",
    )  # fmt: skip
    perturb(options)
    scores = pq.read_table(tmp_path / "out" / "scores")
    assert set(scores["gene_similarity"].to_pylist()) == {1.0}
    assert set(scores["cell_similarity"].to_pylist()) == {1.0}


def test_weights_in_bf16_are_given_back(world):
    size = SIZES[world.name]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_model(world.model, dtype="fp8")
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated() - before
    encoder = size.layers * (4 * size.hidden**2 + 2 * size.hidden * size.intermediate)
    rest = sum(parameter.numel() for parameter in model.bert.parameters())
    assert used < 1.1 * (encoder + 2 * rest)
