"""What a failure is told as: by one process alone, and with all that is known of its cause."""

import errno
from datetime import timedelta

import pytest
import torch.distributed as dist

from geneformer_pretrain.distributed import agreement
from geneformer_pretrain.distributed.agreement import Ranks, merge
from geneformer_pretrain.errors import explain, root_cause

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
    assert root_cause(error) == expected
    # As on its way through torch's errors between ranks.
    assert root_cause(chained(error, RuntimeError(root_cause(error)))) == f"RuntimeError: {expected}"


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (FULL, OSError("data.cache_dir: cannot write to cache (No space left on device). Make room.")),
        (ValueError("line 3\nis bad"), RuntimeError("cells.parquet: line 3")),
        (KeyError("step"), RuntimeError("KeyError('step')")),
    ],
)
def test_a_cause_that_the_message_names_is_told_once(cause: Exception, error: Exception) -> None:
    assert root_cause(chained(cause, error)) == f"{type(error).__name__}: {error}"


def test_the_file_of_a_cause_is_told() -> None:
    cause = OSError(errno.ENOSPC, "No space left on device", "step_3/x.distcp")
    told = root_cause(chained(cause, RuntimeError("cannot write: No space left on device")))
    assert "step_3/x.distcp" in told


def test_an_error_without_words_has_its_type() -> None:
    assert root_cause(chained(ValueError(), MemoryError())) == "ValueError:  -> MemoryError: "


def fail(error: Exception) -> None:
    raise error


def test_one_process_names_no_rank() -> None:
    ranks = Ranks(timedelta(minutes=1))
    with pytest.raises(LookupError, match=r"^OSError: \[Errno 28\] No space left on device$"):
        ranks.run_on_all_ranks(lambda: fail(FULL), LookupError)
    with pytest.raises(LookupError, match=r"^its own words$"):
        ranks.run_on_rank0(lambda: fail(LookupError("its own words")), LookupError)


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Three ranks that hold what is given to the first: a list of their values."""
    ranks = Ranks(timedelta(minutes=1))
    ranks.size = 3
    monkeypatch.setattr(ranks, "gather", lambda values: values["all"])
    return ranks


def test_values_that_differ_are_told_by_name(three_ranks: Ranks) -> None:
    common = {"seed": 1}
    three_ranks.require_equal({"all": [common] * 3}, LookupError)
    others = [{"seed": 1, "a": 5, "b": 5}, {"seed": 2, "a": 7}, {"seed": 2, "a": 8, "b": 5}]
    with pytest.raises(LookupError) as error:
        three_ranks.require_equal({"all": others}, LookupError)
    differences = (
        "a is 5 on rank 0, 7 on rank 1, 8 on rank 2",
        "b is 5 on rank 0, None on rank 1",
        "seed is 1 on rank 0, 2 on ranks 1, 2",
    )
    assert str(error.value).endswith(": " + "; ".join(differences))


def test_a_long_list_of_differences_says_how_many_more_there_are(three_ranks: Ranks) -> None:
    names = [f"key{number:02}" for number in range(agreement.MAX_DIFFERENCES + 2)]
    with pytest.raises(LookupError) as error:
        three_ranks.require_equal({"all": [dict.fromkeys(names, rank) for rank in range(3)]}, LookupError)
    assert str(error.value).count(" on rank 0") == agreement.MAX_DIFFERENCES
    assert str(error.value).endswith("2 on rank 2; and 2 more")


def test_reasons_are_told_once() -> None:
    assert merge({0: "full", 1: "full"}, 2) == "full"
    assert merge({0: "full", 1: "full"}, 3) == "ranks 0, 1: full"
    assert merge({2: "full", 0: "gone", 1: "full"}, 3) == "rank 0: gone; ranks 1, 2: full"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("a bug"), None),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"), "rank 0 lost its conn"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "rank 0 lost its connection"),
        (OSError(errno.ENOSPC, "No space left on device", "run/log"), "run/log: No space left on device"),
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (MemoryError(), "Out of memory: the host has no more."),
        (KeyError("x"), None),
    ],
)
def test_errors_of_others_are_explained_and_bugs_are_not(error: Exception, text: str | None) -> None:
    found = explain(error)
    assert found is None if text is None else str(found).startswith(text)
