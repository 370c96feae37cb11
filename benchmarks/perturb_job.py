"""The well-known job of in-silico perturbation: 1,500 cells, every gene deleted, one at a time.

A part of it is measured through the `perturb` command and the whole computed from the tokens of its forward passes.
The part has whole cells: every so-manyth in the order of their lengths, so that short and long ones are there as in
the whole; with several GPUs these cells once for each. Beside it, in the same run, stock BERT does as
the Geneformer tools do (FP32, batches of 100 copies, the original anew for each batch), and the same with BF16
autocast, on one batch of each of four cells that stand for a quarter of the work each.

Scores alone: the statistics of the whole take seconds. Models have random weights and cells random genes, with lengths
as in Genecorpus: neither matters for speed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
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
from benchmarks.inference_tools.stock import BF16, FP32, measure_deletion
from geneformer_pretrain.planner.lengths import simulated

PART_TOKENS = {"10m": 200_000_000, "106m": 50_000_000, "v2_104m": 50_000_000}
"""Tokens of the part for each GPU: half a minute of forward passes at most on an H200."""

STRATA = 4
"""Cells that the plain way is measured on."""


def forward_tokens(name: str, lengths: np.ndarray) -> np.ndarray:
    """Tokens of the forward passes for each cell: its copies, which lack one gene each, and the cell itself."""
    genes = lengths - 2 * ("<cls>" in SIZES[name].special)
    return genes * (lengths - 1) + lengths


def choose_part(tokens: np.ndarray, wanted: float) -> np.ndarray:
    """Places of about so many tokens of work in the cells sorted by length."""
    number = int(np.clip(round(len(tokens) * wanted / tokens.sum()), 1, len(tokens)))
    return ((np.arange(number) + 0.5) * len(tokens) / number).astype(int)


def measure(name: str, cells: int, gpus: int, folder: Path, device: torch.device, plain: list[str]) -> dict[str, Any]:
    """Measure one model's part, compute the whole, and print both."""
    write_model(folder / name, name)
    lengths = np.sort(simulated("genecorpus", SIZES[name].longest).draw(cells))
    tokens = forward_tokens(name, lengths)
    wanted = PART_TOKENS[name] if device.type == "cuda" else 20_000
    part = choose_part(tokens, wanted)
    corpus = folder / "part.parquet"
    write_corpus(corpus, name, np.tile(lengths[part], gpus))
    options = ("--mode", "delete", "--genes", "all", "--overwrite", "--no-statistics")
    found = run_command("perturb", folder / name, corpus, "--output", folder / "scores", *options, ranks=gpus)
    whole, perturbations = int(tokens.sum()), int(lengths.sum() - 2 * cells * ("<cls>" in SIZES[name].special))
    forward = whole / found["forward_tokens_per_second"]
    start = found["wall_seconds"] - found["forward_seconds"]
    seconds = start + forward
    print(
        f"{name}: {cells:,} cells of {lengths.mean():,.0f} tokens, {perturbations:,} perturbations, {whole:,} tokens\n"
        f"  {gpus} x, measured: {found['cells']:,} cells, {found['tokens']:,} tokens, forward "
        f"{found['forward_tokens_per_second']:,.0f} tokens/s; {describe_phases(found)}\n"
        f"  whole job, computed: {duration(seconds)} (start {start:.0f} s, forward {duration(forward)})",
        flush=True,
    )
    result = {
        "cells": cells,
        "perturbations": perturbations,
        "tokens": whole,
        "gpus": gpus,
        "part": found,
        "whole_seconds": seconds,
        "whole_forward_seconds": forward,
        "plain": {},
    }
    shares = np.searchsorted(np.cumsum(tokens), (np.arange(STRATA) + 0.5) / STRATA * whole)
    for kind in plain:
        rate = measure_deletion(folder / name, name, lengths[shares].tolist(), kind, device)
        plain_seconds = whole / rate["tokens_per_second"]
        ratio = plain_seconds / forward
        print(
            f"  plain, {kind}, 1 x: {rate['tokens_per_second']:,.0f} tokens/s, batches of {rate['batches']}; whole job "
            f"{duration(plain_seconds)}, {ratio:.1f} times as long as {gpus} x with `perturb`",
            flush=True,
        )
        result["plain"][kind] = {**rate, "whole_seconds": plain_seconds, "ratio": ratio}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def duration(seconds: float) -> str:
    """Seconds in the unit that people would choose."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["10m", "v2_104m"], choices=list(SIZES))
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--cells", type=int, default=1500, help="of the whole job; default: 1,500")
    parser.add_argument("--plain", nargs="*", default=[FP32, BF16], choices=[FP32, BF16], help="default: both")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    measure_models(
        args.models,
        lambda name, folder, device: measure(name, args.cells, args.gpus, folder, device, args.plain),
        args.json,
    )


if __name__ == "__main__":
    main()
