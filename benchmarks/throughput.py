"""Unpadded tokens per second of this project, beside a baseline measured in the same run.

    python benchmarks/throughput.py --models 10m 106m --variants torch-bf16 te-fp8
    python benchmarks/throughput.py --models 106m --engines ddp fsdp2 --nproc 1 2 4 --baseline
    python benchmarks/throughput.py --models 106m --save-every 50 --baseline

Each row of the table is a real run of train.py through its loader and loop, ended once its steps are there: the
median over the wall-clock times of the last ones, fresh packs, metrics logged at every step. The baseline is what a
careful user of transformers would write: stock BertForMaskedLM with SDPA, BF16 autocast, fused AdamW, a DataLoader
with DataCollatorForLanguageModeling that pads to the longest cell of the batch; plain, and under torch.compile.

Columns: unpadded tokens per second and GPU; its ratio to the best baseline of the model; model FLOPs per second
and their share of the peak (MFU); the median step and the slowest one as a multiple of it, saving steps left out;
the share of time that saving costs; seconds of the first step, with compilation; peak memory. The JSON file also has
the seconds that each save costs: the first one pins memory for all.

Model FLOPs count matrix products alone, 2 for each multiply-add, and the backward as twice the forward:

    per token and layer    2 (4 H^2 + 2 H F) + 4 H L       L = sum(n^2) / sum(n) over the cells' lengths n
    head                   2 m (H^2 + H V)                 m = share of masked tokens

They are the same for every implementation: what padding or a head on all tokens costs on top is waste, not work.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lognormal_corpus import NUM_SPECIAL_TOKENS, VOCAB_SIZE, write_corpus
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.model import ModelConfig
from geneformer_pretrain.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "torch-bf16": ["model.use_te_layers=false", "training.use_fp8=false"],
    "te-bf16": ["model.use_te_layers=true", "training.use_fp8=false"],
    "torch-fp8": ["model.use_te_layers=false", "training.use_fp8=true"],
    "te-fp8": ["model.use_te_layers=true", "training.use_fp8=true"],
}
ENGINES = {"ddp": [], "fsdp2": ["training.use_fsdp2=true"], "nvfsdp": ["training.use_nvfsdp=true"]}
BASELINE_CELLS = {"10m": 32, "106m": 16, "4b": 2}
H100_BF16_TFLOPS = 989.0


def configuration(name: str, args: argparse.Namespace) -> Config:
    """Of one of the runs; the sizes, which are all that is read, are the same in all of them."""
    return load_config(name, [*VARIANTS[args.variants[0]], *ENGINES[args.engines[0]], *args.overrides])


def model_flops_per_token(model: ModelConfig, lengths: np.ndarray, mlm_probability: float) -> float:
    """FLOPs of forward and backward for one unpadded token; the formula stands at the top of this file."""
    h, f = model.hidden_size, model.intermediate_size
    lengths = np.minimum(lengths, model.seq_length).astype(np.float64)
    attended = (lengths**2).sum() / lengths.sum()
    layers = model.num_hidden_layers * (2 * (4 * h * h + 2 * h * f) + 4 * h * attended)
    return 3 * (layers + mlm_probability * 2 * (h * h + h * model.vocab_size))


def run_ours(name: str, corpus: Path, overrides: list[str], nproc: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run train.py; return what its metrics.jsonl tells of the steps after the first `args.skip`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"),
            *("train.py", "--config-name", name, *overrides),
            *(f"data.path={corpus}", f"data.cache_dir={corpus.parent}/cache", "training.wandb_init_args=null"),
            f"training.num_train_steps={100 * args.steps}",
            *([f"training.save_every_n_steps={args.save_every}"] if args.save_every else []),  # else as shipped
            f"training.checkpoint_dir={folder}/run",
        ]
        records = records_of_run(command, Path(folder), args.steps)
    timed = records[args.skip :]
    seconds = statistics.median(record["seconds"] for record in timed)
    # A save delays the end of the step before it or of the step after it.
    delay = {record["step"]: record["seconds"] - seconds for record in timed}
    every = range(args.save_every, args.steps + 1, args.save_every) if args.save_every else range(0)
    saves = [step for step in every if step >= args.skip]
    saving = {step + late for step in saves for late in (0, 1)}
    save_seconds = [delay.get(step, 0.0) + delay.get(step + 1, 0.0) for step in saves]
    return {
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed) / nproc,
        "seconds": seconds,
        "slowest_over_median": max(r["seconds"] for r in timed if r["step"] not in saving) / seconds,
        "saving_share": sum(save_seconds) / sum(record["seconds"] for record in timed),
        "save_seconds": save_seconds,
        "first_step_seconds": records[0]["seconds"],
        "memory_gib": timed[-1].get("peak_memory_gib"),
    }


def records_of_run(command: list[str], folder: Path, steps: int) -> list[dict[str, Any]]:
    """Start a run in a folder, and end it when so many steps are recorded: saving and exporting 4b takes minutes."""
    output, metrics = folder / "output", folder / "run" / "metrics.jsonl"
    with output.open("w") as file, psutil.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        try:
            while True:
                is_over = process.poll() is not None
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if len(lines) > steps:  # so that the last of them is whole
                    return [json.loads(line) for line in lines[:steps]]
                if is_over:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()[-6000:]}")
                time.sleep(0.1)
        finally:
            tree = [process, *process.children(recursive=True)] if process.is_running() else []
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=30)


def run_baseline(name: str, corpus: Path, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train stock BERT on the same cells in this process."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration(name, args)
    vocabulary = {"<pad>": 0, "<mask>": 1} | {f"g{i}": i for i in range(NUM_SPECIAL_TOKENS, VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    size = args.baseline_cells or BASELINE_CELLS[name]
    loader = DataLoader(
        Dataset(pq.read_table(corpus).slice(0, size * args.steps)),
        batch_size=size,
        shuffle=True,
        drop_last=True,
        num_workers=min(8, os.cpu_count() or 1),
        pin_memory=device.type == "cuda",
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=config.training.mlm_probability),
    )
    model = BertForMaskedLM(BertConfig(**config.model.architecture(), attn_implementation="sdpa")).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if kind == "compile" else model
    rates, seconds, clock = [], [], time.perf_counter()
    for batch in loader:
        tokens = int(batch["attention_mask"].sum())
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append(now - clock)
        rates.append(tokens / seconds[-1])
        clock = now
    median = statistics.median(seconds[args.skip :])
    return {
        "tokens_per_second": statistics.median(rates[args.skip :]),
        "seconds": median,
        "slowest_over_median": max(seconds[args.skip :]) / median,
        "saving_share": 0.0,
        "first_step_seconds": seconds[0],
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each run; the ratio is to the best baseline of the same model."""
    print(
        f"{'model':6} {'variant':22} {'GPUs':>4} {'tokens/s/GPU':>13} {'ratio':>6} {'TFLOP/s':>8} {'MFU':>6}"
        f" {'ms/step':>8} {'slowest':>8} {'saving':>7} {'first':>7} {'memory':>9}"
    )
    for row in rows:
        baselines = [r["tokens_per_second"] for r in rows if r["model"] == row["model"] and r["engine"] == "baseline"]
        ratio = f"{row['tokens_per_second'] / max(baselines):6.2f}" if baselines else "     -"
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB"
        print(
            f"{row['model']:6} {row['variant'] + ' ' + row['engine']:22} {row['nproc']:4}"
            f" {row['tokens_per_second']:13,.0f} {ratio} {row['tflops']:8.1f} {row['mfu']:6.1%}"
            f" {1e3 * row['seconds']:8.1f} {row['slowest_over_median']:7.2f}x {row['saving_share']:7.1%}"
            f" {row['first_step_seconds']:5.1f} s {memory:>9}",
            flush=True,
        )


