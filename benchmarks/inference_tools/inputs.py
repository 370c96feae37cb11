"""Models with random weights, cells of random genes, and commands run on them."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from geneformer_pretrain.tokenization.gene_set import GeneSet

ROOT = Path(__file__).resolve().parents[2]

V1, V2 = ["<pad>", "<mask>"], ["<pad>", "<mask>", "<cls>", "<eos>"]


@dataclass(frozen=True)
class Size:
    """Architecture of a model.

    Attributes
    ----------
    layers, hidden, intermediate, heads
        Of BERT.
    vocab_size, special, longest
        Of the gene set.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab_size: int = 25_426
    special: tuple[str, ...] = tuple(V1)
    longest: int = 2048


SIZES = {
    "10m": Size(6, 256, 512, 4),
    "106m": Size(12, 768, 3072, 12),
    "v2_104m": Size(12, 768, 3072, 12, 20_275, tuple(V2), 4096),
}


def write_model(folder: Path, name: str) -> None:
    """Save a model with random weights, and a gene set of made-up genes."""
    size = SIZES[name]
    config = transformers.BertConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        hidden_act="relu",
        max_position_embeddings=size.longest,
        layer_norm_eps=1e-12,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    special = len(size.special)
    genes = [f"GENE{number:05d}" for number in range(size.vocab_size - special)]
    medians = np.ones(size.vocab_size)
    medians[:special] = np.nan
    tokens = [*size.special, *genes]
    GeneSet("benchmark", None, tokens, [None] * size.vocab_size, medians, size.longest).write(folder)


def write_corpus(path: Path, name: str, lengths: np.ndarray, seed: int = 0) -> None:
    """Write cells of distinct random genes, with the columns of `tokenize`."""
    size = SIZES[name]
    special = len(size.special)
    added = int("<cls>" in size.special)
    rng = np.random.default_rng(seed)
    genes = np.tile(special + rng.permutation(size.vocab_size - special).astype(np.uint16), 2)
    starts = rng.integers(0, size.vocab_size - special, len(lengths))
    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("length", pa.int32()), ("cell_id", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first in range(0, len(lengths), 8192):
            some = lengths[first : first + 8192]
            cells = [genes[s : s + n] for s, n in zip(starts[first : first + 8192], some, strict=True)]
            tokens, ends = np.concatenate(cells), np.cumsum(some)
            if added:
                tokens[ends - some], tokens[ends - 1] = size.special.index("<cls>"), size.special.index("<eos>")
            offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
            ids = pa.array([f"cell-{number}" for number in range(first, first + len(some))])
            column = pa.ListArray.from_arrays(offsets, pa.array(tokens))
            writer.write_table(pa.table([column, pa.array(some, pa.int32()), ids], schema=schema))


def run_command(*arguments: object, ranks: int = 1) -> dict[str, Any]:
    """Run a command of the package, on several ranks by torchrun, and return its report with `wall_seconds`."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*launcher, "-m", "geneformer_pretrain", *map(str, arguments), "--report", str(report)]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
        return {**json.loads(report.read_text()), "wall_seconds": time.perf_counter() - began}


def describe_phases(report: dict[str, Any]) -> str:
    """Seconds of each phase of a command, and of the whole process."""
    phases = [
        f"{key.removesuffix('_seconds').replace('_', '-')} {value:.1f}"
        for key, value in report.items()
        if key.endswith("_seconds")
    ]
    own = report.get("forward_seconds_of_ranks")
    by_rank = "; forward by rank " + ", ".join(f"{value:.1f}" for value in own) if own else ""
    return "s: " + ", ".join(phases) + by_rank


def measure_models(
    names: list[str], measure: Callable[[str, Path, torch.device], dict[str, Any]], output: Path | None
) -> None:
    """Measure one model after the other in a temporary folder, and write what there is to a JSON file after each."""
    device, name_of_device = where()
    print(f"{name_of_device}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, Any] = {"device": name_of_device}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            results[name] = measure(name, Path(folder), device)
            if output:
                output.write_text(json.dumps(results, indent=1) + "\n")


def where() -> tuple[torch.device, str]:
    """The device, and its name for people."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    return torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
