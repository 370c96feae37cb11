"""Make the sample data: SIMULATED single cells, tokenized as Geneformer V1 does. No real gene, cell or donor.

The simulated world, fixed by ``--seed``
    A cell's mRNA comes from *topics*. A topic is a set of genes with lognormal abundances: one housekeeping
    topic shared by all cells, one identity topic for each of 8 cell types, and 24 gene programmes (think of
    stress or cell cycle), of which each type uses five. Topics may share genes; some genes are in none.
A cell, fixed by ``--seed`` and the cell's number alone
    1. draws its type, its depth (lognormal number of counts) and how active each of its programmes is;
    2. draws every count: first a topic, by the topic's share in this cell, then a gene of that topic;
    3. is tokenized: x = count / n_counts * 10,000 / median[gene] for the genes that have counts, sorted by
       x in descending order (stable, so ties are in gene order), first 2,048 kept.
    median[gene] is the median of the non-zero count / n_counts * 10,000 over 3,000 reference cells of the
    same world. A gene that none of them expresses has no median and is never emitted.

Beyond gene frequencies a model can learn that the genes of a cell tell its type and its active programmes,
that a gene's rank tells of its abundance, and that no gene comes twice.

Reproducible: random numbers are raw bits of numpy's Philox, a fixed algorithm, turned into everything else
here, because the streams of numpy's distributions may change with its version. The parquet writer's options
are fixed; the file also holds pyarrow's version, so its bytes are the same for the same pyarrow.

Cells 0 to 499 are the committed sample, as tokens and as counts. Any later ones are held out, from the same world:

    python sample_data/make_sample_data.py --out sample_data/cells.parquet --vocab sample_data/vocab.txt
    python sample_data/make_sample_data.py --counts sample_data/counts.h5ad
    python sample_data/make_sample_data.py --first-cell 500 --cells 20000 --out held_out.parquet
    python sample_data/make_sample_data.py --cell-types --out labelled.parquet
    python sample_data/make_sample_data.py --describe
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SAMPLE_CELLS = 500
N_GENES = 25_424
MAX_TOKENS = 2_048
VOCABULARY = ["<pad>", "<mask>", *(f"sim_gene_{gene:05d}" for gene in range(2, N_GENES + 2))]
FIRST_GENE_TOKEN = 2

# Tuned to the real corpus: mean length 555, half of the cells at most 255 tokens, 7% at the cap, unigram
# entropy 8.6 nats.
TYPE_SHARES = np.array([0.20, 0.17, 0.15, 0.13, 0.11, 0.10, 0.08, 0.06])
N_TYPES, N_PROGRAMMES, PROGRAMMES_PER_TYPE = len(TYPE_SHARES), 24, 5
HOUSEKEEPING_GENES, IDENTITY_GENES, PROGRAMME_GENES = 1_150, 1_150, 120
HOUSEKEEPING_SHARE, IDENTITY_SHARE, PROGRAMME_SHARE = 0.45, 0.40, 0.15  # of a cell's counts
LOG_ABUNDANCE_SIGMA = 1.2  # within a topic
LOG_DEPTH_MEAN, LOG_DEPTH_SIGMA, MIN_DEPTH, MAX_DEPTH = 5.7, 2.4, 40, 60_000

WORLD_STREAM, CELL_STREAM, MASK_STREAM = 0, 1, 2
REFERENCE_CELLS, FIRST_REFERENCE_CELL = 3_000, 1 << 40  # numbered far above any cell that is written
ROW_GROUP_CELLS = 10_000
N_DONORS = 5
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int16())), ("length", pa.int32())])

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TypedCell = tuple[IntArray, int]  # token ids, cell type


class RandomStream:
    """Random numbers of one Philox stream; streams of different (seed, stream, number) never overlap."""

    def __init__(self, seed: int, stream: int, number: int = 0) -> None:
        self._bits = np.random.Philox(key=[seed, stream], counter=[0, number, 0, 0])

    def uniform(self, n: int) -> FloatArray:
        """Return ``n`` numbers inside (0, 1), ends excluded; a topic number adds to them without rounding."""
        bits = (self._bits.random_raw(n) >> np.uint64(24)).astype(np.float64)
        return (bits + 0.5) * 2.0**-40

    def normal(self, n: int) -> FloatArray:
        """Return ``n`` standard normal numbers (Box-Muller transform)."""
        return np.sqrt(-2.0 * np.log(self.uniform(n))) * np.cos(2.0 * np.pi * self.uniform(n))

    def choose(self, n: int, size: int) -> IntArray:
        """Return ``size`` distinct numbers of range(n), in random order."""
        return np.argsort(self.uniform(n), kind="stable")[:size]


@dataclass(frozen=True)
class World:
    """What all cells of one seed share. Topic 0 is housekeeping, then come identities, then programmes."""

    seed: int
    topic_cdf: FloatArray
    """Cumulative abundance of all topics, one after the other; topic k's part rises from k to k + 1."""
    topic_gene: IntArray
    """The gene of each entry of topic_cdf."""
    type_programmes: IntArray
    """[N_TYPES, PROGRAMMES_PER_TYPE] topic numbers."""