def measure(args: argparse.Namespace, corpus: Path, lengths: np.ndarray) -> Iterator[dict[str, Any]]:
    """Run everything that was asked for, one process tree after the other."""
    for name in args.models:
        config = configuration(name, args)
        flops = model_flops_per_token(config.model, lengths, config.training.mlm_probability)

        def row(result: dict[str, Any], variant: str, engine: str, nproc: int) -> dict[str, Any]:
            tflops = result["tokens_per_second"] * flops / 1e12  # noqa: B023 - used within this turn of the loop
            labels = {"model": name, "variant": variant, "engine": engine, "nproc": nproc}  # noqa: B023
            return {**labels, **result, "tflops": tflops, "mfu": tflops / args.peak_tflops}

        for variant, engine, nproc in itertools.product(args.variants, args.engines, args.nproc):
            overrides = [*VARIANTS[variant], *ENGINES[engine], *args.overrides]
            print(f"measuring {name} {variant} {engine} on {nproc} GPUs", file=sys.stderr)
            yield row(run_ours(name, corpus, overrides, nproc, args), variant, engine, nproc)
        for kind in args.baseline:
            # A process of its own, so that its memory is gone when train.py starts.
            print(f"measuring {name} of transformers, {kind}", file=sys.stderr)
            worker = [sys.executable, *sys.argv, "--baseline-worker", name, kind, str(corpus)]
            done = subprocess.run(worker, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the {kind} baseline of {name} failed:\n{done.stderr[-4000:]}")
            yield row(json.loads(done.stdout.splitlines()[-1]), f"transformers {kind}", "baseline", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["10m", "106m", "4b"]
    parser.add_argument("--models", nargs="+", default=models[:2], choices=models, help="default: 10m 106m")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["torch-bf16"],
        choices=list(VARIANTS),
        help="layers and precision; default: torch-bf16",
    )
    parser.add_argument("--engines", nargs="+", default=["ddp"], choices=list(ENGINES), help="default: ddp")
    parser.add_argument("--nproc", nargs="+", type=int, default=[1], help="numbers of GPUs; default: 1")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run; default: 150")
    parser.add_argument("--skip", type=int, default=40, help="steps not timed at the start; default: 40")
    parser.add_argument("--save-every", type=int, default=0, help="save asynchronously every so many steps; 0: never")
    parser.add_argument("--cells", type=int, default=20_000, help="cells of the corpus made for this; default: 20,000")
    kinds = ["plain", "compile"]
    parser.add_argument(
        "--baseline", nargs="*", default=kinds, choices=kinds, help="default: both; with no value: none"
    )
    parser.add_argument("--baseline-cells", type=int, help=f"cells of its batches; default {BASELINE_CELLS}")
    parser.add_argument("--overrides", nargs="*", default=[], help="KEY=VALUE for every run")
    parser.add_argument("--peak-tflops", type=float, default=H100_BF16_TFLOPS, help="dense BF16 peak, for MFU")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, for benchmarks/chart.py")
    parser.add_argument("--baseline-worker", nargs=3, metavar=("MODEL", "KIND", "CORPUS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run under way ends with the benchmark
    if args.skip >= args.steps:
        parser.error(f"--skip {args.skip} leaves no step of --steps {args.steps} to be timed")
    if args.baseline_worker:
        name, kind, corpus = args.baseline_worker
        print(json.dumps(run_baseline(name, Path(corpus), kind, args)))
        return

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.parquet"
        for row in measure(args, corpus, write_corpus(corpus, args.cells)):
            rows.append(row)
            print_table([row])
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()
