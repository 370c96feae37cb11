"""Make a corpus for benchmarks: random genes, lognormal lengths.

    python benchmarks/lognormal_corpus.py corpus.parquet --lengths genecorpus --cells 100000

Lengths are `lognormal`, exp(N(ln 900, 0.557)) clipped to [200, 2048], mean about 1,009, kinder to padding than real
corpora; or `genecorpus`, with the many short cells of Genecorpus-30M, exp(N(ln 255, 1.41)) clipped to [16, 2048], mean
509, or, for cells of up to 4,096 tokens, of Genecorpus-104M, exp(N(ln 1100, 0.83)) clipped to [16, 4096]. The genes of
a cell are distinct; all are within the vocabularies of Geneformer V1 and V2.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geneformer_pretrain.planner.lengths import KINDS, simulated

TOKENS = range(4, 20_275)
"""Genes of V2, all of which are genes of V1's numbering too."""


def write_corpus(path: Path, cells: int, lengths: str = "lognormal", longest: int = 2048, seed: int = 0) -> np.ndarray:
    """Write a parquet file of cells of distinct random genes, with `cell_id`; return their lengths, int64 [cells]."""
    sizes = simulated(lengths, longest).draw(cells, seed)
    rng = np.random.default_rng(seed + 1)
    genes = np.tile(rng.permutation(np.arange(TOKENS.start, TOKENS.stop, dtype=np.uint16)), 2)
    starts = rng.integers(0, len(TOKENS), cells)
    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("cell_id", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first in range(0, cells, 10_000):
            part = slice(first, first + 10_000)
            tokens = np.concatenate([genes[s : s + n] for s, n in zip(starts[part], sizes[part], strict=True)])
            offsets = np.concatenate([[0], np.cumsum(sizes[part])]).astype(np.int32)
            ids = [f"cell-{number}" for number in range(first, first + len(offsets) - 1)]
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
            writer.write_table(pa.table([column, pa.array(ids)], schema=schema))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--lengths", choices=KINDS, default=KINDS[0], help=f"default: {KINDS[0]}")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest cell; default: 2,048")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = write_corpus(args.path, args.cells, args.lengths, args.longest, args.seed)
    print(f"{args.path}: {args.cells:,} cells, mean {sizes.mean():.0f} tokens")


if __name__ == "__main__":
    main()
