"""The example of docs/evaluation.md: its commands run as they stand there, and give the numbers that stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs/evaluation.md"
TOLERANCE = 0.1
"""Of scores from 0 to 1 and of losses in nats: 400 steps of training amplify how a processor rounds."""


@pytest.fixture(scope="module")
def example() -> str:
    """The section of the page."""
    return PAGE.read_text().partition("## An example, and how to read it")[2].partition("\n## ")[0]


def table(text: str) -> dict[str, list[float]]:
    """Numbers of the rows of the first table, by name, without the spread."""
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert first is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first[0].splitlines()[2:]]
    return {name: [float(cell.partition(" ±")[0]) for cell in cells if cell] for name, *cells in rows}


def test_the_example_gives_the_numbers_of_the_page(example: str, tmp_path: Path) -> None:
    (commands,) = re.findall(r"```bash\n(.*?)```", example, re.DOTALL)
    script = commands.replace("toy/", f"{tmp_path}/").replace("geneformer-pretrain ", "python -m geneformer_pretrain ")
    script = f'set -e\npython() {{ {sys.executable} "$@"; }}\n{script}'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    found, written = table((tmp_path / "report/report.md").read_text()), table(example)
    assert list(found) == list(written)
    for name, numbers in found.items():
        assert numbers == pytest.approx(written[name], abs=TOLERANCE), name
    values = json.loads((tmp_path / "report/report.json").read_text())
    rows, losses = values["representations"], values["masked_loss"]
    losses_written = re.findall(r"(?:model|random weights|gene frequencies of these cells) (\d+\.\d+)", example)
    assert list(losses.values()) == pytest.approx([float(loss) for loss in losses_written], abs=TOLERANCE)
    # What the page says of them.
    assert losses["model"] < losses["gene frequencies of these cells"] - TOLERANCE
    model, random = (rows[name]["logistic"]["macro_f1_folds"] for name in ("model", "random weights"))
    assert all(mine > theirs for mine, theirs in zip(model, random, strict=True))
    assert rows["PCA of token presence"]["logistic"]["macro_f1"] > 0.9
