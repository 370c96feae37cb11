"""Unpadded tokens per second of this project, beside a baseline measured in the same run.

    python benchmarks/throughput.py --models 10m 106m --variants torch-bf16 te-fp8
    python benchmarks/throughput.py --models 106m --engines ddp fsdp2 --nproc 2

Each cell of the table is a real run of train.py through its loader and loop: the median over the wall-clock times
of its last steps, fresh packs, metrics logged at every step. The baseline is what a careful user of transformers
would write: stock BertForMaskedLM with SDPA, BF16 autocast, fused AdamW, a DataLoader with
DataCollatorForLanguageModeling that pads to the longest cell of the batch; plain, and under torch.compile.

Model FLOPs count matrix products alone, 2 for each multiply-add, and the backward as twice the forward:

    per token and layer    2 (4 H^2 + 2 H F) + 4 H L       L = sum(n^2) / sum(n) over the cells' lengths n
    head                   2 m (H^2 + H V)                 m = share of masked tokens

They are the same for every implementation: what padding or a head on all tokens costs on top is waste, not work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lognormal_corpus import NUM_SPECIAL_TOKENS, VOCAB_SIZE, write_corpus

from geneformer_pretrain.config import ModelConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "torch-bf16": ["model.use_te_layers=false"],
    "te-bf16": ["model.use_te_layers=true"],
    "te-fp8": ["model.use_te_layers=true", "training.use_fp8=true"],
}
ENGINES = {"ddp": [], "fsdp2": ["training.use_fsdp2=true"], "nvfsdp": ["training.use_nvfsdp=true"]}
BASELINE_CELLS = {"10m": 32, "106m": 16, "4b": 2}
H100_BF16_TFLOPS = 989.0


def model_flops_per_token(model: ModelConfig, lengths: np.ndarray, mlm_probability: float) -> float:
    """FLOPs of forward and backward for one unpadded token; the formula stands at the top of this file."""
    h, f = model.hidden_size, model.intermediate_size
    lengths = np.minimum(lengths, model.seq_length).astype(np.float64)
    attended = (lengths**2).sum() / lengths.sum()
    layers = model.num_hidden_layers * (2 * (4 * h * h + 2 * h * f) + 4 * h * attended)
    return 3 * (layers + mlm_probability * 2 * (h * h + h * model.vocab_size))


def run_ours(name: str, corpus: Path, overrides: list[str], nproc: int, steps: int, skip: int) -> dict[str, Any]:
    """Run train.py; return the median speed, the slowest step and the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"),
            *("train.py", "--config-name", name, *overrides),
            *(f"data.path={corpus}", f"data.cache_dir={corpus.parent}/cache", "training.wandb_init_args=null"),
            *(f"training.num_train_steps={steps}", f"training.save_every_n_steps={10 * steps}"),
            f"training.checkpoint_dir={folder}",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timed = records[skip:-1]  # the last step waits for the final checkpoint
    seconds = [record["seconds"] for record in timed]
    return {
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed) / nproc,
        "milliseconds": 1e3 * statistics.median(seconds),
        "slowest_over_median": max(seconds) / statistics.median(seconds),
        "first_step_seconds": records[0]["seconds"],
        "memory_gib": timed[-1]["peak_memory_gib"],
    }


