"""Fine-tune a pretrained model to name cell types, with nothing but stock Hugging Face libraries.

    python examples/finetune_cell_types.py checkpoints/l0_sanity/final_model                  # all weights
    python examples/finetune_cell_types.py checkpoints/l0_sanity/final_model --lora           # low-rank adapters only
    python examples/finetune_cell_types.py MODEL --cells CORPUS.parquet --label cell_type     # one's own cells

A run's `final_model` is a plain BERT: `BertForSequenceClassification` loads it, puts a new head on the vector of the
first token (a cell's top gene, or `<cls>`) and `transformers.Trainer` trains it. `--lora` leaves the weights as they
are and learns small additions to the attention with peft.

Without `--cells`, the simulated cells of `sample_data` serve; the generator names their types. A quarter of the cells
is held out, stratified by type. The result stands beside two baselines: the largest type, and a logistic regression on
which genes a cell has. If the model does not beat the second, it has not earned its keep on these cells.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
MIN_CELLS = 10
"""Cells that a type needs to be learned and tested."""

PAD_TOKEN = 0
Cells = list[np.ndarray]


def read_cells(path: Path, label: str) -> tuple[Cells, list[str]]:
    """Read tokens and labels of a corpus file; types of too few cells and cells without a label are left out."""
    table = pq.read_table(path)
    for name in ("input_ids", label):
        if name not in table.column_names:
            raise SystemExit(f"{path}: no column {name!r}; it has {', '.join(table.column_names)}.")
    names = [str(name) if name is not None else "" for name in table[label].to_pylist()]
    common = {name for name in set(names) if name and names.count(name) >= MIN_CELLS}
    if len(common) < 2:
        raise SystemExit(
            f"{path}: column {label!r} has {len(common)} types of at least {MIN_CELLS} cells; two are needed."
        )
    rows = [row for row, name in enumerate(names) if name in common]
    if len(rows) < len(names):
        print(f"{len(names) - len(rows):,} of {len(names):,} cells are left out: no type, or one of too few cells.")
    return [table["input_ids"][row].values.to_numpy() for row in rows], [names[row] for row in rows]


def simulated_cells() -> tuple[Cells, list[str]]:
    """Read the sample's tokens and draw its types again: the generator fixes a cell by its number."""
    import sys

    sys.path.insert(0, str(ROOT))
    from sample_data import make_sample_data as msd

    world = msd.make_world(0)
    types = [f"type {msd.simulate_counts(world, cell)[1]}" for cell in range(msd.SAMPLE_CELLS)]
    table = pq.read_table(ROOT / "sample_data/cells.parquet")
    return [cell.values.to_numpy() for cell in table["input_ids"]], types


def collate(cells: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad cells to the longest of the batch."""
    ids = [torch.from_numpy(cell["input_ids"]) for cell in cells]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD_TOKEN)
    labels = torch.tensor([cell["labels"] for cell in cells])
    return {"input_ids": padded, "attention_mask": (padded != PAD_TOKEN).long(), "labels": labels}


def load_model(folder: Path, names: list[str], lora: bool) -> Any:
    """Load an export with a new head; with LoRA, freeze it and add adapters to the attention."""
    model = BertForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    if not lora:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    # The head is new, and so is the pooler before it: they are trained whole.
    whole = ["classifier", "pooler"]
    config = LoraConfig(
        TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "key", "value"], modules_to_save=whole
    )
    return get_peft_model(model, config)


def score(truth: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1."""
    return {
        "accuracy": float(accuracy_score(truth, answer)),
        "macro_f1": float(f1_score(truth, answer, average="macro", zero_division=0)),
    }


def baselines(cells: Cells, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, dict[str, float]]:
    """Score the largest type, and a logistic regression on the presence of genes in the same tokens."""
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    ids = np.concatenate(cells).astype(np.int64)
    presence = sparse.csr_matrix((np.ones(len(ids)), ids, offsets))
    largest = np.full(len(test), np.bincount(labels[train]).argmax())
    regression = LogisticRegression(max_iter=1000).fit(presence[train], labels[train])
    return {
        "largest type": score(labels[test], largest),
        "logistic regression on gene presence": score(labels[test], regression.predict(presence[test])),
    }


def finetune(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Fine-tune, and score on the held-out cells beside the baselines."""
    cells, named = read_cells(arguments.cells, arguments.label) if arguments.cells else simulated_cells()
    names, labels = np.unique(named, return_inverse=True)
    cells = [cell[: arguments.max_tokens].astype(np.int64) for cell in cells]
    train, test = train_test_split(np.arange(len(cells)), test_size=0.25, random_state=arguments.seed, stratify=labels)
    rows = [{"input_ids": cell, "labels": int(label)} for cell, label in zip(cells, labels, strict=True)]
    torch.manual_seed(arguments.seed)
    model = load_model(arguments.model, names.tolist(), arguments.lora)
    learning_rate = arguments.learning_rate or (3e-3 if arguments.lora else 1e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=64,
            learning_rate=learning_rate,
            warmup_steps=10,
            weight_decay=0.001,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=[rows[row] for row in train],
        compute_metrics=lambda out: score(out.label_ids, out.predictions.argmax(axis=1)),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = model.num_parameters()
    print(f"{len(train)} cells to train on, {len(test)} held out; {trained:,} of {everything:,} weights learn")
    trainer.train()
    found = trainer.evaluate([rows[row] for row in test])
    trainer.save_model(str(arguments.output))
    mine = {name: found[f"eval_{name}"] for name in ("accuracy", "macro_f1")}
    kind = "LoRA" if arguments.lora else "fine-tuned"
    return {kind: mine, **baselines(cells, labels, train, test)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fine-tune an exported model to name cell types.")
    parser.add_argument("model", type=Path, help="a run's final_model, or any Hugging Face BERT on genes")
    parser.add_argument("--cells", type=Path, help="corpus file in parquet (default: the simulated sample)")
    parser.add_argument("--label", default="cell_type", help="its column of types (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="folder of the result (%(default)s)")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters and the head only")
    parser.add_argument("--epochs", type=float, default=8, help="passes over the training cells (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="(1e-3, with --lora 3e-3: fit for small models)")
    parser.add_argument("--max-tokens", type=int, default=256, help="top genes of a cell that are used (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the new head and the order (%(default)s)")
    arguments = parser.parse_args()
    results = finetune(arguments)
    for name, values in results.items():
        print(f"{name}: accuracy {values['accuracy']:.3f}, macro F1 {values['macro_f1']:.3f}")
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
