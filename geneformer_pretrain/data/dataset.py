"""From the configuration to the data of a run: corpus, vocabulary, shape, and their fingerprint."""

import logging
import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from geneformer_pretrain.config.schema import Config
from geneformer_pretrain.data.batch import BatchBuilder, PackedBatch
from geneformer_pretrain.data.corpus import Corpus, named_gene_set, open_corpus, require_corpus
from geneformer_pretrain.data.loader import Loader
from geneformer_pretrain.data.masking import MaskRule
from geneformer_pretrain.data.packing import PLANNER_VERSION, BatchShape, first_held_out, held_out_cells
from geneformer_pretrain.data.stream import PackStream
from geneformer_pretrain.data.vocabulary import (
    check_vocabulary,
    load_gene_set,
    require_special_tokens,
    require_vocabulary_of,
)
from geneformer_pretrain.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from geneformer_pretrain.tokenization.gene_set import GeneSet

log = logging.getLogger(__name__)

VALIDATION_SEED = 0x5EED
"""Decides order and masks of held-out cells, in every run."""


@dataclass(frozen=True)
class DataFingerprint:
    """Values that decide which tokens are seen at which step, and how they are masked.

    A run may only be resumed with the same fingerprint; else cells would be repeated or lost unnoticed. Checkpoints
    store it under these names. A field added later needs a default, which stands for checkpoints without it.
    """

    corpus: str
    vocabulary: str | None
    seed: int
    packing: bool
    micro_batch_size: int
    seq_length: int
    max_cells_per_pack: int
    shuffle_block_cells: int | None
    mlm_probability: float
    num_special_tokens: int
    mask_token_id: int
    vocab_size: int
    planner_version: int
    gene_set: str | None = None
    validation_fraction: float | None = None

    def changes(self, saved: dict[str, Any], files: dict[str, str], saved_files: dict[str, str]) -> list[str]:
        """List what differs from the fingerprint in a checkpoint, one line each.

        Parameters
        ----------
        saved
            Fingerprint in the checkpoint.
        files, saved_files
            Names to print for the hashes of files, now and in the checkpoint: see ``DataSource.files``.
        """
        lines = []
        defaults = {field.name: None if field.default is MISSING else field.default for field in fields(self)}
        now_here = asdict(self)
        for name in [*defaults, *(saved.keys() - defaults.keys())]:  # a newer release may have saved more
            before, value = saved.get(name, defaults.get(name)), now_here.get(name)
            if before != value:
                then, now = saved_files.get(name, repr(before)), files.get(name, repr(value))
                lines.append(f"{name}: {then} in the checkpoint, {now if then != now else 'of other content'} now")
        return lines

    def require_same(
        self, saved: dict[str, Any], where: str, files: dict[str, str], saved_files: dict[str, str]
    ) -> None:
        """Raise ConfigError that lists what differs from the fingerprint in the checkpoint ``where``."""
        changes = self.changes(saved, files, saved_files)
        if changes:
            raise ConfigError(
                f"The data of this run differ from those of {where}:\n  " + "\n  ".join(changes) + "\n"
                "Give back the earlier values, start afresh with training.resume_from_checkpoint=false, or go on "
                "with the new data from the start of an epoch with training.accept_changed_data=true."
            )


@dataclass(frozen=True)
class DataSource:
    """An open corpus together with everything that turns it into micro-batches.

    Attributes
    ----------
    config
        The run's configuration.
    corpus
        The open corpus.
    shape
        Shape of the packs.
    vocabulary, gene_set
        Hash of the vocabulary's file, fingerprint of the gene set; None where there is none.
    pin_memory
        See ``BatchBuilder``.
    seed
        Decides the order of the cells and their masks.
    chosen
        bool [cells], the cells of the corpus that are read; None: all of them.
    """

    config: Config
    corpus: Corpus
    shape: BatchShape
    vocabulary: str | None
    gene_set: str | None
    pin_memory: bool
    seed: int
    chosen: np.ndarray | None = None

    @property
    def fingerprint(self) -> DataFingerprint:
        """Values that must not change between a run and its resumption."""
        model, data = self.config.model, self.config.data
        return DataFingerprint(
            corpus=self.corpus.fingerprint,
            vocabulary=self.vocabulary,
            seed=self.config.training.seed,
            packing=data.packing,
            micro_batch_size=model.micro_batch_size,
            seq_length=model.seq_length,
            max_cells_per_pack=self.shape.max_cells,
            shuffle_block_cells=data.shuffle_block_cells,
            mlm_probability=self.config.training.mlm_probability,
            num_special_tokens=data.num_special_tokens,
            mask_token_id=data.mask_token_id,
            vocab_size=model.vocab_size,
            planner_version=PLANNER_VERSION,
            gene_set=self.gene_set,
            validation_fraction=data.validation_fraction,
        )

    @property
    def files(self) -> dict[str, str]:
        """Readable names of the hashed fields, for error messages."""
        data, corpus = self.config.data, self.corpus
        files = {"corpus": f"{os.path.abspath(data.path)} ({corpus.num_cells:,} cells, {corpus.num_tokens:,} tokens)"}
        if data.vocab_path is not None:
            files["vocabulary"] = os.path.abspath(data.vocab_path)
        if data.gene_set is not None:
            files["gene_set"] = os.path.abspath(data.gene_set)
        return files

    def stream(self, epoch: int = 0, epoch_first_pack: int = 0) -> PackStream:
        """Return the endless stream of packs, from the start of an epoch."""
        return PackStream(
            self.corpus.lengths,
            self.corpus.fingerprint,
            self.seed,
            self.shape,
            packing=self.config.data.packing,
            plan_dir=Path(self.config.data.cache_dir) / "plans",
            shuffle_block_cells=self.config.data.shuffle_block_cells,
            chosen=self.chosen,
            epoch=epoch,
            epoch_first_pack=epoch_first_pack,
        )

    def first_packs_digest(self, stream: PackStream, pack: int) -> str:
        """Hash of the cells in the packs from ``pack`` on, and of the first one's masked tokens.

        Ranks whose digests differ would train on other data: other code, or a damaged cache.
        """
        batch = self.builder().build(pack, *stream.locate(pack))
        tensors = batch.parts if isinstance(batch, PackedBatch) else (batch.input_ids, batch.labels)
        digest = xxhash.xxh3_128(stream.first_packs_digest(pack).encode())
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def builder(self) -> BatchBuilder:
        """Return a builder of masked micro-batches."""
        model, data, training = self.config.model, self.config.data, self.config.training
        return BatchBuilder(
            self.corpus,
            self.shape,
            vocab_size=model.vocab_size,
            pad_token_id=model.pad_token_id,
            mask_rule=MaskRule(
                self.seed, training.mlm_probability, model.vocab_size, data.num_special_tokens, data.mask_token_id
            ),
            packing=data.packing,
            pin_memory=self.pin_memory,
        )

    def loader(self, stream: PackStream, *, first_step: int, packs_per_step: int, rank: int, world_size: int) -> Loader:
        """Return the micro-batches of one rank from ``first_step`` to the last step.

        Optimizer step s consumes packs [s P, (s + 1) P) of the stream, P being ``packs_per_step``, a multiple of
        ``world_size``; its micro-batch m on rank r is pack s P + m world_size + r.
        """
        end = self.config.training.num_train_steps * packs_per_step
        packs = range(first_step * packs_per_step + rank, end, world_size)
        return Loader(self.builder(), stream, packs, self.config.training.num_workers)


