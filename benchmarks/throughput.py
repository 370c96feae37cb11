"""Unpadded tokens per second of this project, beside a baseline measured in the same run.

    python benchmarks/throughput.py --models 10m 106m --lengths lognormal genecorpus
    python benchmarks/throughput.py --models 106m --engines ddp fsdp2 --nproc 1 2 4 --baseline
    python benchmarks/throughput.py --models 10m 106m 4b --variants as-shipped --save-every 50 --cold --baseline

Each row of the table is a real run of train.py through its loader and loop, ended once its steps are there: the
median over the wall-clock times of the last ones, fresh packs, metrics logged at every step. `--lengths` names the
corpora: `lognormal` (mean 1,009) is kind to padding, `genecorpus` (mean 509, many short cells) is not, and costs the
baseline more. `--variants as-shipped` leaves layers, precision and the interval of saves (15 minutes) to the
configuration; a run shorter than that has none, so `--save-every 50` adds some, from which the share that saves have at
the configuration's own interval is computed, or `--minutes 16` has the run last until one was due. `--cold` starts
each run with empty compile caches. The baseline is what a careful user of transformers would write: stock
BertForMaskedLM with SDPA, BF16 autocast, fused AdamW, a DataLoader with DataCollatorForLanguageModeling that pads to
the longest cell of the batch; plain, and under torch.compile.

Columns: unpadded tokens per second and GPU by the median step; its ratio to the best baseline of the model and lengths;
model FLOPs per second and their share of the peak (MFU); the median step and the slowest one as a multiple of it,
saving steps left out; tokens per second by wall-clock time, saves and all, as a share of the first column ("wall"); the
seconds that a save stops training, the first one, which pins memory, apart ("stall"); the share of time that saves
take at the configuration's own interval; seconds from the launch to the end of the first step, and of that step;
functions that torch.compile compiled again after it; peak memory. The JSON file has all of these.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lognormal_corpus import write_corpus
from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.planner.arithmetic import flops_per_token
from geneformer_pretrain.planner.lengths import KINDS
from geneformer_pretrain.planner.saving import save_interval

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "as-shipped": [],
    "torch-bf16": ["model.use_te_layers=false", "training.use_fp8=false"],
    "te-bf16": ["model.use_te_layers=true", "training.use_fp8=false"],
    "torch-fp8": ["model.use_te_layers=false", "training.use_fp8=true"],
    "te-fp8": ["model.use_te_layers=true", "training.use_fp8=true"],
}
ENGINES = {"ddp": [], "fsdp2": ["training.use_fsdp2=true"], "nvfsdp": ["training.use_nvfsdp=true"]}
BASELINE_CELLS = {"10m": 32, "106m": 16, "4b": 2, "v2_104m": 8, "v2_316m": 4}
H100_BF16_TFLOPS = 989.0


def configuration(name: str, args: argparse.Namespace) -> Config:
    """Compose a run's configuration; sizes and saves, which are all that is read, are the same in all variants."""
    return load_config(name, [*VARIANTS[args.variants[0]], *ENGINES[args.engines[0]], *args.overrides])


def attended(lengths: np.ndarray, seq_length: int) -> float:
    """Tokens that an average token attends to, sum(n^2) / sum(n)."""
    cut = np.minimum(lengths, seq_length).astype(np.float64)
    return float((cut**2).sum() / cut.sum())


