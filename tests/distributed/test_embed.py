"""`embed` and `perturb` on several ranks and after kills, as real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from geneformer_pretrain.inference.embed import EmbedOptions, embed
from geneformer_pretrain.inference.perturb import perturb
from geneformer_pretrain.inference.perturbations import PerturbOptions
from tests.forks import ROOT, Fork, run_script
from tests.unit.inference.worlds import make_cells, make_world, write_cells

SMALL_PARTS = """
import sys
import geneformer_pretrain.inference.embed as embed
import geneformer_pretrain.inference.perturb as perturb
from geneformer_pretrain.cli import main

embed.PART_TOKENS, embed.GENES_PART_TOKENS = 2000, 2000
perturb.PART_TOKENS, perturb.MEASURED_SECONDS = 20_000, 0.01
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder, "v1")
    world.cells = make_cells(240, seed=3)
    world.path = write_cells(folder / "many.parquet", world.cells, state=["A", "B"] * 120)
    world.program = folder / "small_parts.py"
    world.program.write_text(SMALL_PARTS)
    return world


def start_alone(world, folder, *arguments):
    return Fork(folder / "output", run_script, world.program, list(map(str, arguments)))


def start_on_two_ranks(world, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *launcher, str(world.program), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def vectors(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist())


def test_two_ranks_write_what_one_writes(world, tmp_path):
    report = tmp_path / "report.json"
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    genes = tmp_path / "one-genes.parquet", tmp_path / "two-genes.parquet"
    embed(EmbedOptions(world.model, [str(world.path)], one, genes=genes[0]))
    options = ("--genes", genes[1], "--report", report, "--pack-tokens", 512)
    output = finish(start_on_two_ranks(world, "embed", world.model, world.path, "--output", two, *options))
    assert output.count("Seconds: ") == 1
    facts = json.loads(report.read_text())
    assert facts["ranks"] == len(facts["forward_seconds_of_ranks"]) == 2
    np.testing.assert_allclose(vectors(one), vectors(two), atol=1e-6)
    assert pq.read_table(two)["cell"].to_pylist() == list(range(240))
    np.testing.assert_allclose(vectors(genes[0]), vectors(genes[1]), atol=1e-6)


def test_perturb_on_two_ranks(world, tmp_path):
    options = {"mode": "delete", "max_cells": 60, "statistics": False, "states": "state", "start": "A", "goal": "B"}
    perturb(PerturbOptions(world.model, [str(world.path)], tmp_path / "one", **options))
    arguments = ["--mode", "delete", "--max-cells", 60, "--no-statistics", "--pack-tokens", 512]
    # Not --start, which torchrun takes for an option of its own under Python 3.11.
    arguments += ["--states", "state", "--start-state", "A", "--goal", "B", "--output", tmp_path / "two"]
    finish(start_on_two_ranks(world, "perturb", world.model, world.path, *arguments))
    one, two = (pq.read_table(tmp_path / name / "scores") for name in ("one", "two"))
    keys = ["cell", "cell_id", "perturbation", "rank"]
    assert one.select(keys).equals(two.select(keys))
    for name in ("gene_similarity", "cell_similarity", "shift_A", "shift_B"):
        np.testing.assert_allclose(one[name].to_numpy(), two[name].to_numpy(), atol=2e-6)
    assert len(list((tmp_path / "two" / "scores").glob("part-*.parquet"))) > 1


def test_a_rank_that_fails_gives_its_reason(world, tmp_path):
    process = start_on_two_ranks(
        world, "embed", world.model, tmp_path / "none.parquet", "--output", tmp_path / "o.parquet"
    )
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "none.parquet: no such file or folder" in printed
    assert f'File "{ROOT}/geneformer_pretrain' not in printed


@pytest.mark.parametrize("command", ["embed", "perturb"])
def test_killed_and_started_again(world, tmp_path, command):
    output = tmp_path / ("out.parquet" if command == "embed" else "out")
    arguments = [command, world.model, world.path, "--output", output, "--pack-tokens", 64]
    if command == "perturb":
        arguments += ["--mode", "delete", "--max-cells", 100, "--no-statistics"]
    parts = tmp_path / "out.parquet.parts" if command == "embed" else output / "scores"
    process = start_alone(world, tmp_path, *arguments)
    while not list(parts.glob("part-*[0-9].parquet")):
        assert not process.ended, process.wait().stderr
        time.sleep(0.01)
    process.kill()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*[0-9].parquet")}
    assert done
    report = tmp_path / "report.json"
    # With another number of ranks, which share what is left.
    finish(start_on_two_ranks(world, *arguments, "--report", report))
    assert json.loads(report.read_text())["tokens"] > 0
    reference = tmp_path / ("reference.parquet" if command == "embed" else "reference")
    if command == "embed":
        embed(EmbedOptions(world.model, [str(world.path)], reference))
        np.testing.assert_allclose(vectors(output), vectors(reference), atol=1e-6)
        return
    for name, when in done.items():
        assert (parts / name).stat().st_mtime_ns == when
    options = {"mode": "delete", "max_cells": 100, "statistics": False}
    perturb(PerturbOptions(world.model, [str(world.path)], reference, **options))
    found, expected = pq.read_table(parts), pq.read_table(reference / "scores")
    assert found["perturbation"].equals(expected["perturbation"])
    np.testing.assert_allclose(found["gene_similarity"].to_numpy(), expected["gene_similarity"].to_numpy(), atol=1e-6)


def test_two_at_once_are_refused(world, tmp_path):
    output = tmp_path / "out"
    arguments = ["perturb", world.model, world.path, "--output", output, "--mode", "delete", "--no-statistics"]
    first = start_alone(world, tmp_path, *arguments, "--pack-tokens", 64)
    while not (output / "scores" / "_job.json").exists():
        assert not first.ended, first.wait().stderr
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds its output and gets no further
    second = start_alone(world, tmp_path, *arguments).wait(timeout=100)
    first.kill()
    assert second.returncode == 1
    assert "another process works on it" in second.stdout + second.stderr