def open_training_data(config: Config, is_main: bool, pin_memory: bool) -> DataSource:
    """Open ``data.path`` and derive the constant shape of a micro-batch from its lengths.

    Parameters
    ----------
    config
        With the values of its gene set, see ``apply_gene_set``.
    is_main
        Show the progress of a conversion.
    pin_memory
        See ``BatchBuilder``.

    Raises
    ------
    ConfigError
        Naming the key and the file that cannot be used.
    """
    vocabulary = None if config.data.vocab_path is None else check_vocabulary(config)
    genes = load_gene_set(config)
    corpus = _open("data.path", config.data.path, config, genes, is_main)
    shape = BatchShape.create(
        corpus.lengths,
        micro_batch_size=config.model.micro_batch_size,
        seq_length=config.model.seq_length,
        mlm_probability=config.training.mlm_probability,
        packing=config.data.packing,
        max_cells=config.data.max_cells_per_pack,
    )
    fraction, chosen = config.data.validation_fraction, None
    if fraction is not None:
        chosen = ~held_out_cells(corpus.num_cells, fraction)
        if chosen.all() or not chosen.any():
            which = "no cell" if chosen.all() else "every cell"
            raise ConfigError(
                f"data.validation_fraction={fraction} holds out {which} of {config.data.path} ({corpus.num_cells:,} "
                "cells); choose another fraction, or set data.validation_path"
            )
    fingerprint = genes.fingerprint if genes else None
    return DataSource(
        config, corpus, shape, vocabulary, fingerprint, pin_memory, seed=config.training.seed, chosen=chosen
    )


def open_validation_data(training: DataSource, is_main: bool) -> DataSource | None:
    """Open the held-out cells, to be read in the shape of the training data; None if there are none.

    They are ``data.validation_path``, or the cells that ``data.validation_fraction`` keeps from training; of either,
    ``data.validation_cells``, if given, chosen by a hash of their number. Order and masks do not depend on the run's
    seed.
    """
    config, corpus = training.config, training.corpus
    chosen = None if training.chosen is None else ~training.chosen
    if chosen is None:
        if config.data.validation_path is None:
            return None
        genes = load_gene_set(config)
        corpus = _open("data.validation_path", config.data.validation_path, config, genes, is_main)
    if config.data.validation_cells is not None:
        among = np.ones(corpus.num_cells, np.bool_) if chosen is None else chosen
        chosen = first_held_out(among, config.data.validation_cells)
    return replace(training, corpus=corpus, chosen=chosen, seed=VALIDATION_SEED)


def check_data(config: Config) -> None:
    """Check that both corpora exist, and the vocabulary; quick.

    Raises
    ------
    ConfigError
        Naming the key and the file.
    """
    if config.data.vocab_path is not None:
        check_vocabulary(config)
    for key, path in (("data.path", config.data.path), ("data.validation_path", config.data.validation_path)):
        if path is not None:
            try:
                require_corpus(path)
            except DataError as error:
                raise ConfigError(f"{key}: {error}") from error


def _open(key: str, path: str, config: Config, genes: "GeneSet | None", is_main: bool) -> Corpus:
    try:
        named = named_gene_set(path)
        if named is not None:  # before its tokens are read, which another gene set may lack
            require_vocabulary_of(*named, config, genes)
        corpus = open_corpus(path, config.data.cache_dir, vocab_size=config.model.vocab_size, show_progress=is_main)
        if named is None and genes is not None:
            log.warning("%s: %s does not name its gene set; it is taken to be of %s", key, path, genes.name)
        require_special_tokens(corpus, config.data.num_special_tokens)
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from error
    except OutputError as error:  # names data.cache_dir
        raise ConfigError(str(error)) from error
    return corpus