def run_ours(name: str, corpus: Path, overrides: list[str], nproc: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run train.py; return what its metrics.jsonl tells of the steps after the first `args.skip`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"),
            *("train.py", "--config-name", name, *overrides),
            *(f"data.path={corpus}", f"data.cache_dir={corpus.parent}/cache", "training.wandb_init_args=null"),
            "training.num_train_steps=10000000",
            *([f"training.save_every_n_steps={args.save_every}"] if args.save_every else []),  # else as shipped
            f"training.checkpoint_dir={folder}/run",
        ]
        found = watch(command, Path(folder), args.steps, minutes=args.minutes, cold=args.cold)
    timed = found.records[args.skip :]
    seconds = statistics.median(record["seconds"] for record in timed)
    # The record after a save holds the time for which it stopped the training.
    stalls = [record["seconds"] - seconds for record in found.records if "save_seconds" in record]
    interval = save_interval(configuration(name, args).training, seconds)
    return {
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed) / nproc,
        "seconds": seconds,
        "slowest_over_median": max((r["seconds"] for r in timed if "save_seconds" not in r), default=seconds) / seconds,
        "wall_tokens_per_second": sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed) / nproc,
        "first_stall_seconds": stalls[0] if stalls else None,
        "stall_seconds": stalls[1:],
        "saving_share_as_shipped": statistics.median(stalls[1:]) / interval if stalls[1:] else None,
        "launch_to_first_step_seconds": found.launch_seconds,
        "first_step_seconds": found.records[0]["seconds"],
        "recompilations": found.recompilations,
        "loader_wait_seconds": statistics.median(record["loader_wait_seconds"] for record in timed),
        "packing_fill": statistics.mean(record["packing_fill"] for record in timed),
        "steps_timed": len(timed),
        "memory_gib": timed[-1].get("peak_memory_gib"),
    }


@dataclass(frozen=True)
class Watched:
    """Records of a run, seconds from its launch to the first one, and functions compiled again after that."""

    records: list[dict[str, Any]]
    launch_seconds: float
    recompilations: int


def watch(command: list[str], folder: Path, steps: int, *, minutes: float = 0.0, cold: bool = False) -> Watched:
    """Start a run in a folder, and end it once its steps are recorded: saving and exporting 4b takes minutes.

    Parameters
    ----------
    minutes
        The run goes on for this long at least.
    cold
        True for empty compile caches.
    """
    output, metrics = folder / "output", folder / "run" / "metrics.jsonl"
    environment = {**os.environ, "TORCH_LOGS": "recompiles"}
    if cold:
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR")
        environment |= {name: str(folder / name) for name in caches}
    launch, first, compiled_before = time.monotonic(), 0.0, 0
    with (
        output.open("w") as file,
        psutil.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            while True:
                is_over = process.poll() is not None
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                elapsed = time.monotonic() - launch
                if lines and not first:
                    first, compiled_before = elapsed, recompilations(output)
                if len(lines) > steps and elapsed > 60 * minutes:  # so that the last of them is whole
                    records = [json.loads(line) for line in lines[: -1 if minutes else steps]]
                    return Watched(records, first, recompilations(output) - compiled_before)
                if is_over:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()[-6000:]}")
                time.sleep(0.05)
        finally:
            tree = [process, *process.children(recursive=True)] if process.is_running() else []
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=30)


