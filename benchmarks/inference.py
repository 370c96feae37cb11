"""Speed of `embed` and `perturb` through the command line, beside stock BERT sorted and padded, in one run.

Models have random weights, cells random genes: neither matters for speed. Rates of the commands include reading the
corpus and writing the results, not the start of Python, of the model and of kernels, which is printed beside them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from geneformer_pretrain.tokenization.gene_set import GeneSet  # noqa: E402

VOCAB_SIZE = 25_426
MODELS = {"10m": (6, 256, 512, 4), "106m": (12, 768, 3072, 12)}
"""Layers, width, feed-forward width and heads."""

LENGTHS: dict[str, tuple[float, float, int]] = {"lognormal": (900, 0.557, 200), "genecorpus": (255, 1.41, 16)}
"""Median, sigma and minimum of lognormal lengths, cut at 2,048: kind to padding, and like Genecorpus-30M."""

EMBED_CELLS = {"10m": 200_000, "106m": 40_000}
PERTURB_CELLS = {"10m": 120, "106m": 20}
BASELINE_CELLS = {("10m", "fp32"): 3_000, ("10m", "bf16"): 6_000, ("106m", "fp32"): 600, ("106m", "bf16"): 3_000}
BASELINE_BATCH = {"10m": 128, "106m": 64}


def write_gene_set_model(folder: Path, name: str) -> None:
    """A model with random weights, and a gene set of made-up genes."""
    layers, hidden, intermediate, heads = MODELS[name]
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        hidden_act="relu",
        max_position_embeddings=2048,
        layer_norm_eps=1e-12,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    genes = [f"GENE{number:05d}" for number in range(VOCAB_SIZE - 2)]
    medians = np.ones(VOCAB_SIZE)
    medians[:2] = np.nan
    GeneSet("benchmark", None, ["<pad>", "<mask>", *genes], [None] * VOCAB_SIZE, medians, 2048).write(folder)


def write_corpus(path: Path, cells: int, lengths: str, seed: int = 0) -> np.ndarray:
    """A corpus of distinct random genes; returns the lengths of its cells."""
    median, sigma, shortest = LENGTHS[lengths]
    rng = np.random.default_rng(seed)
    sizes = np.clip(np.exp(rng.normal(np.log(median), sigma, cells)), shortest, 2048).astype(np.int64)
    genes = np.tile(2 + rng.permutation(VOCAB_SIZE - 2).astype(np.uint16), 2)
    starts = rng.integers(0, VOCAB_SIZE - 2, cells)
    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("cell_id", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first in range(0, cells, 10_000):
            part = slice(first, first + 10_000)
            tokens = np.concatenate([genes[s : s + n] for s, n in zip(starts[part], sizes[part], strict=True)])
            offsets = np.concatenate([[0], np.cumsum(sizes[part])]).astype(np.int32)
            ids = [f"cell-{number}" for number in range(first, first + len(offsets) - 1)]
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
            writer.write_table(pa.table([column, pa.array(ids)], schema=schema))
    return sizes


def run_command(*arguments: object) -> dict[str, Any]:
    """Run a command of the package and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "geneformer_pretrain", *map(str, arguments), "--report", str(report)]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
        return {**json.loads(report.read_text()), "wall_seconds": time.perf_counter() - began}


def run_baseline(folder: Path, corpus: Path, name: str, precision: str, device: torch.device) -> dict[str, float]:
    """Mean embeddings by stock BERT over cells sorted by length, padded to the longest of their batch."""
    number = BASELINE_CELLS[name, precision] if device.type == "cuda" else 8
    column = next(pq.ParquetFile(corpus).iter_batches(number, columns=["input_ids"])).column(0)
    cells = sorted((cell.values.to_numpy().astype(np.int64) for cell in column), key=len, reverse=True)
    model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    size = BASELINE_BATCH[name] if device.type == "cuda" else 4

    def run(some: list[np.ndarray]) -> int:
        tokens = 0
        for first in range(0, len(some), size):
            batch = some[first : first + size]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            for row, cell in zip(ids, batch, strict=True):
                row[: len(cell)] = torch.from_numpy(cell)
            mask = (ids != 0).long()
            ids, mask = ids.to(device), mask.to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
            ((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).float().cpu()
            tokens += sum(map(len, batch))
        return tokens

    run(cells[: 2 * size])
    began = time.perf_counter()
    tokens = run(cells)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": tokens / seconds, "cells_per_second": number / seconds}


def measure_runner(folder: Path, name: str, compiled: bool, profile: bool) -> float:
    """Tokens per second of the runner alone, on packs of 1,024-token cells that are in memory."""
    from geneformer_pretrain.inference.model import load_model
    from geneformer_pretrain.inference.pooling import mean_of_genes
    from geneformer_pretrain.inference.runner import Runner

    runner = Runner(load_model(folder), -2, longest=2048, compiled=compiled)

    def head(pack: Any, hidden: torch.Tensor, parts: Any) -> torch.Tensor:
        return mean_of_genes(hidden, parts)

    rate = runner.measure(head, 2.0)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            runner.measure(head, 0.1)
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))
    return rate


