"""What a run says when it cannot write to one of its folders."""

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
        if not place.absolute().is_relative_to(folder.absolute()):
            raise
        raise OSError(
            f"{key}: cannot write to {place} ({reason}). {key} must be a folder with free space that you may write to: "
            "mend that, or name another one."
        ) from error
