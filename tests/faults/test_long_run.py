"""Promise 15: nothing grows in a long run."""

import statistics
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.results import steps_done
from tests.tiny import overrides, read_exit

MICRO = (
    "model.hidden_size=8",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=1",
    "model.intermediate_size=8",
    "training.keep_last_n=2",
    "training.async_save=true",
    "training.log_cell_ids=true",
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("steps", "warm", "save_every"), [(600, 200, 20), pytest.param(10_000, 2_000, 100, marks=pytest.mark.slow)]
)
def test_nothing_grows(tmp_path: Path, start: Any, tally: Any, steps: int, warm: int, save_every: int) -> None:
    """Memory, file handles and threads of both ranks, with saves in the background and all logs on."""
    row = tally(15, f"{steps:,} steps; no growth after {warm:,}")
    settings = (f"training.num_train_steps={steps}", f"training.save_every_n_steps={save_every}")
    # Of tiny corpora the plans of many epochs are kept, up to a limit that would not be reached here.
    given, run = overrides(tmp_path, *MICRO, *settings, num_cells=2 * steps), tmp_path / "run"
    process = start(given, 2)
    row.injected += 1
    samples: list[list[tuple[int, int, int]]] = []
    for wanted in range(warm, steps, save_every // 2):
        process.wait_until(lambda wanted=wanted: steps_done(run) >= wanted, f"step {wanted}", timeout=300)
        processes = [psutil.Process(rank.pid) for rank in process.ranks]
        samples.append([(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes])
    process.complete(300)
    assert read_exit(run)["step"] == steps
    third = len(samples) // 3
    for rank in range(2):
        early, late = samples[:third], samples[-third:]
        memory = [statistics.median(sample[rank][0] for sample in part) / 2**20 for part in (early, late)]
        # In the quietest moment: those of a save in the background come and go.
        handles, threads = ([min(sample[rank][i] for sample in part) for part in (early, late)] for i in (1, 2))
        assert memory[1] <= memory[0] + 2
        assert handles[1] <= handles[0]
        assert threads[1] <= threads[0]
    row.survived += 1