def describe_seconds(found: dict[str, Any]) -> str:
    """Duration of a command, of the opening of the corpus in it, and of what is not counted."""
    return (
        f"{found['seconds']:.1f} s ({found['opening_seconds']:.1f} s of them to open the corpus), start "
        f"{found['start_seconds']:.1f} s, wall {found['wall_seconds']:.1f} s"
    )


def line(model: str, lengths: str, what: str, result: dict[str, Any], note: str = "") -> None:
    """Print a line of the table."""
    print(
        f"{model:5} {lengths:10} {what:24} {result['tokens_per_second']:14,.0f} tokens/s "
        f"{result['cells_per_second']:10,.1f} cells/s  {note}",
        flush=True,
    )


def compare(args: argparse.Namespace, name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure one model, and print a line for each measurement."""
    results: dict[str, Any] = {}
    model = folder / name
    write_gene_set_model(model, name)
    share = args.share if device.type == "cuda" else 0.0002
    if device.type == "cuda":
        for compiled in (False, True)[: 2 if args.compile else 1]:
            kind = "compiled" if compiled else "eager"
            rate = measure_runner(model, name, compiled, args.profile and not compiled)
            results[f"runner {kind}"] = rate
            print(f"{name:5} {'1,024':10} {'runner alone, ' + kind:24} {rate:14,.0f} tokens/s", flush=True)
    for lengths in args.lengths:
        corpus = folder / f"{lengths}.parquet"
        cells = max(8, int(EMBED_CELLS[name] * share))
        sizes = write_corpus(corpus, cells, lengths)
        found = run_command("embed", model, corpus, "--output", folder / "embeddings.parquet", "--overwrite")
        found["cells_per_second"] = found["cells"] / found["seconds"]
        line(name, lengths, "embed", found, f"{describe_seconds(found)}; {sizes.mean():.0f} tokens a cell")
        results[f"embed {lengths}"] = found
        if lengths == args.lengths[0] and device.type == "cuda" and not args.no_perturb:
            results |= measure_perturb(name, folder, lengths, found, share)
        for precision in args.baseline:
            baseline = run_baseline(model, corpus, name, precision, device)
            ratio = found["tokens_per_second"] / baseline["tokens_per_second"]
            line(name, lengths, f"stock BERT {precision}", baseline, f"embed is {ratio:.1f} times as fast")
            results[f"stock {precision} {lengths}"] = {**baseline, "ratio": ratio}
    return results


def measure_perturb(name: str, folder: Path, lengths: str, embedded: dict[str, Any], share: float) -> dict[str, Any]:
    """Delete every gene of some cells, one at a time."""
    corpus = folder / "perturb.parquet"
    write_corpus(corpus, max(2, int(PERTURB_CELLS[name] * share)), lengths, seed=1)
    options = ("--mode", "delete", "--genes", "all", "--overwrite", "--no-statistics")
    found = run_command("perturb", folder / name, corpus, "--output", folder / "perturbed", *options)
    found["cells_per_second"] = found["perturbations"] / found["seconds"]
    ratio = found["tokens_per_second"] / embedded["tokens_per_second"]
    note = f"{describe_seconds(found)}; {ratio:.2f} of embed; cells are perturbed ones"
    line(name, lengths, "perturb, delete all", found, note)
    return {f"perturb {lengths}": {**found, "ratio": ratio}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: both")
    parser.add_argument("--lengths", nargs="+", default=["lognormal"], choices=list(LENGTHS), help="default: lognormal")
    parser.add_argument("--baseline", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--share", type=float, default=1.0, help="of the cells of the commands; default: 1")
    parser.add_argument("--no-perturb", action="store_true", help="measure embed alone, as without a GPU")
    parser.add_argument("--compile", action="store_true", help="also measure the runner with compiled layers")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take longest")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {"device": where}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            results[name] = compare(args, name, Path(folder), device)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
