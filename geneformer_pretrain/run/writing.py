"""Folders of a run: what it says when it cannot write to one, and how one is deleted."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing_to(folder: Path, key: str) -> Iterator[None]:
    """Give the system's errors at a folder its configuration key and the remedy; those at other places pass.

    Raises
    ------
    OSError
        Instead of the system's own error, which names neither.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, place = str(error), folder
        if isinstance(error, OSError) and error.strerror:
            reason, place = error.strerror, Path(error.filename or folder)
        place, folder = place.absolute(), folder.absolute()
        if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise
        raise OSError(
            f"{key}: cannot write to {place} ({reason}). {key} must be a folder with free space that you may write to: "
            "mend that, or name another one."
        ) from error


def not_of_a_run(file: Path) -> str:
    """What to say where someone else's file lies in a checkpoint folder, under a name that a run writes to."""
    return (
        f"training.checkpoint_dir: {file} is not of a run, and would be overwritten: name a folder for this run alone, "
        "or move the file away."
    )


def delete_folder(folder: Path) -> None:
    """Delete a folder, or a link to one: what it leads to is someone's own.

    Raises
    ------
    OSError
        As `shutil.rmtree`.
    """
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
