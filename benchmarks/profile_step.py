"""Profile training steps: time by kernel, and any host-device synchronisation.

    python benchmarks/profile_step.py --config-name 106m data.path=corpus.parquet

Takes the configuration of a run; trains 30 steps in a temporary folder and profiles the last 5.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.distributed.world import distributed_world
from geneformer_pretrain.training.trainer import Trainer

WARMUP, PROFILED = 25, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", default="10m")
    parser.add_argument("--trace", type=Path, help="also write a Chrome trace to this file")
    parser.add_argument("--rows", type=int, default=30, help="kernels to list")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE as for train.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible here, and its kernels are what is profiled")
    with tempfile.TemporaryDirectory() as folder, distributed_world() as world:
        fixed = [f"training.checkpoint_dir={folder}", "training.wandb_init_args=null"]
        config = load_config(args.config_name, [*args.overrides, *fixed])
        trainer = Trainer(config, world)
        loader: Loader = trainer.loader()
        with loader:
            for step in range(WARMUP):
                trainer.step.run(loader, step)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                for step in range(WARMUP, WARMUP + PROFILED):
                    trainer.step.run(loader, step)
                torch.cuda.synchronize()
        events = [
            e
            for e in profiler.key_averages()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
        ]
        total = sum(e.self_device_time_total for e in events)
        print(f"{args.config_name}: {total / PROFILED / 1e3:.2f} ms of kernels per step")
        print(f"{'ms/step':>9} {'share':>6} {'calls':>6}  kernel")
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[: args.rows]:
            ms = e.self_device_time_total / PROFILED / 1e3
            print(f"{ms:9.3f} {e.self_device_time_total / total:6.1%} {e.count / PROFILED:6.0f}  {e.key[:120]}")
        if args.trace:
            profiler.export_chrome_trace(str(args.trace))


if __name__ == "__main__":
    main()
