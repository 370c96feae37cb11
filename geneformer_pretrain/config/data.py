"""The group `data`: the corpus and how it is packed."""

from dataclasses import dataclass

from geneformer_pretrain.errors import require


@dataclass
class DataConfig:
    """The corpus and how it is packed."""

    path: str
    """The corpus: a parquet file, folder or glob, or a Hugging Face save_to_disk folder, with a column input_ids."""
    validation_path: str | None
    """Held-out corpus of the same kinds; null: no validation."""
    validation_packs: int
    """Packs of the held-out cells that a validation reads at most, where data.validation_cells is null."""
    validation_cells: int | None
    """Held-out cells that a validation reads, chosen by a hash of their number: the same cells with the same masks in
    every run on this corpus, whatever its seed, size, engine or shape of the packs. Fewer if there are fewer. null: as
    many as fill data.validation_packs."""
    validation_column: str | None
    """Column of the held-out corpus, such as tissue: validation loss and accuracy are also reported for each of its
    values. null: for all cells together alone."""
    validation_fraction: float | None
    """Share of the cells of data.path that are kept from training, to validate on, chosen by a hash of their number:
    the same cells in every run on this corpus. null: none."""
    gene_set: str | None
    """Gene-set folder that the corpus was tokenized with. It sets model.vocab_size, model.pad_token_id,
    data.mask_token_id and data.num_special_tokens, stands in for data.vocab_path, goes into final_model, and a corpus
    of another gene set is refused. null: these keys hold."""
    cache_dir: str
    """Folder of converted corpora and of packing plans. Safe to delete between runs."""
    vocab_path: str | None
    """Text file with one token a line in id order, checked against the model's vocabulary; null: no check."""
    num_special_tokens: int
    """Ids below this are special: never selected for prediction, never a random replacement."""
    mask_token_id: int
    """Id of <mask>; below num_special_tokens."""
    packing: bool
    """Pack cells end to end. false pads each cell instead: the slow reference path."""
    max_cells_per_pack: int | None
    """Most cells of a pack; null: 1.5 times as many as an average pack holds, and 16 more, so that tokens and not cells
    fill a pack."""
    shuffle_block_cells: int | None
    """null shuffles the whole corpus. A number shuffles blocks of that many cells, for corpora larger than host memory;
    docs/data.md says what that costs."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path is empty; name a parquet file, folder or glob, or a save_to_disk folder.")
        require(bool(self.cache_dir), "data.cache_dir is empty; name a folder.")
        require(
            0 <= self.mask_token_id < self.num_special_tokens,
            f"data.mask_token_id ({self.mask_token_id}) must be below data.num_special_tokens "
            f"({self.num_special_tokens}), so that <mask> itself is never predicted.",
        )
        for name in ("validation_packs", "validation_cells", "max_cells_per_pack", "shuffle_block_cells"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name} is {value}; it must be positive.")
        require(
            self.validation_fraction is None or 0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.",
        )
        require(
            self.validation_fraction is None or self.validation_path is None,
            "data.validation_fraction and data.validation_path are both set; choose one.",
        )
        for name in ("validation_cells", "validation_column"):
            require(
                getattr(self, name) is None or self.has_validation,
                f"data.{name} needs held-out cells: set data.validation_path or data.validation_fraction as well.",
            )

    @property
    def has_validation(self) -> bool:
        """True if there are held-out cells."""
        return self.validation_path is not None or self.validation_fraction is not None
