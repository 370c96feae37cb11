"""Speed of the data path: planning, and masked batches per second beside the Hugging Face baseline.

Run from the repository's root: ``python benchmarks/loader.py --help``.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.data.batch import BatchBuilder, build_batches
from geneformer_pretrain.data.corpus import Corpus, open_corpus
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.data.masking import MaskRule
from geneformer_pretrain.data.packing import BatchShape
from geneformer_pretrain.data.stream import PackStream

VOCAB_SIZE = 25426
SEQ_LENGTH = 2048
MLM_PROBABILITY = 0.15


def lognormal_lengths(num_cells: int) -> np.ndarray:
    """int32 lengths with mean 1,009: exp(N(ln 900, 0.557)) clipped to [200, 2048]."""
    generator = np.random.default_rng(0)
    lengths = np.empty(num_cells, np.int32)
    for start in range(0, num_cells, 2**20):
        part = lengths[start : start + 2**20]
        part[:] = np.exp(generator.normal(np.log(900), 0.557, len(part))).clip(200, 2048)
    return lengths


def write_corpus(path: Path, num_cells: int) -> None:
    """Write a parquet file of uniformly drawn genes with lognormal lengths."""
    generator = np.random.default_rng(1)
    lengths = lognormal_lengths(num_cells)
    schema = pa.schema({"input_ids": pa.list_(pa.int16())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_cells, 10_000):
            offsets = np.concatenate([[0], lengths[start : start + 10_000].cumsum()]).astype(np.int32)
            tokens = generator.integers(2, VOCAB_SIZE, offsets[-1], dtype=np.int16)
            writer.write_table(pa.table([pa.ListArray.from_arrays(offsets, tokens)], schema=schema))


def cells_per_second_of_baseline(path: Path, num_cells: int, batch_size: int) -> float:
    """Hugging Face dataset, DataCollatorForLanguageModeling and a DataLoader, in this process."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    disable_progress_bars()
    vocabulary = {"<pad>": 0, "<mask>": 1} | {f"gene{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
    with tempfile.TemporaryDirectory() as cache:
        dataset = Dataset.from_parquet(str(path), cache_dir=cache).select(range(num_cells))
        batches = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, collate_fn=collator)
        start = time.perf_counter()
        cells = sum(len(batch["input_ids"]) for batch in batches)
        return cells / (time.perf_counter() - start)


def cells_per_second(corpus: Corpus, micro_batch_size: int, packing: bool, num_workers: int, seconds: float) -> float:
    """Our loader; median of five intervals, after an epoch that warms the page cache."""
    shape = BatchShape.create(
        corpus.lengths,
        micro_batch_size=micro_batch_size,
        seq_length=SEQ_LENGTH,
        mlm_probability=MLM_PROBABILITY,
        packing=packing,
    )
    builder = BatchBuilder(
        corpus,
        shape,
        vocab_size=VOCAB_SIZE,
        pad_token_id=0,
        mask_rule=MaskRule(0, MLM_PROBABILITY, VOCAB_SIZE, num_special_tokens=2, mask_token_id=1),
        packing=packing,
    )
    stream = PackStream(corpus.lengths, corpus.fingerprint, 0, shape, packing)
    for _ in build_batches(builder, stream, range(stream.plan(0).num_packs)):
        pass
    rates = []
    with Loader(builder, stream, range(10**9), num_workers) as loader:
        for _ in range(5):
            cells, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds / 5:
                cells += next(loader).num_cells
            rates.append(cells / (time.perf_counter() - start))
    return float(np.median(rates))


def time_planning(num_cells: int) -> None:
    """Print seconds and memory of one epoch's plan with packs of 16,384 tokens."""
    lengths = lognormal_lengths(num_cells)
    shape = BatchShape.create(lengths, micro_batch_size=8, seq_length=SEQ_LENGTH, mlm_probability=MLM_PROBABILITY)
    PackStream(lengths[:1000], "warm-up", 0, shape).locate(0)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        plan = PackStream(lengths, "benchmark", 0, shape, plan_dir=folder).plan(0)
        planned = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        start = time.perf_counter()
        PackStream(lengths, "benchmark", 0, shape, plan_dir=folder).locate(0)
        opened = time.perf_counter() - start
    fill = lengths.sum(dtype=np.int64) / (plan.num_packs * shape.token_budget)
    print(
        f"plan of {num_cells:,} cells: {planned:.2f} s, {memory / 1024:.0f} MB more at the peak, "
        f"fill {fill:.2%} at {shape.token_budget} tokens; opened again in {opened:.3f} s"
    )


def main() -> None:
    """Parse the command line and print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000, help="cells of the corpus made for the loader")
    parser.add_argument("--baseline-cells", type=int, default=4_000, help="cells for the baseline; 0 skips it")
    parser.add_argument("--plan-cells", type=int, default=30_000_000, help="cells to plan; 0: none")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="x 2,048 tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2], help="loader threads to try")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    arguments = parser.parse_args()

    if arguments.plan_cells:
        time_planning(arguments.plan_cells)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.parquet"
        write_corpus(path, arguments.cells)
        if arguments.baseline_cells:
            baseline = cells_per_second_of_baseline(path, arguments.baseline_cells, arguments.micro_batch_size)
            print(f"Hugging Face dataset and collator, one process: {baseline:,.0f} cells/s")
        corpus = open_corpus(path, Path(folder) / "cache")
        print(f"corpus of {corpus.num_cells:,} cells, mean length {corpus.lengths.mean():,.0f}")
        for threads in arguments.threads:
            rate = cells_per_second(corpus, arguments.micro_batch_size, True, threads, arguments.seconds)
            print(f"packed, {threads or 'no'} threads: {rate:,.0f} cells/s")
        rate = cells_per_second(corpus, arguments.micro_batch_size, False, 0, arguments.seconds)
        print(f"padded reference, no threads: {rate:,.0f} cells/s")


if __name__ == "__main__":
    main()
