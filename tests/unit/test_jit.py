"""Compiled functions where what is compiled can be kept, and where not."""

import logging

import pytest
from numba.core.caching import CompileResultCacheImpl

from geneformer_pretrain import jit as compiling


def test_without_a_folder_to_keep_it_in_code_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])  # a checkout and a home that are read-only
    compiling._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, second = (compiling.compiled(lambda x, by=by: x + by) for by in (1, 2))
    assert (first(1), second(1)) == (2, 3)
    assert [record.getMessage().count("set NUMBA_CACHE_DIR") for record in caplog.records] == [1]
