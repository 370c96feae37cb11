"""The repository as a whole: links, commands, versions and paths that its files name are true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from geneformer_pretrain import __version__

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[3]


def _repository_files() -> list[Path]:
    """Files that git tracks or would add, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def _text(path: Path) -> str:
    """Contents of a text file, empty for a binary one."""
    data = (ROOT / path).read_bytes()
    return "" if b"\0" in data[:8192] else data.decode()


def _requirements(text: str) -> dict[str, Requirement]:
    """Requirements by name from the text of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line)}


def _pins() -> dict[str, str]:
    """Version of each package in requirements.txt."""
    pins = {}
    for name, requirement in _requirements(_text(Path("requirements.txt"))).items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} in requirements.txt is not a pin"
        pins[name] = specifier.version
    return pins


def _project() -> dict[str, Any]:
    return tomllib.loads(_text(Path("pyproject.toml")))["project"]


# --- files ------------------------------------------------------------------------------------------------


def test_no_file_names_a_local_path() -> None:
    """No home, mount or work folder of one machine is written into a file."""
    local = re.compile(r"(?<![\w.~}>/-])/(?:home|Users|root|mnt|work|scratch|lustre)/[\w.-]+")
    found = [f"{path}: {hit}" for path in _repository_files() for hit in local.findall(_text(path))]
    assert not found, "\n".join(found)


def test_relative_links_resolve() -> None:
    """Every relative link and heading anchor in a Markdown file leads somewhere."""
    broken = []
    for path in (p for p in _repository_files() if p.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", _text(path)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (ROOT / path.parent / name) if name else ROOT / path
            if not file.exists() or (anchor and anchor not in _anchors(file.read_text())):
                broken.append(f"{path}: {target}")
    assert not broken, "\n".join(broken)


def _anchors(markdown: str) -> set[str]:
    """Anchors that the headings of a Markdown text get."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_one_documentation_for_agents() -> None:
    """Both ways in, the README's first line and AI_DOCUMENTATION.md, lead to AGENT_DOCUMENTATION.md."""
    link = "](AGENT_DOCUMENTATION.md)"
    assert link in _text(Path("README.md")).splitlines()[0]
    assert link in _text(Path("AI_DOCUMENTATION.md"))


