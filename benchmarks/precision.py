"""Train the same runs in BF16 and in FP8 and compare where their losses end.

    python benchmarks/precision.py --data sample_data/cells.parquet cells_of_mine.parquet --models 10m 106m

A run is 300 steps at a constant pack size from one seed; its result is the mean loss of its last 50 steps. Each FP8
recipe is compared with BF16 by the means over the seeds: the difference should be within 1%, and no larger than
twice the spread (largest less smallest) of BF16's seeds.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed.world import World, distributed_world
from geneformer_pretrain.training.trainer import Trainer

REFERENCE = "bf16"
VARIANTS = {
    REFERENCE: ["model.use_te_layers=false", "training.use_fp8=false"],
    "te-bf16": ["model.use_te_layers=true", "training.use_fp8=false"],
    "torch-fp8": ["model.use_te_layers=false", "training.use_fp8=true"],
    **{
        f"fp8-{recipe}": ["model.use_te_layers=true", "training.use_fp8=true", f"training.fp8_recipe={recipe}"]
        for recipe in ("delayed", "current", "block")
    },
}


def losses(config: Config, world: World) -> list[float]:
    """Loss of each step of a run; nothing is saved or logged."""
    torch._dynamo.reset()
    trainer = Trainer(config, world)
    totals = []
    with trainer.loader() as loader:
        for step in range(config.training.num_train_steps):
            totals.append(trainer.step.run(loader, step).wait())
    return [loss_sum / masked for loss_sum, masked, *_ in totals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["sample_data/cells.parquet"], help="corpora")
    parser.add_argument("--models", nargs="+", default=["10m", "106m"], choices=["10m", "106m", "4b"])
    parser.add_argument("--variants", nargs="+", default=["fp8-delayed"], choices=list(VARIANTS)[1:])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last", type=int, default=50, help="steps at the end that are averaged")
    parser.add_argument("--cells", type=int, default=8, help="model.micro_batch_size")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--overrides", nargs="*", default=[], help="KEY=VALUE for every run")
    parser.add_argument("--json", type=Path, help="write every step's loss to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible here, and FP8 needs one")
    curves: list[dict[str, object]] = []
    print(f"{'data':28} {'model':5} {'variant':12} {'mean of the ends':>17} {'seeds':24} {'off':>7} {'allowed':>8}")
    with tempfile.TemporaryDirectory() as folder, distributed_world() as world:
        for data, model in itertools.product(args.data, args.models):
            reference: list[float] = []
            for variant in [REFERENCE, *args.variants]:
                ends = []
                for seed in args.seeds:
                    config = load_config(
                        model,
                        [
                            *(f"data.path={data}", f"data.cache_dir={folder}/cache"),
                            *(f"training.checkpoint_dir={folder}/run", "training.wandb_init_args=null"),
                            *(f"training.num_train_steps={args.steps}", "training.warmup_steps=null"),
                            *(f"training.seed={seed}", f"training.learning_rate={args.learning_rate}"),
                            *(f"model.micro_batch_size={args.cells}", *VARIANTS[variant], *args.overrides),
                        ],
                    )
                    curve = losses(config, world)
                    curves.append({"data": data, "model": model, "variant": variant, "seed": seed, "losses": curve})
                    ends.append(statistics.fmean(curve[-args.last :]))
                reference = reference or ends
                mean, expected = statistics.fmean(ends), statistics.fmean(reference)
                allowed = min(0.01 * expected, 2 * (max(reference) - min(reference)))
                off = abs(mean - expected)
                verdict = "" if variant == REFERENCE else f"{off:7.4f} {allowed:8.4f}{'  FAR' if off > allowed else ''}"
                seeds = " ".join(f"{end:.4f}" for end in ends)
                print(f"{data[-28:]:28} {model:5} {variant:12} {mean:17.4f} {seeds:24} {verdict}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    main()
