"""Every error of ours crosses process boundaries: a worker's is shown by the driver, whatever raised it."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from cluster import errors as of_cluster
from pruning import errors as of_pruning
from results import errors as of_results
from search import errors as of_search

ERRORS = [
    kind
    for module in (of_cluster, of_pruning, of_results, of_search)
    for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == module.__name__
]
VALUES = {"str": "why", "str | None": "host", "int": 3, "int | None": 4, "Path": Path("a/b"), "object": "2"}


def made(kind: type[Exception]) -> Exception:
    if kind.__init__ in (ValueError.__init__, Exception.__init__, OSError.__init__):
        return kind("a must be b, but got c: do d")
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return kind("a must be b, but got c: do d")
    values: list[Any] = [VALUES[each.annotation] for each in parameters]
    return kind(*values)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_an_error_comes_back_as_it_was(kind: type[Exception]) -> None:
    error = made(kind)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is kind
        assert str(again) == str(error) != ""
        assert vars(again) == vars(error)
        assert again.args == error.args


def test_no_error_for_people_lies_elsewhere() -> None:
    """What is raised from one room into another is in the rooms' `errors.py`, so that the test above sees it."""
    root = Path(of_pruning.__file__).parent.parent
    raised = re.compile(r"class ([A-Z]\w*)\(.*(Error|Exception)\):")
    found = {
        match[1]
        for room in ("pruning", "search", "cluster", "results")
        for path in (root / room).rglob("*.py")
        if path.name != "errors.py"
        for line in path.read_text(encoding="utf-8").splitlines()
        if (match := raised.match(line))
    }
    assert found == set()
