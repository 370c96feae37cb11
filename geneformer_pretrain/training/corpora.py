"""Opens the corpora of a run on all ranks."""

from dataclasses import asdict
from datetime import timedelta
from functools import partial

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.dataset import DataSource, check_data, open_training_data, open_validation_data
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.distributed.agreement import Ranks
from geneformer_pretrain.distributed.world import World
from geneformer_pretrain.errors import ConfigError
from geneformer_pretrain.training.validation import Validation

CONVERSION_TIMEOUT = timedelta(days=2)
"""Longest time that ranks wait for the one that converts the corpus."""


def open_corpora(config: Config, world: World, ranks: Ranks) -> tuple[DataSource, Validation | None]:
    """Open the corpus and the held-out cells; collective.

    One rank of each node comes first: it may have to convert them, or fail at it, for hours.

    Raises
    ------
    ConfigError
        On every rank, if any of them cannot, or sees another corpus than rank 0.
    """
    opened: list[tuple[DataSource, Validation | None]] = []

    def open_in_turn(is_turn: bool) -> None:
        if is_turn:
            data = open_training_data(config, world.is_main, pin_memory=world.device.type == "cuda")
            held_out = open_validation_data(data, world.is_main)
            opened.append((data, None if held_out is None else Validation(held_out, world)))

    ranks.run_on_all_ranks(lambda: check_data(config), ConfigError)
    patient = Ranks(CONVERSION_TIMEOUT)
    for converts in (True, False):
        patient.run_on_all_ranks(partial(open_in_turn, (world.local_rank == 0) is converts), ConfigError)
    ((data, validation),) = opened
    ranks.require_equal(asdict(data.fingerprint), ConfigError)
    if validation is not None:
        ranks.require_equal({"held-out corpus": validation.fingerprint}, ConfigError)
        ranks.run_on_all_ranks(validation.check, ConfigError)
        validation.measure_unigram(data, ranks)
    return data, validation


def require_same_packs(data: DataSource, stream: PackStream, pack: int, ranks: Ranks) -> None:
    """Check that all ranks make the same packs and masks from `pack` on; collective.

    Stale compiled code or a damaged cache on one node would give it others, and cells would be repeated or lost.

    Raises
    ------
    ConfigError
        On every rank: packs that differ, or a cell that cannot be used.
    """

    def digest() -> str:
        try:
            return data.first_packs_digest(stream, pack)
        except ValueError as error:
            raise ConfigError(f"data.path: {error}") from error

    digests = ranks.run_on_all_ranks(digest, ConfigError)
    ranks.require_equal({"packs and masks": digests[ranks.rank]}, ConfigError)