@pytest.mark.parametrize("script", [".ci/run", "internal/digest.sh", "slurm/train.sbatch"])
def test_shell_scripts_parse_and_stop_on_errors(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert "\nset -euo pipefail\n" in _text(Path(script))


@pytest.mark.parametrize("script", [".ci/run", "internal/digest.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111 == 0o111


# --- commands ---------------------------------------------------------------------------------------------


def _make(*arguments: str) -> str:
    """Run make in the root, as from a shell even when these tests run under make; return what it prints."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def _make_targets() -> list[str]:
    """Targets that `make` alone lists with a description."""
    return re.findall(r"^  (\S+) +\S", _make(), re.MULTILINE)


def test_make_lists_every_target() -> None:
    """`make` alone describes each phony target."""
    phony = re.findall(r"^\.PHONY: (.+)$", _text(Path("Makefile")), re.MULTILINE)
    assert sorted(_make_targets()) == sorted(" ".join(phony).split())


def test_documented_make_targets_exist() -> None:
    """Every `make TARGET` in a Markdown file or script names a target."""
    listed = _make_targets()
    unknown = []
    for path in _repository_files():
        if path.suffix == ".md" or path == Path(".ci/run"):
            for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)(?=\s|`|$)", _text(path), re.MULTILINE):
                if target not in listed:
                    unknown.append(f"{path}: make {target}")
    assert not unknown, "\n".join(unknown)


def test_make_uses_an_interpreter_as_it_is_on_request() -> None:
    """With VENV=none nothing is created or installed."""
    plan = _make("-n", "train", "VENV=none", f"PYTHON={sys.executable}", "ARGS=training.seed=3")
    (command,) = plan.strip().splitlines()
    assert command.startswith(f"{sys.executable} -m torch.distributed.run ")
    assert command.endswith(" train.py training.seed=3")


# --- versions ---------------------------------------------------------------------------------------------


def test_the_newest_heading_of_the_changelog_is_the_version_or_unreleased() -> None:
    heading = re.search(r"^## (\S+)", _text(Path("CHANGELOG.md")), re.MULTILINE)
    assert heading is not None
    assert heading[1] in (__version__, "Unreleased")


def test_pins_are_inside_the_ranges_of_pyproject() -> None:
    """The tested versions satisfy the project's own ranges, and every dependency has one."""
    project, pins = _project(), _pins()
    required = [Requirement(text) for text in project["dependencies"]]
    optional = [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    unpinned = [r.name for r in required if canonicalize_name(r.name) not in pins]
    assert not unpinned, f"in pyproject.toml, not in requirements.txt: {unpinned}"
    undeclared = pins.keys() - {canonicalize_name(r.name) for r in required + optional}
    assert not undeclared, f"in requirements.txt, not in pyproject.toml: {undeclared}"
    outside = [
        f"{r}: {pins[canonicalize_name(r.name)]}"
        for r in required + optional
        if not r.specifier.contains(pins.get(canonicalize_name(r.name), ""), prereleases=True)
        and canonicalize_name(r.name) in pins
    ]
    assert not outside, "\n".join(outside)


def test_a_container_can_leave_out_what_it_brings() -> None:
    """The patterns by which requirements.txt is filtered remove exactly those packages."""
    text = _text(Path("requirements.txt"))
    in_dockerfile = re.search(r"grep -vE '([^']+)' /tmp/requirements.txt", _text(Path("Dockerfile")))
    assert in_dockerfile is not None
    for pattern, removed in (("^torch==", {"torch"}), (in_dockerfile[1], {"torch", "numpy"})):
        rest = "\n".join(line for line in text.splitlines() if not re.search(pattern, line))
        assert _requirements(text).keys() - _requirements(rest).keys() == removed


def test_pinned_tools_agree() -> None:
    """Ruff in the pre-commit hooks is the one that `make check` runs; so are the extras of the image."""
    hooks = re.findall(r"ruff==([\d.]+)", _text(Path(".pre-commit-config.yaml")))
    assert hooks
    assert set(hooks) == {_pins()["ruff"]}
    extras = _project()["optional-dependencies"]
    megatron_fsdp = re.search(r"megatron-fsdp==([\d.]+)", _text(Path("Dockerfile")))
    gitingest = re.search(r"gitingest==([\d.]+)", _text(Path("Makefile")))
    for found, extra in ((megatron_fsdp, extras["nvfsdp"]), (gitingest, extras["dev"])):
        assert found is not None
        name = found[0].partition("==")[0]
        (requirement,) = (r for r in map(Requirement, extra) if r.name == name)
        assert requirement.specifier.contains(found[1])


# --- digest -----------------------------------------------------------------------------------------------


def test_digest_leaves_out_data_and_itself(tmp_path: Path) -> None:
    """The digest hands gitingest every file of the repository but data, charts, licence text and itself."""
    files = {str(path) for path in _repository_files()}
    stand_in = tmp_path / "gitingest"
    stand_in.write_text('#!/usr/bin/env bash\ncd "$1" && find . -type f > "$3"\n')
    stand_in.chmod(0o755)
    # A copy, since the script writes where it lies.
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    (tmp_path / "copy" / "internal" / "gitingest.txt").write_text("an earlier digest")
    subprocess.run(["git", "init", "--quiet", tmp_path / "copy"], check=True)
    subprocess.run([tmp_path / "copy" / "internal" / "digest.sh", stand_in], check=True, capture_output=True)
    given = (tmp_path / "copy" / "internal" / "gitingest.txt").read_text().split()
    data = {name for name in files if re.fullmatch(r"sample_data/(.*\.parquet|vocab\.txt)|docs/.*\.svg", name)}
    assert {name.removeprefix("./") for name in given} == files - data - {"LICENSE", "internal/gitingest.txt"}
