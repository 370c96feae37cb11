"""What a failure is told as: by one process alone, and with all that is known of its cause."""

import errno
from datetime import timedelta

import pytest

from geneformer_pretrain.ranks import Ranks, reason_of

FULL = OSError(errno.ENOSPC, "No space left on device")


def chained(cause: Exception, error: Exception, *, hide: bool = False) -> Exception:
    """`error` raised while `cause` was handled; with `hide` as by `raise ... from None`."""
    try:
        try:
            raise cause
        except type(cause):
            if hide:
                raise error from None
            raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize("hide", [False, True])
def test_a_hidden_cause_is_told(hide: bool) -> None:
    error = chained(FULL, RuntimeError("unexpected pos 64 vs 0\nin a C++ file"), hide=hide)
    expected = "OSError: [Errno 28] No space left on device -> RuntimeError: unexpected pos 64 vs 0"
    assert reason_of(error) == expected
    # As on its way through torch's errors between ranks.
    assert reason_of(chained(error, RuntimeError(reason_of(error)))) == f"RuntimeError: {expected}"


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (FULL, OSError("data.cache_dir: cannot write to cache (No space left on device). Make room.")),
        (ValueError("line 3\nis bad"), RuntimeError("cells.parquet: line 3")),
        (KeyError("step"), RuntimeError("KeyError('step')")),
    ],
)
def test_a_cause_that_the_message_names_is_told_once(cause: Exception, error: Exception) -> None:
    assert reason_of(chained(cause, error)) == f"{type(error).__name__}: {error}"


def test_the_file_of_a_cause_is_told() -> None:
    cause = OSError(errno.ENOSPC, "No space left on device", "step_3/x.distcp")
    told = reason_of(chained(cause, RuntimeError("cannot write: No space left on device")))
    assert "step_3/x.distcp" in told


def test_an_error_without_words_has_its_type() -> None:
    assert reason_of(chained(ValueError(), MemoryError())) == "ValueError:  -> MemoryError: "


def fail(error: Exception) -> None:
    raise error


def test_one_process_names_no_rank() -> None:
    ranks = Ranks(timedelta(minutes=1))
    with pytest.raises(LookupError, match=r"^OSError: \[Errno 28\] No space left on device$"):
        ranks.together(lambda: fail(FULL), LookupError)
    with pytest.raises(LookupError, match=r"^its own words$"):
        ranks.on_first(lambda: fail(LookupError("its own words")), LookupError)
