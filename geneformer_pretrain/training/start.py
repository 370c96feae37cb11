"""Starts a new run from the weights of a published model."""

from collections.abc import Callable
from pathlib import Path

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.engines import Engine
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.model.init_from import PublishedStart, load_published
from geneformer_pretrain.tokenization.gene_mapping import TokenMatch, match_tokens, read_mapping
from geneformer_pretrain.tokenization.gene_set import GeneSet


def start_from_published(config: Config, engine: Engine, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Load the weights of `training.init_from` into a model; collective.

    Where both the run and the published model have a gene set, and they differ, rows of the word embeddings are
    matched by gene id, or through the table of `training.init_gene_mapping`.

    Raises
    ------
    ConfigError
        On every rank: a model that cannot be read or does not fit, with each key that differs.
    """
    training, path = config.training, Path(str(config.training.init_from))
    tensors = {name: parameter.detach() for name, parameter in engine.model.canonical_parameters()}
    engine.prepare_for_checkpoint(tensors)

    def load() -> tuple[PublishedStart, TokenMatch | None]:
        match = _match(config, path)
        start = load_published(
            tensors,
            config.model.architecture(),
            path,
            rows=None if match is None else match.old_token,
            extend_positions=training.init_extend_positions,
            seed=training.seed,
        )
        return start, match

    start, match = ranks.run_on_all_ranks(load, ConfigError)[ranks.rank]
    for line in start.lines + ([] if match is None else match.lines()):
        say(line)


def _match(config: Config, path: Path) -> TokenMatch | None:
    """Match the run's tokens with those of the published model; None if they are the same."""
    table = config.training.init_gene_mapping
    if config.data.gene_set is None or not (path / "genes.parquet").exists():
        if table is None:
            return None
        raise ConfigError(
            f"training.init_gene_mapping needs data.gene_set and a gene set beside the weights in {path}: copy the "
            "published model's gene-set files there."
        )
    new, old = GeneSet.load(Path(config.data.gene_set)), GeneSet.load(path)
    if table is None and new.tokens == old.tokens:
        return None
    return match_tokens(new, old, None if table is None else read_mapping(Path(table)))
