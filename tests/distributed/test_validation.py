"""Validation: the same numbers on any number of ranks, engine, shape of the packs and seed, and in stock BERT."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from geneformer_pretrain.config.compose import load_config
from geneformer_pretrain.data.dataset import VALIDATION_SEED
from geneformer_pretrain.data.masking import MaskRule, mask_cell
from geneformer_pretrain.data.packing import first_held_out
from geneformer_pretrain.distributed.world import World, distributed_world
from geneformer_pretrain.training import main as train
from geneformer_pretrain.training.trainer import Trainer
from tests.tiny import (
    RunWorkers,
    make_cells,
    one_cpu_thread,  # noqa: F401 - an automatic fixture
    overrides,
    read_exit,
    read_metrics,
)

CELLS = 40
TISSUES = ["lung", "blood", "heart"]


def predictable(cells: list[list[int]]) -> list[list[int]]:
    """Cells that begin with the same genes, so that a model soon predicts some of them."""
    start = list(range(2, 12))
    return [start + [token for token in cell if token not in start] for cell in cells]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both corpora and `run`, a run that validated at its end."""
    folder = tmp_path_factory.mktemp("validation")
    for name, cells in (("cells", make_cells(100)), ("held_out", make_cells(70, seed=1))):
        columns = {
            "input_ids": pa.array(predictable(cells), pa.list_(pa.int32())),
            "tissue": pa.array([TISSUES[i % 3] for i in range(len(cells))]),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    steps = ("training.num_train_steps=60", "training.learning_rate=3e-3")
    assert train.run(load_config(overrides=given(folder, "run", *steps))) == 0
    return folder


def given(folder: Path, name: str, *more: str) -> list[str]:
    return overrides(
        folder,
        f"data.validation_path={folder / 'held_out.parquet'}",
        f"data.validation_cells={CELLS}",
        "data.validation_column=tissue",
        f"training.checkpoint_dir={folder / name}",
        *more,
    )


def validate(rank: int, size: int, runs: Sequence[list[str]]) -> list[dict[str, float]]:
    """Validate the model that each configuration starts with, on this rank."""
    found = []
    for run in runs:
        trainer = Trainer(load_config(overrides=run), World(rank, rank, size, torch.device("cpu")))
        found.append(trainer.validate())
        assert trainer.logs is not None
        trainer.logs.close()
    return found


def start_from(folder: Path, name: str, *more: str) -> list[str]:
    """Start from the run's weights, with dropout that must not count."""
    start = f"training.init_from={folder / 'run/final_model'}"
    return given(folder, name, start, "model.hidden_dropout_prob=0.3", *more)


def test_any_run_gives_the_same_numbers(folder: Path, run_workers: RunWorkers) -> None:
    expected = {name: value for name, value in read_metrics(folder / "run")[-1].items() if "validation" in name}
    del expected["validation_seconds"]
    alone = [
        start_from(folder, "seed", "training.seed=7"),
        start_from(folder, "larger", "model.micro_batch_size=12"),
        start_from(folder, "padded", "data.packing=false", "model.micro_batch_size=3"),
        start_from(folder, "few", "data.max_cells_per_pack=2"),
    ]
    with distributed_world() as world:
        found = validate(world.rank, world.size, alone)
    both = [start_from(folder, "ddp"), start_from(folder, "fsdp2", "training.use_fsdp2=true", "training.seed=3")]
    for results in run_workers(validate, 2, both):
        found += results
    three = [
        start_from(folder, "ddp_3", "model.micro_batch_size=8"),
        start_from(folder, "padded_3", "data.packing=false"),
    ]
    for results in run_workers(validate, 3, three):
        found += results
    assert len(found) == 4 + 4 + 6
    for numbers in found:
        assert numbers.keys() == expected.keys()
        assert numbers["validation_masked_tokens"] == expected["validation_masked_tokens"]
        for name, value in numbers.items():
            assert value == pytest.approx(expected[name], rel=1e-5), name


def test_numbers_are_those_of_stock_bert(folder: Path) -> None:
    """Loss, accuracy and perplexity over all masked tokens, and by tissue; cell by cell."""
    record = read_metrics(folder / "run")[-1]
    model = transformers.BertForMaskedLM.from_pretrained(folder / "run/final_model").eval()
    rule = MaskRule(VALIDATION_SEED, probability=0.15, vocab_size=101, num_special_tokens=2, mask_token_id=1)
    cells = predictable(make_cells(70, seed=1))
    losses: dict[str, list[float]] = {name: [] for name in TISSUES}
    correct: dict[str, list[bool]] = {name: [] for name in TISSUES}
    for cell in np.flatnonzero(first_held_out(np.ones(70, np.bool_), CELLS)).tolist():
        masked, labels = map(torch.from_numpy, mask_cell(np.array(cells[cell][:32]), cell, 0, rule))
        with torch.no_grad():
            logits = model(masked[None]).logits[0][labels != -100].double()
        expected = labels[labels != -100]
        losses[TISSUES[cell % 3]] += (logits.logsumexp(1) - logits.gather(1, expected[:, None])[:, 0]).tolist()
        correct[TISSUES[cell % 3]] += (logits.argmax(1) == expected).tolist()
    everything = np.concatenate(list(losses.values()))
    assert record["validation_masked_tokens"] == len(everything) > 80
    assert record["validation_loss"] == pytest.approx(np.mean(everything), rel=1e-5)
    assert record["validation_perplexity"] == pytest.approx(np.exp(np.mean(everything)), rel=1e-5)
    assert record["validation_accuracy"] == pytest.approx(np.mean(np.concatenate(list(correct.values()))))
    assert record["validation_accuracy"] > 0.1
    for name in TISSUES:
        assert record[f"validation_loss/{name}"] == pytest.approx(np.mean(losses[name]), rel=1e-5)
        assert record[f"validation_accuracy/{name}"] == pytest.approx(np.mean(correct[name]))


def test_a_model_without_context_is_the_mark_to_beat(folder: Path) -> None:
    """Random weights are worse than it; these cells have nothing but their first genes to learn."""
    record = read_metrics(folder / "run")[-1]
    assert record["validation_loss"] < record["validation_unigram_loss"] < np.log(99)
    assert "best_step" not in read_exit(folder / "run")
