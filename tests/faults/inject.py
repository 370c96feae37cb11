"""Runs `train.py` with a fault in its loader: `inject.py FAULT train.py [KEY=VALUE ...]`.

FAULT is `block:RANK:PACK`, where the loader of that rank never returns from that pack, or `slow:SECONDS`, where each
pack takes that long. Ranks other than the blocked one have more patience, so that only its alarm tells them, and report
later, when it has left. Reports are confirmed sooner than usual, to save time.
"""

import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from geneformer_pretrain.data.batch import BatchBuilder
from geneformer_pretrain.distributed import watchdog

watchdog.INTERVAL, watchdog.CONFIRM_SECONDS, watchdog.REPORT_SECONDS = 0.2, 1.0, 3.0
kind, *numbers = sys.argv[1].split(":")
rank = os.environ.get("RANK", "0")
if kind == "block" and rank != numbers[0]:
    watchdog.CONFIRM_SECONDS = 3.0
    watchdog.Watchdog.timeout = property(lambda self: 600.0, lambda self, value: None)  # type: ignore[assignment]
build = BatchBuilder.build


def faulty_build(self: BatchBuilder, pack: int, *args: Any) -> Any:
    """Build a micro-batch late, or never."""
    if kind == "slow":
        for _ in range(round(float(numbers[0]) / 0.05)):  # one long sleep would run out in a suspended process
            time.sleep(0.05)
    elif [rank, str(pack)] == numbers:
        threading.Event().wait()
    return build(self, pack, *args)


BatchBuilder.build = faulty_build  # type: ignore[assignment, method-assign]
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
