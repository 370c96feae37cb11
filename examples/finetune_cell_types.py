"""Fine-tune a pretrained model to name cell types, with nothing but stock Hugging Face libraries.

    python examples/finetune_cell_types.py checkpoints/l0_sanity/final_model                  # all weights
    python examples/finetune_cell_types.py checkpoints/l0_sanity/final_model --lora --output adapters  # adapters only
    python examples/finetune_cell_types.py MODEL --cells CORPUS --test-cells OTHER --label cell_type  # one's own cells

A run's `final_model` is a plain BERT: `BertForSequenceClassification` loads it, puts a new head on the vector of the
first token (a cell's top gene, or `<cls>`) and `transformers.Trainer` trains it. `--lora` leaves the weights as they
are and learns small additions to the matrices of its layers and to the vectors of its genes with peft.

Three sets of cells: the model learns on the first; the second chooses among the learning rates; the third is looked at
once, for the result. The first two are 3/4 and 1/4 of `--cells`, stratified by type; the third is `--test-cells`, best
of donors that the others lack (`geneformer-pretrain split --by donor_id`). Without options, simulated cells serve:
those of `sample_data`, and 500 fresh ones of the same world.

The result stands beside three baselines: the same training from random weights (what did pretraining bring?), a
logistic regression on which genes a cell has, and the largest type. A model that does not beat them has not earned its
keep.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
MIN_CELLS = 10
"""Cells that a type needs to be learned and tested."""

LEARNING_RATES = [3e-4, 1e-3, 3e-3]
TEST_CELLS = 500
"""Fresh simulated cells."""

METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
PAD_TOKEN = 0
MARK = "training_args.bin"
WRITTEN = ("config.json", "model*.safetensors*", "adapter_*", "README.md", MARK, "results.json")
"""Files of the result; the mark is among them from the first model saved, and tells that a folder holds a result."""

Scores = dict[str, float]


@dataclass
class Cells:
    """Tokens of cells, each an array, and their types: names, or numbers once the names are known."""

    tokens: list[np.ndarray]
    types: np.ndarray

    def take(self, rows: np.ndarray) -> "Cells":
        """Return some of the cells."""
        return Cells([self.tokens[row] for row in rows], self.types[rows])

    def examples(self) -> list[dict[str, Any]]:
        """Return what the Trainer reads."""
        pairs = zip(self.tokens, self.types.tolist(), strict=True)
        return [{"input_ids": tokens, "labels": label} for tokens, label in pairs]


def require_output(output: Path, model: Path, *, overwrite: bool) -> None:
    """Stop if the output holds anything, unless that is an earlier result to overwrite."""
    if output.exists() and not output.is_dir():
        raise SystemExit(f"--output {output}: is a file; name a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if output.resolve() == model.resolve():
        raise SystemExit(f"--output {output}: the model itself; name another folder.")
    if not (output / MARK).is_file():
        raise SystemExit(f"--output {output}: holds something else than a result of this script; name another folder.")
    if not overwrite:
        raise SystemExit(f"--output {output}: holds an earlier result; name another folder or add --overwrite.")


def delete_result(output: Path) -> None:
    """Delete an earlier result, and no file of others."""
    for pattern in WRITTEN:
        for file in output.glob(pattern):
            file.unlink()


def read_cells(path: Path, label: str, max_tokens: int) -> Cells:
    """Read tokens and types of a corpus, a parquet file or a folder of them; cells without a type are left out."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise SystemExit(f"{path}: no such corpus; name a parquet file or a folder that `tokenize` wrote.")
    try:
        names = pq.read_schema(files[0]).names
    except pa.ArrowInvalid:
        raise SystemExit(
            f"{files[0]}: not a parquet file; of counts, make a corpus first: geneformer-pretrain tokenize {path} "
            f"--gene-set MODEL --columns {label} --output CORPUS"
        ) from None
    for name in ("input_ids", label):
        if name not in names:
            raise SystemExit(f"{path}: no column {name!r}; it has {', '.join(names)}.")
    table = pa.concat_tables([pq.read_table(file, columns=["input_ids", label]) for file in files])
    table = table.filter(table[label].is_valid())
    tokens = [cell.values.to_numpy()[:max_tokens].astype(np.int64) for cell in table["input_ids"]]
    return Cells(tokens, np.array([str(name) for name in table[label].to_pylist()]))