def make_world(seed: int) -> World:
    """Draw the topics of a seed, 0 <= seed < 2**63."""
    random = RandomStream(seed, WORLD_STREAM)
    sizes = [HOUSEKEEPING_GENES] + [IDENTITY_GENES] * N_TYPES + [PROGRAMME_GENES] * N_PROGRAMMES
    cdfs, genes = [], []
    for topic, size in enumerate(sizes):
        genes.append(random.choose(N_GENES, size))
        cdf = np.cumsum(np.exp(LOG_ABUNDANCE_SIGMA * random.normal(size)))
        cdfs.append(topic + cdf / cdf[-1])
    programmes = [1 + N_TYPES + random.choose(N_PROGRAMMES, PROGRAMMES_PER_TYPE) for _ in range(N_TYPES)]
    return World(seed, np.concatenate(cdfs), np.concatenate(genes), np.stack(programmes))


def simulate_counts(world: World, cell: int) -> tuple[IntArray, int]:
    """Return the counts [N_GENES] of a cell, which sum to its depth, and the number of its type."""
    random = RandomStream(world.seed, CELL_STREAM, cell)
    cell_type = int(np.searchsorted(np.cumsum(TYPE_SHARES)[:-1], random.uniform(1)[0]))
    depth = int(np.clip(np.exp(LOG_DEPTH_MEAN + LOG_DEPTH_SIGMA * random.normal(1)[0]), MIN_DEPTH, MAX_DEPTH))
    activity = -np.log(random.uniform(PROGRAMMES_PER_TYPE))
    programme_shares = PROGRAMME_SHARE * activity / activity.sum()
    share_cdf = np.cumsum(np.concatenate([[HOUSEKEEPING_SHARE, IDENTITY_SHARE], programme_shares]))
    topics = np.concatenate([[0, 1 + cell_type], world.type_programmes[cell_type]])
    topic = topics[np.searchsorted(share_cdf[:-1], random.uniform(depth))]
    entry = np.searchsorted(world.topic_cdf, topic + random.uniform(depth))
    return np.bincount(world.topic_gene[entry], minlength=N_GENES), cell_type


