"""Speed of `embed` and `perturb` through the command line, on one GPU and on several, beside stock BERT.

Models have random weights, cells random genes: neither matters for speed. Two rates are given for a command: of the
whole, which includes opening the corpus and writing the results, and of the forward phase, which is what a long job
tends to. Loading the model and preparing kernels are printed beside them and are in neither.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.inference_tools.inputs import (
    SIZES,
    describe_phases,
    measure_models,
    run_command,
    write_corpus,
    write_model,
)
from benchmarks.inference_tools.stock import BF16, ENCODER, FP32, measure_embedding
from geneformer_pretrain.planner.lengths import KINDS, simulated

EMBED_CELLS = {"10m": 400_000, "106m": 60_000, "v2_104m": 20_000}
"""Cells for each GPU: about 20 s of forward passes on an H200."""
PERTURB_CELLS = {"10m": 240, "106m": 30, "v2_104m": 10}
BASELINES = {"fp32": FP32, "bf16": BF16, "bf16-encoder": ENCODER}
BASELINE_CELLS = {"10m": (3_000, 6_000), "106m": (600, 3_000), "v2_104m": (400, 2_000)}
"""In FP32 and in BF16."""


def measure_runner(folder: Path, longest: int, profile: bool) -> float:
    """Tokens per second of the runner alone, on packs of 1,024-token cells that are in memory."""
    from geneformer_pretrain.inference.model import load_model
    from geneformer_pretrain.inference.pooling import mean_of_genes
    from geneformer_pretrain.inference.runner import Runner

    runner = Runner(load_model(folder), -2, longest=longest)

    def head(pack: Any, hidden: torch.Tensor, parts: Any) -> torch.Tensor:
        return mean_of_genes(hidden, parts)

    rate = runner.measure(head, 1024, 2.0)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            runner.measure(head, 1024, 0.1)
        print(found.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))
    return rate


def line(model: str, lengths: str, what: str, rate: float, note: str = "") -> None:
    """Print a line of the table."""
    print(f"{model:8} {lengths:10} {what:30} {rate:14,.0f} tokens/s  {note}", flush=True)


def scaling(found: dict[str, Any], one: dict[str, Any] | None) -> str:
    """Rates of a command on several GPUs as a share of so many times one GPU."""
    forward = f"forward alone {found['forward_tokens_per_second']:,.0f}"
    if one is None or found is one:
        return forward
    shares = [
        found[key] / one[key] / found["ranks"] * one["ranks"]
        for key in ("tokens_per_second", "forward_tokens_per_second")
    ]
    return f"{shares[0]:.0%} of {found['ranks']} times one; {forward} ({shares[1]:.0%})"


def measure_command(
    name: str, lengths: str, command: str, folder: Path, gpus: list[int], share: float
) -> dict[str, Any]:
    """Run `embed`, or `perturb` that deletes every gene, on each number of GPUs, with as much work for each GPU."""
    cells, output, options = EMBED_CELLS[name], folder / "embeddings.parquet", ["--overwrite"]
    if command == "perturb":
        cells, output = PERTURB_CELLS[name], folder / "perturbed"
        options += ["--mode", "delete", "--genes", "all", "--no-statistics"]
    results: dict[str, Any] = {}
    one: dict[str, Any] | None = None
    for number in gpus:
        corpus = folder / f"{command}.parquet"
        sizes = simulated(lengths, SIZES[name].longest).draw(max(8, int(cells * share * number)))
        write_corpus(corpus, name, sizes)
        found = run_command(command, folder / name, corpus, "--output", output, *options, ranks=number)
        one = one or found
        line(name, lengths, f"{command}, {number} x", found["tokens_per_second"], scaling(found, one))
        print(f"{'':20}{describe_phases(found)}; {len(sizes):,} cells of {sizes.mean():.0f} tokens", flush=True)
        results[f"{command} {lengths} x{number}"] = found
    return results


def measure_baselines(
    name: str, lengths: str, kinds: list[str], folder: Path, device: torch.device, embedded: dict[str, Any]
) -> dict[str, Any]:
    """Run stock BERT on some of the cells that `embed` ran on."""
    results: dict[str, Any] = {}
    for kind in kinds:
        number = BASELINE_CELLS[name][kind != "fp32"] if device.type == "cuda" else 8
        column = next(pq.ParquetFile(folder / "embed.parquet").iter_batches(number, columns=["input_ids"])).column(0)
        cells = [cell.values.to_numpy() for cell in column]
        found = measure_embedding(folder / name, cells, BASELINES[kind], device)
        ratio = embedded["tokens_per_second"] / found["tokens_per_second"] / embedded["ranks"]
        note = (
            f"embed is {ratio:.1f} times as fast; attention: {found['attention']}, batches of "
            f"{found['padded_tokens_of_a_batch']:,}; with shapes not seen before {found['tokens_per_second_cold']:,.0f}"
        )
        line(name, lengths, f"stock BERT, {BASELINES[kind]}", found["tokens_per_second"], note)
        results[f"stock {kind} {lengths}"] = {**found, "ratio": ratio}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def compare(args: argparse.Namespace, name: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure one model, and print a line for each measurement."""
    results: dict[str, Any] = {}
    write_model(folder / name, name)
    share = args.share if device.type == "cuda" else args.share * 0.00002
    if device.type == "cuda":
        results["runner"] = measure_runner(folder / name, SIZES[name].longest, args.profile)
        torch.cuda.empty_cache()
        line(name, "1,024", "runner alone", results["runner"])
    for lengths in args.lengths:
        for command in args.commands:
            results |= measure_command(name, lengths, command, folder, args.gpus, share)
        if "embed" in args.commands:
            embedded = results[f"embed {lengths} x{args.gpus[0]}"]
            results |= measure_baselines(name, lengths, args.baseline, folder, device, embedded)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["10m", "106m"], choices=list(SIZES), help="default: 10m 106m")
    parser.add_argument("--lengths", nargs="+", default=["lognormal"], choices=KINDS, help="default: lognormal")
    parser.add_argument("--commands", nargs="+", default=["embed", "perturb"], choices=["embed", "perturb"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], metavar="N", help="such as 1 4: one, then four")
    parser.add_argument("--baseline", nargs="*", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--share", type=float, default=1.0, help="of the cells of the commands; default: 1")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take longest")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    measure_models(args.models, lambda name, folder, device: compare(args, name, folder, device), args.json)


if __name__ == "__main__":
    main()
