"""Training gives the numbers that it gave before the package was rearranged, bit for bit.

`tests/data/l0_sanity_20_steps.json` was made at 3e1bc64. A change of the numbers needs a reason in LOG.md and a new
file, made by the same command.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/data/l0_sanity_20_steps.json").read_text())

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""The same instructions and order of sums on every x86-64 processor."""


def has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " avx2 " in cpuinfo.read_text()


@pytest.mark.skipif(not has_avx2(), reason="the numbers are those of x86-64 processors with AVX2")
@pytest.mark.skipif(
    torch.__version__.split("+")[0] != GOLDEN["torch"], reason=f"the numbers are those of torch {GOLDEN['torch']}"
)
def test_losses_and_gradient_norms_are_bitwise_the_same(tmp_path: Path) -> None:
    given = [
        "training.num_train_steps=20",
        f"training.checkpoint_dir={tmp_path / 'run'}",
        "training.wandb_init_args=null",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    command = [sys.executable, "train.py", *given]
    subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=280)
    records = read_metrics(tmp_path / "run")
    assert [record["loss"] for record in records] == GOLDEN["loss"]
    assert [record["grad_norm"] for record in records] == GOLDEN["grad_norm"]