def run_baseline(name: str, corpus: Path, compiled: bool, steps: int, skip: int) -> dict[str, Any]:
    """Train stock BERT on the same cells in this process."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    from geneformer_pretrain.parallel import architecture

    config = load_config(name)
    vocabulary = {"<pad>": 0, "<mask>": 1} | {f"g{i}": i for i in range(NUM_SPECIAL_TOKENS, VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    size = BASELINE_CELLS[name]
    cells = pq.read_table(corpus).slice(0, size * (steps + 1))
    loader = DataLoader(
        Dataset(cells),
        batch_size=size,
        shuffle=True,
        drop_last=True,
        num_workers=8,
        pin_memory=True,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    model = BertForMaskedLM(BertConfig(**architecture(config.model), attn_implementation="sdpa")).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    rates, clock = [], time.perf_counter()
    for batch in loader:
        tokens = int(batch["attention_mask"].sum())
        batch = {key: value.cuda(non_blocking=True) for key, value in batch.items()}
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        now = time.perf_counter()
        rates.append((tokens / (now - clock), now - clock))
        clock = now
    timed = rates[skip:]
    return {
        "tokens_per_second": statistics.median(rate for rate, _ in timed),
        "milliseconds": 1e3 * statistics.median(seconds for _, seconds in timed),
        "slowest_over_median": max(s for _, s in timed) / statistics.median(s for _, s in timed),
        "first_step_seconds": rates[0][1],
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each measured cell; the ratio is to the best baseline of the same model."""
    print(
        f"{'model':6} {'variant':22} {'GPUs':>4} {'tokens/s/GPU':>13} {'ratio':>6} {'TFLOP/s':>8} {'MFU':>6}"
        f" {'ms/step':>8} {'slowest':>8} {'memory':>9}"
    )
    for row in rows:
        baselines = [r["tokens_per_second"] for r in rows if r["model"] == row["model"] and r["engine"] == "baseline"]
        ratio = f"{row['tokens_per_second'] / max(baselines):6.2f}" if baselines else "     -"
        print(
            f"{row['model']:6} {row['variant'] + ' ' + row['engine']:22} {row['nproc']:4}"
            f" {row['tokens_per_second']:13,.0f} {ratio} {row['tflops']:8.0f} {row['mfu']:6.1%}"
            f" {row['milliseconds']:8.1f} {row['slowest_over_median']:7.2f}x {row['memory_gib']:5.1f} GiB",
            flush=True,
        )


def draw_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens per second and GPU, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [row for row in rows if row["model"] == name]
        labels = [f"{row['variant']}\n{row['engine']} x{row['nproc']}" for row in mine]
        colors = ["tab:gray" if row["engine"] == "baseline" else "tab:blue" for row in mine]
        axis.bar(labels, [row["tokens_per_second"] / 1e3 for row in mine], color=colors)
        axis.set(title=name, ylabel="thousand unpadded tokens/s per GPU")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["10m", "106m"], choices=["10m", "106m", "4b"])
    parser.add_argument("--variants", nargs="+", default=["torch-bf16"], choices=list(VARIANTS))
    parser.add_argument("--engines", nargs="+", default=["ddp"], choices=list(ENGINES))
    parser.add_argument("--nproc", type=int, default=1, help="GPUs of each run")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--skip", type=int, default=40, help="steps not timed at the start")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--baseline", nargs="*", default=["plain", "compile"], choices=["plain", "compile"])
    parser.add_argument("--overrides", nargs="*", default=[], help="KEY=VALUE for every run of train.py")
    parser.add_argument("--peak-tflops", type=float, default=H100_BF16_TFLOPS, help="dense BF16 peak, for MFU")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--chart", type=Path, help="write a chart to this file (needs matplotlib)")
    parser.add_argument("--baseline-worker", nargs=3, metavar=("MODEL", "KIND", "CORPUS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.baseline_worker:
        name, kind, corpus = args.baseline_worker
        print(json.dumps(run_baseline(name, Path(corpus), kind == "compile", args.steps, args.skip)))
        return

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.parquet"
        lengths = write_corpus(corpus, args.cells)
        for name in args.models:
            config = load_config(name, args.overrides)
            flops = model_flops_per_token(config.model, lengths, config.training.mlm_probability)

            def add(result: dict[str, Any], variant: str, engine: str, nproc: int) -> None:
                tflops = result["tokens_per_second"] * flops / 1e12  # noqa: B023
                labels = {"model": name, "variant": variant, "engine": engine, "nproc": nproc}  # noqa: B023
                rows.append({**labels, **result, "tflops": tflops, "mfu": tflops / args.peak_tflops})
                print_table(rows[-1:])

            for kind in args.baseline:
                worker = [sys.executable, __file__, "--baseline-worker", name, kind, str(corpus)]
                worker += ["--steps", str(args.steps), "--skip", str(args.skip)]
                environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
                done = subprocess.run(worker, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise RuntimeError(f"the {kind} baseline of {name} failed:\n{done.stderr[-4000:]}")
                add(json.loads(done.stdout.splitlines()[-1]), f"transformers {kind}", "baseline", 1)
            for variant in args.variants:
                for engine in args.engines:
                    overrides = [*VARIANTS[variant], *ENGINES[engine], *args.overrides]
                    add(
                        run_ours(name, corpus, overrides, args.nproc, args.steps, args.skip),
                        variant,
                        engine,
                        args.nproc,
                    )
    print()
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.chart:
        draw_chart(rows, args.chart)


if __name__ == "__main__":
    main()