def reference_medians(world: World) -> FloatArray:
    """Return median[gene] over the reference cells, [N_GENES]; NaN for a gene that none of them expresses."""
    genes, values = [], []
    for cell in range(FIRST_REFERENCE_CELL, FIRST_REFERENCE_CELL + REFERENCE_CELLS):
        counts, _ = simulate_counts(world, cell)
        expressed = np.flatnonzero(counts)
        genes.append(expressed)
        values.append(counts[expressed] / counts.sum() * 10_000)
    gene, value = np.concatenate(genes), np.concatenate(values)
    value = value[np.lexsort((value, gene))]
    n = np.bincount(gene, minlength=N_GENES)
    start, seen = np.cumsum(n) - n, n > 0
    medians = np.full(N_GENES, np.nan)
    medians[seen] = (value[(start + (n - 1) // 2)[seen]] + value[(start + n // 2)[seen]]) / 2
    return medians


def rank_tokens(counts: IntArray, medians: FloatArray) -> IntArray:
    """Return a cell's token ids by Geneformer V1's rule, highest expression relative to the median first."""
    genes = np.flatnonzero((counts > 0) & ~np.isnan(medians))
    x = counts[genes] / counts.sum() * 10_000 / medians[genes]
    return genes[np.argsort(-x, kind="stable")][:MAX_TOKENS] + FIRST_GENE_TOKEN


def simulate_cells(world: World, medians: FloatArray, first_cell: int, cells: int) -> Iterator[TypedCell]:
    """Yield token ids and type of the cells ``first_cell`` to ``first_cell + cells - 1``."""
    for cell in range(first_cell, first_cell + cells):
        counts, cell_type = simulate_counts(world, cell)
        yield rank_tokens(counts, medians), cell_type


def write_cells(
    path: Path, world: World, medians: FloatArray, first_cell: int, cells: int, *, cell_types: bool = False
) -> None:
    """Write cells to a parquet file, one row group at a time; with ``cell_types``, a column names each cell's type."""
    partial = path.with_name(path.name + ".partial")
    schema = SCHEMA.append(pa.field("cell_type", pa.string())) if cell_types else SCHEMA
    with pq.ParquetWriter(
        partial, schema, version="2.6", data_page_version="1.0", compression="zstd", compression_level=9,
        use_dictionary=False, write_statistics=False, store_schema=False,
    ) as writer:  # fmt: skip
        for start in range(0, cells, ROW_GROUP_CELLS):
            n = min(ROW_GROUP_CELLS, cells - start)
            ids, types = zip(*simulate_cells(world, medians, first_cell + start, n), strict=True)
            lengths = np.array([len(cell_ids) for cell_ids in ids], dtype=np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(offsets, np.concatenate(ids).astype(np.int16))
            columns = [lists, pa.array(lengths)]
            if cell_types:
                columns.append(pa.array([f"type {cell_type}" for cell_type in types]))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=n)
    partial.replace(path)


def write_counts(path: Path, world: World, first_cell: int, cells: int) -> None:
    """Write the counts of cells as AnnData (h5ad): CSR, gene ids in `var`, cell type and a donor in `obs`.

    Donors take turns, `donor_0` to `donor_4`, and differ in nothing: something to split by.
    """
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    simulated = [simulate_counts(world, cell) for cell in range(first_cell, first_cell + cells)]
    counts = sp.vstack([sp.csr_matrix(counts.astype(np.uint16)) for counts, _ in simulated], format="csr")
    numbers = range(first_cell, first_cell + cells)
    obs = {
        "cell_type": pd.Categorical([f"type_{cell_type}" for _, cell_type in simulated]),
        "donor": pd.Categorical([f"donor_{number % N_DONORS}" for number in numbers]),
        "n_counts": np.asarray(counts.sum(axis=1)).ravel().astype(np.int64),
    }
    genes = VOCABULARY[FIRST_GENE_TOKEN:]
    data = anndata.AnnData(
        counts,
        obs=pd.DataFrame(obs, index=[f"sim_cell_{number}" for number in numbers]),
        var=pd.DataFrame({"ensembl_id": genes}, index=genes),
    )
    partial = path.with_name(path.name + ".partial")
    data.write_h5ad(partial, compression="gzip", compression_opts=9)
    partial.replace(path)


def entropy(ids: IntArray) -> float:
    """Return the entropy of the token frequencies in nats, corrected for sample size (Miller and Madow)."""
    counts = np.bincount(ids)
    counts = counts[counts > 0]
    return float(np.log(len(ids)) - counts @ np.log(counts) / len(ids) + (len(counts) - 1) / (2 * len(ids)))


def grouped_entropy(ids: IntArray, group: IntArray) -> float:
    """Return the entropy of the tokens given their group, in nats."""
    members = (ids[group == g] for g in np.unique(group))
    return sum(len(m) / len(ids) * entropy(m) for m in members)


def rank_bins(length: int) -> IntArray:
    """Return the bin (0 to 29) of each position: rank decile, in cells of <= 150, <= 600, more tokens."""
    return 10 * int(np.searchsorted([150, 600], length)) + 10 * np.arange(length) // length


def describe(name: str, cells: list[TypedCell]) -> tuple[IntArray, IntArray, IntArray]:
    """Print lengths and entropies of cells; return token id, type and rank bin of all their tokens."""
    length = np.array([len(ids) for ids, _ in cells])
    ids = np.concatenate([ids for ids, _ in cells])
    types = np.repeat([cell_type for _, cell_type in cells], length)
    bins = np.concatenate([rank_bins(n) for n in length])
    print(f"{name}: {len(cells):,} cells, {len(ids):,} tokens, {len(np.unique(ids)):,} different genes")
    print(f"  length: mean {length.mean():.0f}, median {np.median(length):.0f}, from {length.min()}; ", end="")
    print(f"{np.mean(length <= 255):.1%} at most 255, {np.mean(length == MAX_TOKENS):.1%} at {MAX_TOKENS:,}")
    print(f"  entropy in nats: {entropy(ids):.3f}, given the type {grouped_entropy(ids, types):.3f}, ", end="")
    print(f"given type and rank bin {grouped_entropy(ids, 30 * types + bins):.3f}")
    return ids, types, bins


def predictor_loss(
    sample: tuple[IntArray, IntArray, IntArray], held_out: list[TypedCell], mask: RandomStream
) -> tuple[float, float]:
    """Return a simple predictor's loss on 15% hidden tokens of held-out cells, and its share of types right.

    It finds a cell's type by naive Bayes from the other 85%, then predicts each hidden token by
    P(gene | type) * P(rank bin | gene), leaving out the genes it sees. Both factors are smoothed frequencies
    of the sample.
    """
    ids, types, bins = sample
    n = len(VOCABULARY)
    unigram = (np.bincount(ids, minlength=n) + 0.1) / (len(ids) + 0.1 * n)
    by_type = np.bincount(types * n + ids, minlength=N_TYPES * n).reshape(N_TYPES, n) + 2_000 * unigram
    gene_given_type = by_type / by_type.sum(axis=1, keepdims=True)
    by_bin = np.bincount(bins * n + ids, minlength=30 * n).reshape(30, n)
    by_bin = by_bin + 20 * (by_bin.sum(axis=1, keepdims=True) / len(ids))
    bin_given_gene = by_bin / by_bin.sum(axis=0)
    losses, right = [], 0
    for ids, cell_type in held_out:
        hidden = mask.uniform(len(ids)) < 0.15
        seen, target = ids[~hidden], ids[hidden]
        guess = int(np.argmax(np.log(gene_given_type[:, seen]).sum(axis=1)))
        right += guess == cell_type
        weight = gene_given_type[guess] * bin_given_gene[rank_bins(len(ids))[hidden]]
        weight[:, seen] = 0
        losses.append(np.log(weight.sum(axis=1)) - np.log(weight[np.arange(len(target)), target]))
    return float(np.concatenate(losses).mean()), right / len(held_out)


def describe_world(world: World, medians: FloatArray) -> None:
    """Print statistics of the sample and of held-out cells, and what the first tells about the second."""
    sample = describe("sample", list(simulate_cells(world, medians, 0, SAMPLE_CELLS)))
    cells = list(simulate_cells(world, medians, SAMPLE_CELLS, 20_000))
    held_out = describe("held out", cells)
    loss, right = predictor_loss(sample, cells[:1_000], RandomStream(world.seed, MASK_STREAM))
    print(f"predictor fitted on the sample, on 1,000 held-out cells: {right:.1%} of the types right,", end="")
    print(f" loss {loss:.3f} nats, {entropy(held_out[0]) - loss:.3f} below the unigram entropy")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make simulated cells, tokenized as Geneformer V1 does.")
    parser.add_argument("--out", type=Path, help="parquet file to write")
    parser.add_argument("--vocab", type=Path, help="vocabulary file to write, one token per line, in id order")
    parser.add_argument("--counts", type=Path, help="AnnData file of the cells' counts to write (h5ad)")
    parser.add_argument("--cells", type=int, default=SAMPLE_CELLS, help="number of cells (%(default)s)")
    parser.add_argument("--first-cell", type=int, default=0, help="number of the first (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulated world (%(default)s)")
    parser.add_argument("--cell-types", action="store_true", help="add a column cell_type")
    parser.add_argument("--describe", action="store_true", help="print statistics of this seed; takes half a minute")
    args = parser.parse_args()
    if not (args.out or args.vocab or args.counts or args.describe):
        parser.error("nothing to do: give --out, --vocab, --counts or --describe")
    if args.cells < 1 or args.first_cell < 0 or args.first_cell + args.cells > FIRST_REFERENCE_CELL:
        parser.error(f"--cells must be at least 1, --first-cell at least 0, their sum at most {1 << 40:,}")
    if not 0 <= args.seed < 1 << 63:
        parser.error(f"--seed {args.seed} is not in 0 .. 2**63 - 1")
    if args.vocab:
        args.vocab.write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8", newline="\n")
    if args.counts:
        write_counts(args.counts, make_world(args.seed), args.first_cell, args.cells)
    if args.out or args.describe:
        world = make_world(args.seed)
        medians = reference_medians(world)
    if args.out:
        write_cells(args.out, world, medians, args.first_cell, args.cells, cell_types=args.cell_types)
    if args.describe:
        describe_world(world, medians)


if __name__ == "__main__":
    main()