def recompilations(output: Path) -> int:
    """Count the functions that torch.compile reported to compile again."""
    return output.read_text(errors="replace").count("[__recompiles] Recompiling function")


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
    vocabulary = {"<pad>": 0, "<mask>": 1} | {f"g{i}": i for i in range(2, config.model.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    size = args.baseline_cells or BASELINE_CELLS[name]
    loader = DataLoader(
        Dataset(pq.read_table(corpus, columns=["input_ids"]).slice(0, size * args.steps)),
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
    rates: list[float] = []
    seconds: list[float] = []
    clock = time.perf_counter()
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
        "first_step_seconds": seconds[0],
        "steps_timed": len(seconds) - args.skip,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each run; the ratio is to the best baseline of the same model and lengths."""
    print(
        f"{'model':8} {'lengths':10} {'variant':22} {'GPUs':>4} {'tokens/s/GPU':>13} {'ratio':>6} {'TFLOP/s':>8}"
        f" {'MFU':>6} {'ms/step':>8} {'slowest':>8} {'wall':>6} {'stall: first':>12} {'later':>7} {'shipped':>8}"
        f" {'launch':>7} {'first':>7} {'again':>5} {'memory':>9}"
    )
    for row in rows:
        baselines = [
            other["tokens_per_second"]
            for other in rows
            if other["engine"] == "baseline" and (other["model"], other["lengths"]) == (row["model"], row["lengths"])
        ]
        ratio = f"{row['tokens_per_second'] / max(baselines):.2f}" if baselines else "-"
        wall = row.get("wall_tokens_per_second")
        stalls = row.get("stall_seconds")
        print(
            f"{row['model']:8} {row['lengths']:10} {row['variant'] + ' ' + row['engine']:22} {row['nproc']:4}"
            f" {row['tokens_per_second']:13,.0f} {ratio:>6} {row['tflops']:8.1f} {row['mfu']:6.1%}"
            f" {1e3 * row['seconds']:8.1f} {row['slowest_over_median']:7.2f}x"
            f" {written(wall and wall / row['tokens_per_second'], '.1%'):>6}"
            f" {written(row.get('first_stall_seconds'), '.2f', ' s'):>12}"
            f" {written(statistics.median(stalls) if stalls else None, '.2f', ' s'):>7}"
            f" {written(row.get('saving_share_as_shipped'), '.2%'):>8}"
            f" {written(row.get('launch_to_first_step_seconds'), '.1f', ' s'):>7}"
            f" {written(row['first_step_seconds'], '.1f', ' s'):>7} {written(row.get('recompilations'), 'd'):>5}"
            f" {written(row['memory_gib'], '.1f', ' GiB'):>9}",
            flush=True,
        )


def written(value: float | None, form: str, unit: str = "") -> str:
    """Write a number with its unit, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Run everything that was asked for, one process tree after the other."""
    for name, kind in itertools.product(args.models, args.lengths):
        config = configuration(name, args)
        longest = config.model.seq_length
        corpus = folder / f"{kind}-{longest}" / "corpus.parquet"
        corpus.parent.mkdir(exist_ok=True)
        lengths = write_corpus(corpus, args.cells, kind, longest)
        flops = flops_per_token(config.model, config.training.mlm_probability, attended(lengths, longest))

        def row(result: dict[str, Any], variant: str, engine: str, nproc: int) -> dict[str, Any]:
            tflops = result["tokens_per_second"] * flops / 1e12  # noqa: B023 - used within this turn of the loop
            labels = {"model": name, "lengths": kind, "variant": variant, "engine": engine, "nproc": nproc}  # noqa: B023
            return {**labels, **result, "tflops": tflops, "mfu": tflops / args.peak_tflops}

        for variant, engine, nproc in itertools.product(args.variants, args.engines, args.nproc):
            overrides = [*VARIANTS[variant], *ENGINES[engine], *args.overrides]
            print(f"measuring {name} {kind} {variant} {engine} on {nproc} GPUs", file=sys.stderr)
            yield row(run_ours(name, corpus, overrides, nproc, args), variant, engine, nproc)
        for baseline in args.baseline:
            # A process of its own, so that its memory is gone when train.py starts.
            print(f"measuring {name} {kind} of transformers, {baseline}", file=sys.stderr)
            worker = [sys.executable, *sys.argv, "--baseline-worker", name, baseline, str(corpus)]
            done = subprocess.run(worker, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the {baseline} baseline of {name} failed:\n{done.stderr[-4000:]}")
            yield row(json.loads(done.stdout.splitlines()[-1]), f"transformers {baseline}", "baseline", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(BASELINE_CELLS)
    parser.add_argument("--models", nargs="+", default=models[:2], choices=models, help="default: 10m 106m")
    parser.add_argument("--lengths", nargs="+", default=KINDS[:1], choices=KINDS, help="of cells; default: lognormal")
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
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long at least, beyond --steps")
    parser.add_argument("--save-every", type=int, default=0, help="save every so many steps too; 0: as shipped")
    parser.add_argument("--cold", action="store_true", help="start each run with empty compile caches")
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
        for row in measure(args, Path(folder)):
            rows.append(row)
            print_table([row])
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
    print()
    print_table(rows)


if __name__ == "__main__":
    main()
