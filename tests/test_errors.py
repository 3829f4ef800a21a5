"""Every error of ours crosses process boundaries: a worker's is shown by the driver, whatever raised it."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from paretoprune.base import errors as of_base
from paretoprune.cluster import errors as of_cluster
from paretoprune.pruning import errors as of_pruning
from paretoprune.results import errors as of_results
from paretoprune.search import errors as of_search

ERRORS = [
    kind
    for module in (of_base, of_cluster, of_pruning, of_results, of_search)
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


def test_errors_that_lie_elsewhere_are_made_of_their_text() -> None:
    """So that they cross as well; one whose constructor takes more belongs into its room's `errors.py`."""
    root = Path(__file__).resolve().parent.parent
    folders = ("paretoprune", "pruning", "search", "cluster", "results")
    rooms = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = [
        each
        for path in rooms
        if path.name != "errors.py"
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(each, ast.ClassDef) and not each.name.startswith("_")
        if any(ast.unparse(base).endswith(("Error", "Exception")) for base in each.bases)
    ]
    assert found
    made_otherwise = [each.name for each in found if "__init__" in {getattr(part, "name", "") for part in each.body}]
    assert made_otherwise == []
