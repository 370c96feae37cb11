"""`--overwrite` replaces what the command itself wrote, and nothing else."""

from pathlib import Path

import pytest

from geneformer_pretrain.cli import main
from geneformer_pretrain.errors import OutputError
from geneformer_pretrain.files import require_new_folder

COMMANDS = {
    "gene-set import": ["--token-dictionary", "t.json", "--gene-medians", "m.json"],
    "gene-set build": ["counts.h5ad"],
    "gene-set export": ["genes"],
    "inspect": ["corpus"],
    "split": ["corpus", "--fraction", "0.1"],
    "export": ["run/step_1"],
    "evaluate": ["model", "corpus", "--label", "type"],
    "perturb": ["model", "corpus", "--mode", "delete"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_others_is_not_overwritten(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any input is looked at; `tokenize`, which looks at its gene set first, is tested with its writer."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "step_30").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), *COMMANDS[command], "--output", "run", "--overwrite"])
    assert ended.value.code == 1
    assert "run: " in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "step_30"]


@pytest.mark.parametrize(
    ("names", "is_ours"),
    [
        ([], True),
        (["report.json"], True),
        (["report.json", "a.png", "b.png"], True),
        (["a.png"], False),
        (["report.json", "notes.txt"], False),
        (["report.json", "step_30"], False),
    ],
)
def test_an_earlier_output_is_known_by_its_names(tmp_path: Path, names: list[str], is_ours: bool) -> None:
    for name in names:
        (tmp_path / name).touch()
    own = "report.json", "*.png"
    if is_ours:
        require_new_folder(tmp_path, overwrite=True, own=own)
    else:
        with pytest.raises(OutputError, match=r"no earlier output of this command \(it holds (a|notes|step)"):
            require_new_folder(tmp_path, overwrite=True, own=own)
    require_new_folder(tmp_path / "new", overwrite=False, own=own)
