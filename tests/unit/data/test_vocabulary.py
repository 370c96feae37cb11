"""Gene sets and special tokens against the corpus."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_pretrain.data.corpus import named_gene_set, open_corpus
from geneformer_pretrain.data.dataset import DataFingerprint, open_training_data, open_validation_data
from geneformer_pretrain.data.vocabulary import apply_gene_set, require_gene_set, require_special_tokens
from geneformer_pretrain.errors import ConfigError, DataError
from geneformer_pretrain.tokenization.gene_set import GeneSet
from tests.corpora import write_corpus_folder, write_parquet
from tests.tiny import make_cells, tiny_config


def gene_set(special: tuple[str, ...] = ("<pad>", "<mask>"), genes: int = 99, **changes: Any) -> GeneSet:
    tokens = [*special, *(f"ENSG{number:011d}" for number in range(genes))]
    medians = np.r_[np.full(len(special), np.nan), np.linspace(1, 2, genes)]
    values = {
        "name": "mine",
        "species": None,
        "tokens": tokens,
        "symbols": [None] * len(tokens),
        "medians": medians,
        "aliases": {},
        "max_tokens": 64,
    }
    return GeneSet(**(values | changes))


def described(genes: GeneSet) -> dict[str, Any]:
    names = ("name", "fingerprint", "vocab_size", "special_tokens", "max_tokens")
    return {name: getattr(genes, name) for name in names}


def test_a_gene_set_gives_vocabulary_and_special_tokens(tmp_path: Path) -> None:
    genes = gene_set(("<pad>", "<mask>", "<cls>", "<eos>"), genes=200)
    genes.save(tmp_path / "genes")
    config = tiny_config(tmp_path, f"data.gene_set={tmp_path / 'genes'}", "data.vocab_path=sample_data/vocab.txt")
    apply_gene_set(config)
    assert (config.model.vocab_size, config.data.num_special_tokens) == (204, 4)
    assert (config.model.pad_token_id, config.data.mask_token_id, config.data.vocab_path) == (0, 1, None)
    with pytest.raises(ConfigError, match=r"data\.gene_set: .*nowhere"):
        apply_gene_set(tiny_config(tmp_path, f"data.gene_set={tmp_path / 'nowhere'}"))


def test_a_corpus_of_the_gene_set_is_opened_and_another_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    genes = gene_set()
    genes.save(tmp_path / "genes")
    write_corpus_folder(tmp_path / "same", [make_cells(60)], gene_set=described(genes))
    write_corpus_folder(tmp_path / "other", [make_cells(60)], gene_set=described(gene_set(genes=98)))

    def open_data(path: str) -> DataFingerprint:
        config = tiny_config(tmp_path, f"data.gene_set={tmp_path / 'genes'}", f"data.path={tmp_path / path}")
        apply_gene_set(config)
        return open_training_data(config, is_main=False, pin_memory=False).fingerprint

    assert open_data("same").gene_set == genes.fingerprint
    assert not caplog.records
    assert open_data("cells.parquet").gene_set == genes.fingerprint
    assert "cells.parquet does not name its gene set; it is taken to be of mine" in caplog.text
    with pytest.raises(
        ConfigError,
        match=r"data\.path: .*other: .*'mine' \(\w{8}\), which is not 'mine' \(.*vocab_size 100 there, 101 here.*again",
    ):
        open_data("other")


def test_another_gene_set_is_named_before_tokens_that_it_lacks(tmp_path: Path) -> None:
    gene_set().save(tmp_path / "genes")
    larger = gene_set(genes=150)
    write_corpus_folder(tmp_path / "larger", [[[140, 5, 6]] * 20], gene_set=described(larger))
    for key in ("data.path", "data.validation_path"):
        config = tiny_config(tmp_path, f"data.gene_set={tmp_path / 'genes'}", f"{key}={tmp_path / 'larger'}")
        apply_gene_set(config)
        with pytest.raises(ConfigError, match=rf"{key}: .*larger: .*vocab_size 152 there, 101 here"):
            open_validation_data(open_training_data(config, False, False), False)


def test_a_corpus_of_a_gene_set_needs_it_or_as_large_a_vocabulary(tmp_path: Path) -> None:
    """The vocabulary file that configurations name is that of the sample."""
    genes = gene_set()
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in genes.tokens))
    write_corpus_folder(tmp_path / "same", [make_cells(60)], gene_set=described(genes))
    other = gene_set(genes=98)
    folder = write_corpus_folder(tmp_path / "other", [make_cells(60)], gene_set=described(other))

    def open_data(path: str, vocabulary: Path | str) -> None:
        config = tiny_config(tmp_path, f"data.path={tmp_path / path}", f"data.vocab_path={vocabulary}")
        open_training_data(config, is_main=False, pin_memory=False)

    open_data("same", tmp_path / "vocab.txt")
    message = r"other: tokenized with the gene set 'mine' of 100 tokens, and the run has the 101 of .*vocab\.txt; add "
    with pytest.raises(ConfigError, match=rf"data\.path: .*{message}data\.gene_set=FOLDER with that gene set"):
        open_data("other", tmp_path / "vocab.txt")
    other.save(folder / "gene_set")
    with pytest.raises(ConfigError, match=rf"{message}data\.gene_set=.*other/gene_set"):
        open_data("other", tmp_path / "vocab.txt")
    open_data("other", "null")


def test_the_first_difference_is_named_where_the_corpus_has_its_gene_set(tmp_path: Path) -> None:
    genes = gene_set()
    swapped = list(genes.tokens)
    swapped[7], swapped[9] = swapped[9], swapped[7]
    medians = genes.medians.copy()
    medians[5] *= 2
    for name, other, message in (
        (
            "tokens",
            dataclasses.replace(genes, tokens=swapped),
            r"2 tokens differ, first token 7: ENSG00000000007 there",
        ),
        ("longer", gene_set(genes=101), r"2 tokens differ, first token 101: ENSG00000000099 there, none here"),
        ("medians", dataclasses.replace(genes, medians=medians), r"1 medians differ, first that of ENSG00000000003"),
    ):
        folder = write_corpus_folder(tmp_path / name, [make_cells(5)], gene_set=described(other))
        other.save(folder / "gene_set")
        named = named_gene_set(folder)
        assert named is not None
        with pytest.raises(DataError, match=message):
            require_gene_set(*named, genes)


def test_cells_between_cls_and_eos_are_not_taken_for_genes(tmp_path: Path) -> None:
    cells = [[2, *(4 + token % 90 for token in cell), 3] for cell in make_cells(60)]
    corpus = open_corpus(write_parquet(tmp_path / "v2.parquet", cells), tmp_path / "cache")
    with pytest.raises(DataError, match=r"begins with token 2 and ends with token 3.*data\.num_special_tokens=4 and"):
        require_special_tokens(corpus, 2)
    require_special_tokens(corpus, 4)
    plain = open_corpus(write_parquet(tmp_path / "v1.parquet", make_cells(60)), tmp_path / "cache")
    require_special_tokens(plain, 2)
    alike = open_corpus(
        write_parquet(tmp_path / "top.parquet", [[9, *cell] for cell in cells[:31]]), tmp_path / "cache"
    )
    require_special_tokens(alike, 2)
    with pytest.raises(ConfigError, match=r"data\.path: every cell begins with token 2"):
        open_training_data(tiny_config(tmp_path, f"data.path={tmp_path / 'v2.parquet'}"), False, False)


FIELDS: dict[str, Any] = {
    "corpus": "ab", "vocabulary": None, "seed": 0, "packing": True, "micro_batch_size": 4, "seq_length": 64,
    "max_cells_per_pack": 9, "shuffle_block_cells": None, "mlm_probability": 0.15, "num_special_tokens": 2,
    "mask_token_id": 1, "vocab_size": 101, "planner_version": 2,
}  # fmt: skip


def test_a_checkpoint_without_the_newer_fields_is_the_same_data() -> None:
    now = DataFingerprint(**FIELDS)
    assert now.changes(FIELDS, {}, {}) == []
    now.require_same(FIELDS, "step_2", {}, {})
    with_genes = DataFingerprint(**FIELDS, gene_set="beef")
    assert with_genes.changes(FIELDS, {"gene_set": "/genes"}, {}) == ["gene_set: None in the checkpoint, /genes now"]
    with pytest.raises(ConfigError, match=r"seed: 0 in the checkpoint, 1 now\n.*accept_changed_data"):
        DataFingerprint(**FIELDS | {"seed": 1}).require_same(FIELDS, "step_2", {}, {})
