"""The helper that other tests lean on when they say "loads where this project is not installed"."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

NAMES = ("paretoprune", "paretoprune.search", "paretoprune.pruning", "paretoprune.cluster", "paretoprune.results")


def test_nothing_of_ours_can_be_imported(stock_python: Callable[..., CompletedProcess[str]]) -> None:
    code = f"""
    import importlib, sys
    refused = []
    for name in {NAMES}:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            refused.append(name)
    print(len(refused), *sys.argv[1:])
    """
    assert stock_python(code, "a", 1).stdout.split() == ["5", "a", "1"]


def test_the_libraries_can(stock_python: Callable[..., CompletedProcess[str]]) -> None:
    assert stock_python("import numpy; print(numpy.ones(2).sum())").stdout.strip() == "2.0"


def test_a_failing_snippet_fails_the_test(stock_python: Callable[..., CompletedProcess[str]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="ended with 3"):
        stock_python("import sys; sys.exit(3)")
    assert stock_python("import sys; sys.exit(3)", check=False).returncode == 3
