"""The layout of the package: direction of imports, size of files, and what is installed."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "geneformer_pretrain"

LAYERS = (
    {"errors", "console", "files", "figures", "jit"},
    {"config"},
    {"tokenization", "data", "kernels", "distributed", "run"},
    {"model", "checkpoint"},
    {"training", "inference", "planner"},
    {"commands"},
    {"cli", "__main__"},
)
"""A wing imports from wings of its own layer, without a circle, and of those before it."""

LIMIT = 400
"""Most lines of a file, kernels apart."""


def wing_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def wing_imports() -> dict[str, set[str]]:
    """For each wing, the other wings that it imports from."""
    found: dict[str, set[str]] = {}
    for path in files():
        names = (module.split(".") for module in imports(path) if module.startswith("geneformer_pretrain."))
        found.setdefault(wing_of(path), set()).update(name[1] for name in names)
    return {wing: others - {wing, "__version__"} for wing, others in found.items()}


def test_every_wing_has_a_layer() -> None:
    assert set(wing_imports()) == set().union(*LAYERS)


def test_imports_point_down() -> None:
    layer_of = {wing: number for number, layer in enumerate(LAYERS) for wing in layer}
    wrong = [
        f"{wing} imports {other}"
        for wing, others in wing_imports().items()
        for other in others
        if layer_of[other] > layer_of[wing]
    ]
    assert not wrong


def test_no_circle_of_imports() -> None:
    left = wing_imports()
    while left:
        free = [wing for wing, others in left.items() if not others & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for wing in free:
            del left[wing]


@pytest.mark.parametrize("wing", ["tokenization", "data"])
def test_data_needs_neither_processes_nor_hydra(wing: str) -> None:
    found = [
        f"{path.name}: {module}"
        for path in (PACKAGE / wing).glob("*.py")
        for module in imports(path)
        if module.split(".")[0] == "hydra" or module.startswith("torch.distributed")
    ]
    assert not found


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in files()
        if wing_of(path) != "kernels" and len(path.read_text().splitlines()) > LIMIT
    }
    assert not long
    assert len((PACKAGE / "training/trainer.py").read_text().splitlines()) < 250


def test_nothing_installs_a_module_called_train() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["py-modules"] == ["modeling_bert_te"]
