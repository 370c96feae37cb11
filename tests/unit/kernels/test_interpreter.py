"""The Triton kernels on a CPU, in a process whose Triton interprets them: it decides on that when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

FILE = Path(__file__).with_name("interpreted.py")


def test_kernels_by_the_interpreter():
    pytest.importorskip(
        "triton", reason="Triton is not installed; PyTorch for CPUs comes without it: pip install triton"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FILE],
        cwd=FILE.parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout
