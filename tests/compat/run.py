"""Load an export in other releases of transformers, each in an environment of its own: `make compat`.

Environments are made in FOLDER (build/compat) once and kept. They need the network; those of one Python share torch, 1
GB without CUDA and 5 GB with it. Several Pythons can be named: `make compat ARGS='--pythons python3.11 python3.13'`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from modeling_bert_te import BertConfig, BertForMaskedLM

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {"4.46.3": False, "4.56.2": True, "4.57.6": True, "5.24.0": True}
"""Releases of transformers, and whether they fit modeling_bert_te.py."""


def write_export(folder: Path) -> None:
    """Write a small export of random weights, cells, and the outputs that are expected."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=101, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        hidden_act="relu", max_position_embeddings=64, layer_norm_eps=1e-12, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, architectures=["BertForMaskedLM"],
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():  # no bias left at zero, no LayerNorm at one
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    mask = (torch.arange(20) < torch.tensor([20, 3, 11])[:, None]).long()
    ids = torch.randint(2, 101, mask.shape) * mask
    with torch.no_grad():
        outputs = model(ids, mask, labels=torch.where(mask.bool(), ids, -100), output_hidden_states=True)
    cells = {"ids": ids, "mask": mask, "logits": outputs.logits, "hidden": outputs.hidden_states[-2]}
    torch.save(cells | {"loss": outputs.loss}, folder / "cells.pt")


def environment(folder: Path, packages: list[str], python: str, base: Path | None = None) -> Path:
    """Return the interpreter of an environment with these packages, made if it is not there.

    Parameters
    ----------
    base
        Interpreter of an environment whose packages this one has too.
    """
    interpreter, stamp = folder / "bin/python", folder / ".installed"
    if not stamp.exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        if base is not None:
            site = "import sysconfig; print(sysconfig.get_path('purelib'))"
            own, others = (
                subprocess.check_output([each, "-c", site], text=True).strip() for each in (interpreter, base)
            )
            (Path(own) / "base.pth").write_text(others + "\n")
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *packages], check=True)
        stamp.touch()
    return interpreter


def main() -> None:
    """Check every release with every Python; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(description="Load an export in other releases of transformers.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/compat", help="of the environments")
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters, e.g. python3.12")
    parser.add_argument("--releases", nargs="+", default=list(RELEASES), help="of transformers")
    options = parser.parse_args()
    failed = []
    missing = [python for python in options.pythons if not shutil.which(python)]
    if missing:
        parser.error(f"no such interpreter: {', '.join(missing)}")
    torch_version = version("torch").split("+")[0]
    for python in options.pythons:
        name = subprocess.check_output(
            [python, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"], text=True
        )
        place = options.folder / name.strip()
        base = environment(place / f"torch-{torch_version}", [f"torch=={torch_version}", "numpy"], python)
        for release in options.releases:
            own = environment(place / f"transformers-{release}", [f"transformers=={release}"], python, base)
            with tempfile.TemporaryDirectory() as scratch:
                write_export(Path(scratch))
                if RELEASES.get(release, True):
                    shutil.copy(ROOT / "modeling_bert_te.py", scratch)
                check = [own, "-I", ROOT / "tests/compat/check.py", scratch]
                if subprocess.run(check, cwd=scratch).returncode:
                    failed.append(f"transformers {release} with {python}")
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