def require_same_genes(model: Path, cells: Path) -> None:
    """Stop if model and corpus say that their tokens stand for different genes."""
    notes = model / "gene_set.json", cells / "corpus.json"
    if all(path.is_file() for path in notes):
        ours, theirs = (json.loads(path.read_text()) for path in notes)
        if ours["fingerprint"] != theirs["gene_set"]["fingerprint"]:
            raise SystemExit(
                f"{cells}: tokenized with the gene set {theirs['gene_set']['name']!r}, which is not the model's, "
                f"{ours['name']!r}; tokenize the counts with --gene-set {model}."
            )


def simulated_cells(first: int, number: int, max_tokens: int) -> Cells:
    """Simulate cells as sample_data does: 0 to 499 are its own, later ones are fresh."""
    import sys

    sys.path.insert(0, str(ROOT))
    from sample_data import make_sample_data as msd

    world = msd.make_world(0)
    tokens, types = zip(*msd.simulate_cells(world, msd.reference_medians(world), first, number), strict=True)
    cut = [cell[:max_tokens].astype(np.int64) for cell in tokens]
    return Cells(cut, np.array([f"type {number}" for number in types]))


def three_sets(arguments: argparse.Namespace) -> tuple[list[Cells], list[str]]:
    """Return the cells to learn from, to choose by and to test on, types as numbers, and the types' names."""
    if arguments.cells is None:
        known = simulated_cells(0, 500, arguments.max_tokens)
        test = simulated_cells(500, TEST_CELLS, arguments.max_tokens)
    else:
        for cells in (arguments.cells, arguments.test_cells):
            require_same_genes(arguments.model, cells)
        known = read_cells(arguments.cells, arguments.label, arguments.max_tokens)
        test = read_cells(arguments.test_cells, arguments.label, arguments.max_tokens)
    found, counts = np.unique(known.types, return_counts=True)
    names = found[counts >= MIN_CELLS]
    if len(names) < 2:
        raise SystemExit(
            f"{arguments.cells}: column {arguments.label!r} has {len(names)} types of at least {MIN_CELLS} cells; two "
            "are needed."
        )
    sets = []
    for what, cells in (("--cells", known), ("--test-cells", test)):
        rows = np.flatnonzero(np.isin(cells.types, names))
        if len(rows) < len(cells.types):
            print(f"{what}: {len(cells.types) - len(rows):,} of {len(cells.types):,} cells are left out, of types with")
            print(f"  fewer than {MIN_CELLS} cells to learn from.")
        if not len(rows):
            raise SystemExit(f"{what}: no cell of the types {', '.join(names)}.")
        kept = cells.take(rows)
        sets.append(Cells(kept.tokens, np.searchsorted(names, kept.types)))
    rows = np.arange(len(sets[0].types))
    learn, choose = train_test_split(rows, test_size=0.25, random_state=arguments.seed, stratify=sets[0].types)
    return [sets[0].take(learn), sets[0].take(choose), sets[1]], names.tolist()


def collate(cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad cells to the longest of the batch."""
    ids = [torch.from_numpy(cell["input_ids"]) for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD_TOKEN)
    labels = torch.tensor([cell["labels"] for cell in cells])
    return {"input_ids": padded, "attention_mask": (padded != PAD_TOKEN).long(), "labels": labels}


def make_model(folder: Path, names: list[str], *, lora: bool, pretrained: bool = True) -> Any:
    """Load an export, or its architecture with random weights, with a new head; with LoRA, freeze all but the head."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if pretrained:
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(names), **labels)
    else:
        model = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=len(names), **labels))
    if not lora:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    # The vectors of genes adapt too. The head is new, and so is the pooler before it: they are trained whole.
    adapted = r".*(word_embeddings|encoder\..*\.(query|key|value|dense))"
    whole = ["classifier", "pooler"]
    config = LoraConfig(TaskType.SEQ_CLS, r=16, lora_alpha=32, target_modules=adapted, modules_to_save=whole)
    return get_peft_model(model, config)


def score(truth: np.ndarray, answer: np.ndarray) -> Scores:
    """Return accuracy, and two means over the types: of the share found (balanced accuracy) and of F1."""
    values = (
        accuracy_score(truth, answer),
        balanced_accuracy_score(truth, answer),
        f1_score(truth, answer, average="macro", zero_division=0),
    )
    return dict(zip(METRICS, map(float, values), strict=True))


def train(make: Callable[[], Any], learn: Cells, learning_rate: float, arguments: argparse.Namespace) -> Trainer:
    """Train a new model."""
    torch.manual_seed(arguments.seed)
    trainer = Trainer(
        make(),
        TrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=64,
            learning_rate=learning_rate,
            warmup_steps=10,
            weight_decay=0.001,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=learn.examples(),  # type: ignore[arg-type]
    )
    trainer.train()
    return trainer


