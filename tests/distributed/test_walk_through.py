"""From counts to an evaluated model on a CPU, by the commands that a user types."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from geneformer_pretrain import cli
from geneformer_pretrain.training import main as train
from sample_data import make_sample_data as msd
from tests.forks import ROOT, Fork
from tests.tiny import read_exit, read_metrics

COUNTS = ROOT / "sample_data" / "counts.h5ad"
PART = "part-00000.parquet"
TINY = (
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=128",
    "model.seq_length=256",
    "training.num_train_steps=40",
    "training.wandb_init_args=null",
)


def run(folder: Path, main: Callable[[list[str]], object], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the main function of a command in `folder`, in a process of its own."""
    return Fork(folder / "output", main, arguments, folder=folder).wait()


def succeed(folder: Path, main: Callable[[list[str]], object], arguments: list[str]) -> str:
    """Return what a command printed on standard output; it must exit with 0."""
    done = run(folder, main, arguments)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def geneformer(folder: Path, line: str) -> str:
    """Run `geneformer-pretrain LINE`."""
    return succeed(folder, cli.main, line.split())


def training(*overrides: str) -> list[str]:
    """Arguments of `train.py` for a tiny model."""
    return [*TINY, "data.cache_dir=cache", "training.checkpoint_dir=run", *overrides]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which counts became a gene set, a corpus, its two sides and a model."""
    folder = tmp_path_factory.mktemp("walk")
    geneformer(folder, f"gene-set build {COUNTS} --output genes --n-counts-column n_counts --exact")
    geneformer(
        folder,
        f"tokenize {COUNTS} --gene-set genes --n-counts-column n_counts --columns cell_type,donor --output corpus",
    )
    geneformer(folder, "split corpus --by donor --hold-out donor_4 --output parts")
    given = training("data.path=parts/train", "data.validation_path=parts/held_out", "data.gene_set=genes")
    printed = succeed(folder, train.main, given)
    assert "held out    100 cells" in printed
    return folder


def test_corpus_has_the_cells_of_the_sample(walk: Path) -> None:
    """The gene set is another one than the sample's, so tokens differ; lengths do not."""
    corpus = pq.read_table(walk / "corpus" / PART)
    assert corpus["length"].to_pylist() == pq.read_table(ROOT / "sample_data/cells.parquet")["length"].to_pylist()
    assert set(corpus["cell_type"].to_pylist()) == {f"type_{number}" for number in range(msd.N_TYPES)}
    held_out = pq.read_table(walk / "parts" / "held_out" / PART)
    assert held_out["cell_id"].to_pylist() == [f"sim_cell_{number}" for number in range(4, 500, 5)]


def test_inspect(walk: Path) -> None:
    printed = geneformer(walk, "inspect corpus --output inspection")
    assert "294,283" in printed
    pictures = {path.name for path in (walk / "inspection").glob("*.png")}
    assert pictures == {"lengths.png", "genes.png", "tokens_by_cell_type.png", "tokens_by_donor.png"}


def test_training_learned_and_its_rates_are_of_steps(walk: Path) -> None:
    assert read_exit(walk / "run")["reason"] == "completed"
    records = read_metrics(walk / "run")
    assert records[-1]["validation_loss"] < records[0]["loss"] - 0.05
    rates = [record["tokens_per_second"] for record in records[1:]]
    assert max(rates) < 20 * np.median(rates)


def test_stock_classes_load_the_model_and_its_tokenizer(walk: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(walk / "run/final_model")
    model = AutoModelForMaskedLM.from_pretrained(walk / "run/final_model")
    cell = pq.read_table(walk / "corpus" / PART)["input_ids"][0].as_py()[:20]
    names = tokenizer.convert_ids_to_tokens(cell)
    assert all(name.startswith("sim_gene_") for name in names)
    inputs = tokenizer(" ".join(names), return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == cell
    assert model(input_ids=inputs["input_ids"]).logits.shape == (1, 20, len(tokenizer))


def test_export_is_the_final_model_with_its_genes(walk: Path) -> None:
    assert "With the gene set genes." in geneformer(walk, "export run --output exported")
    exported, final = (
        {p.name: p.read_bytes() for p in (walk / at).iterdir()} for at in ("exported", "run/final_model")
    )
    assert exported == final
    assert "genes.parquet" in exported
    failed = run(walk / "parts", cli.main, ["export", "../run", "--output", "exported"])
    assert failed.returncode == 1
    assert "names the gene set genes, which is not there: name it with --gene-set" in failed.stdout + failed.stderr


def test_embed_gives_the_same_from_the_corpus_and_from_counts(walk: Path) -> None:
    geneformer(walk, "embed run/final_model corpus --output cells.parquet")
    geneformer(walk, f"embed run/final_model {COUNTS} --n-counts-column n_counts --output counts.parquet")
    tables = [pq.read_table(walk / name) for name in ("cells.parquet", "counts.parquet")]
    assert tables[0]["cell_id"].to_pylist() == tables[1]["cell_id"].to_pylist()
    vectors = [np.array(table["embedding"].to_pylist()) for table in tables]
    assert vectors[0].shape == (500, 64)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_evaluate_counts(walk: Path) -> None:
    options = "--n-counts-column n_counts --label cell_type --max-cells 200"
    geneformer(walk, f"evaluate run/final_model {COUNTS} {options} --output worth")
    report = (walk / "worth" / "report.md").read_text()
    for row in ("| model |", "| random weights |", "| PCA of log-normalised counts |", "| PCA of token presence |"):
        assert row in report


def test_perturb(walk: Path) -> None:
    geneformer(walk, "perturb run/final_model parts/held_out --mode delete --max-cells 2 --output deleted")
    scores = pq.read_table(walk / "deleted" / "scores" / PART)
    assert len(set(scores["cell"].to_pylist())) == 2
    assert max(scores["gene_similarity"].to_pylist()) <= 1 + 1e-6
    assert (walk / "deleted" / "genes.parquet").is_file()


def test_a_corpus_of_another_gene_set_is_refused(walk: Path) -> None:
    """By training, `embed` and `perturb`, naming the number of tokens that differ and the first."""
    geneformer(walk, f"gene-set build {COUNTS} --output other --n-counts-column n_counts --exact --min-cells 5")
    geneformer(walk, f"tokenize {COUNTS} --gene-set other --n-counts-column n_counts --output other_corpus")
    sizes = [json.loads((walk / name / "gene_set.json").read_text())["vocab_size"] for name in ("other", "genes")]
    given = training("data.path=other_corpus", "data.gene_set=genes", "training.checkpoint_dir=other_run")
    lines = ("embed {} --output other.parquet", "perturb {} --mode delete --output other_scores")
    commands = [(cli.main, line.format("run/final_model other_corpus").split()) for line in lines]
    for main, arguments in ((train.main, given), *commands):
        done = run(walk, main, arguments)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert f"vocab_size {sizes[0]} there, {sizes[1]} here" in done.stderr + done.stdout
        assert "tokens differ, first token" in done.stderr + done.stdout
