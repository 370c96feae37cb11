"""What a checkpoint says of the run, as older and newer releases write it."""

from dataclasses import asdict, dataclass

import pytest

from geneformer_pretrain.checkpoint.state import Progress, state_to_save
from geneformer_pretrain.data.dataset import DataFingerprint
from geneformer_pretrain.errors import ConfigError

FINGERPRINT = DataFingerprint(
    corpus="abc",
    vocabulary=None,
    seed=0,
    packing=True,
    micro_batch_size=4,
    seq_length=32,
    max_cells_per_pack=26,
    shuffle_block_cells=None,
    mlm_probability=0.15,
    num_special_tokens=2,
    mask_token_id=1,
    vocab_size=101,
    planner_version=2,
)


@dataclass(frozen=True)
class LaterFingerprint(DataFingerprint):
    """A release that knows one more thing about the data."""

    later_fact: str | None = None


def test_progress_survives_releases_that_know_more_or_less() -> None:
    progress = Progress(packs_per_step=4, step=3, next_pack=12, tokens=7)
    saved = asdict(progress)
    assert Progress.from_state(saved | {"of a newer release": 1.5}) == progress
    del saved["skipped_steps"]
    assert Progress.from_state(saved) == progress


def test_state_has_the_epoch_that_is_given_and_progress_stays() -> None:
    progress = Progress(packs_per_step=4, step=3, next_pack=12)
    state = state_to_save(
        progress, epoch=2, epoch_first_pack=10, data=FINGERPRINT, data_files={"corpus": "x"}, model={"vocab_size": 101}
    )
    assert state["progress"] == asdict(progress) | {"epoch": 2, "epoch_first_pack": 10}
    assert progress.epoch == 0
    assert (state["data"], state["data_files"], state["model"]) == (
        asdict(FINGERPRINT),
        {"corpus": "x"},
        {"vocab_size": 101},
    )


def test_a_field_that_a_checkpoint_lacks_has_its_default() -> None:
    later = LaterFingerprint(**asdict(FINGERPRINT))
    assert not later.changes(asdict(FINGERPRINT), {}, {})
    later.require_same(asdict(FINGERPRINT), "step_1", {}, {})
    other = LaterFingerprint(**asdict(FINGERPRINT), later_fact="genes")
    with pytest.raises(ConfigError, match="later_fact: None in the checkpoint, 'genes' now"):
        other.require_same(asdict(FINGERPRINT), "step_1", {}, {})


def test_a_field_of_a_newer_release_counts_unless_it_is_null() -> None:
    saved = asdict(FINGERPRINT)
    assert not FINGERPRINT.changes(saved | {"later_fact": None}, {}, {})
    assert FINGERPRINT.changes(saved | {"later_fact": "genes"}, {}, {})
    with pytest.raises(ConfigError, match="later_fact: 'genes' in the checkpoint, None now"):
        FINGERPRINT.require_same(saved | {"later_fact": "genes"}, "step_1", {}, {})


def test_hashed_files_are_named() -> None:
    saved = asdict(FINGERPRINT) | {"corpus": "def"}
    with pytest.raises(ConfigError, match=r"corpus: a\.parquet in the checkpoint, b\.parquet now"):
        FINGERPRINT.require_same(saved, "step_1", {"corpus": "b.parquet"}, {"corpus": "a.parquet"})
    with pytest.raises(ConfigError, match=r"corpus: a\.parquet in the checkpoint, of other content now"):
        FINGERPRINT.require_same(saved, "step_1", {"corpus": "a.parquet"}, {"corpus": "a.parquet"})
