"""Make a corpus for benchmarks: random genes, lognormal lengths.

Lengths are exp(N(ln 900, 0.557)) clipped to [200, 2048], mean about 1,009: kinder to padding than real
corpora, which hold many short cells.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCAB_SIZE = 25_426
NUM_SPECIAL_TOKENS = 2


def lognormal_lengths(cells: int, seed: int = 0) -> np.ndarray:
    """Tokens of each cell, int64 [cells]."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(900), 0.557, cells)), 200, 2048).astype(np.int64)


def write_corpus(path: Path, cells: int, seed: int = 0) -> np.ndarray:
    """Write a parquet file of `cells` cells of distinct random genes; return their lengths."""
    lengths = lognormal_lengths(cells, seed)
    rng = np.random.default_rng(seed + 1)
    genes = np.tile(rng.permutation(np.arange(NUM_SPECIAL_TOKENS, VOCAB_SIZE, dtype=np.int16)), 2)
    starts = rng.integers(0, VOCAB_SIZE - NUM_SPECIAL_TOKENS, cells)
    with pq.ParquetWriter(path, pa.schema([("input_ids", pa.list_(pa.int16()))])) as writer:
        for first in range(0, cells, 10_000):
            part = slice(first, first + 10_000)
            values = np.concatenate([genes[s : s + n] for s, n in zip(starts[part], lengths[part], strict=True)])
            offsets = np.concatenate([[0], np.cumsum(lengths[part])]).astype(np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
            writer.write_table(pa.table({"input_ids": column}))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lengths = write_corpus(args.path, args.cells, args.seed)
    print(f"{args.path}: {args.cells:,} cells, mean {lengths.mean():.0f} tokens")


if __name__ == "__main__":
    main()