def score_model(trainer: Trainer, cells: Cells) -> Scores:
    """Score a trained model."""
    return score(cells.types, trainer.predict(cells.examples()).predictions.argmax(axis=1))  # type: ignore[arg-type]


def train_best(make: Callable[[], Any], sets: list[Cells], arguments: argparse.Namespace) -> tuple[Trainer, float]:
    """Train once for each learning rate; return the model with the best macro F1 on the second set, and its rate."""
    best, found = -1.0, None
    for rate in arguments.learning_rates:
        trainer = train(make, sets[0], rate, arguments)
        macro_f1 = score_model(trainer, sets[1])["macro_f1"]
        print(f"  learning rate {rate:g}: macro F1 {macro_f1:.3f} on the cells to choose by", flush=True)
        if macro_f1 > best:
            best, found = macro_f1, (trainer, rate)
    assert found is not None
    return found


def gene_baselines(sets: list[Cells]) -> dict[str, Scores]:
    """Score a logistic regression on the presence of genes in the same tokens, and the largest type."""
    learn, _, test = sets
    width = 1 + max(int(cell.max()) for cells in sets for cell in cells.tokens)

    def presence(cells: Cells) -> sparse.csr_matrix:
        ids = np.concatenate(cells.tokens)
        offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells.tokens])])
        return sparse.csr_matrix((np.ones(len(ids)), ids, offsets), shape=(len(cells.tokens), width))

    regression = LogisticRegression(max_iter=1000).fit(presence(learn), learn.types)
    largest = np.full(len(test.types), np.bincount(learn.types).argmax())
    return {
        "logistic regression on gene presence": score(test.types, regression.predict(presence(test))),
        "largest type": score(test.types, largest),
    }


def finetune(arguments: argparse.Namespace) -> dict[str, Scores]:
    """Fine-tune, and score on the third set beside the baselines."""
    config = BertConfig.from_pretrained(arguments.model)
    # Positions beyond the cells of pretraining have vectors that were never trained.
    trained = getattr(config, "geneformer_max_tokens", config.max_position_embeddings)
    arguments.max_tokens = min(arguments.max_tokens, trained)
    sets, names = three_sets(arguments)
    print(f"{', '.join(f'{len(cells.types):,}' for cells in sets)} cells to learn from, to choose by, to test on")
    delete_result(arguments.output)
    results = {}
    for pretrained in (True, False):
        name = ("LoRA" if arguments.lora else "fine-tuned") if pretrained else "the same from random weights"
        print(f"{name}:", flush=True)
        make = partial(make_model, arguments.model, names, lora=arguments.lora, pretrained=pretrained)
        trainer, rate = train_best(make, sets, arguments)
        results[name] = score_model(trainer, sets[2]) | {"learning_rate": rate}
        if pretrained:
            learning = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
            print(f"  {learning:,} of {trainer.model.num_parameters():,} weights learn")
            trainer.save_model(str(arguments.output))
    return results | gene_baselines(sets)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fine-tune an exported model to name cell types.")
    parser.add_argument("model", type=Path, help="a run's final_model, or any Hugging Face BERT on genes")
    parser.add_argument(
        "--cells", type=Path, help="corpus to learn from: a parquet file or a folder (default: simulated)"
    )
    parser.add_argument("--test-cells", type=Path, help="corpus for the result, which nothing is chosen by")
    parser.add_argument("--label", default="cell_type", help="column of types of both (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="folder of the result (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier result in the output folder")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters and the head only")
    parser.add_argument("--epochs", type=float, default=20, help="passes over the training cells (%(default)s)")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", metavar="RATE", default=LEARNING_RATES,
        help="rates to choose among (%(default)s: fit for small models)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="top genes of a cell, if the model knows so many (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the new head and the order (%(default)s)")
    arguments = parser.parse_args()
    if (arguments.cells is None) != (arguments.test_cells is None):
        parser.error("--cells and --test-cells go together")
    require_output(arguments.output, arguments.model, overwrite=arguments.overwrite)
    logging.set_verbosity_error()  # a new head is no news here
    logging.disable_progress_bar()
    results = finetune(arguments)
    for name, values in results.items():
        numbers = ", ".join(f"{metric.replace('_', ' ')} {values[metric]:.3f}" for metric in METRICS)
        print(f"{name}: {numbers}")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
