"""Another user, for tests of shared folders that run as root."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OTHER_USER = 54321


def as_other_user(action: Callable[[], None], user: int = OTHER_USER) -> None:
    """Run a function in a forked process of another user and group.

    Raises
    ------
    AssertionError
        If it fails there.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.umask(0o022)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "it failed as another user; its traceback is above"


@contextmanager
def public_folder() -> Iterator[Path]:
    """Give a folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "shared"
        folder.mkdir()
        yield folder
