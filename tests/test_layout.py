"""Where code lies: who may import whom, and how large a file may be. The picture is in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("paretoprune", "search", "pruning", "cluster", "results", "tests", "benchmarks", "examples")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

MAY_IMPORT = {
    "search": {"search", "pruning", "cluster", "results", "base"},
    "pruning": {"pruning", "base"},
    "cluster": {"cluster", "base"},
    "results": {"results", "base"},
    "paretoprune/base": {"base"},
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)}"


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(place, module) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((place(path, node), alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path, node)}: a relative import"
            yield from ((place(path, node), f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_between_the_four_go_one_way(folder: str) -> None:
    files = python_files(folder)
    assert files, f"{folder}/ holds no Python file"
    wrong = [
        f"{where} imports {module}"
        for path in files
        for where, module in imports(path)
        if module.startswith("paretoprune.") and module.split(".")[1] not in MAY_IMPORT[folder]
    ]
    assert wrong == []


def test_our_code_is_imported_by_its_full_name() -> None:
    """In a checkout `import search` would find the folder, and every module of it would exist twice."""
    wrong = [
        f"{where} imports {module}"
        for path in python_files(*FOLDERS)
        for where, module in imports(path)
        if module.split(".")[0] in ("search", "pruning", "cluster", "results")
    ]
    assert wrong == []


def test_no_file_is_long() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*FOLDERS)}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    functions = [(path, node) for path in python_files(*FOLDERS) for node in nodes(path) if isinstance(node, Function)]
    spans = [(place(path, node), (node.end_lineno or node.lineno) - node.lineno + 1) for path, node in functions]
    assert [(where, span) for where, span in spans if span > MAX_FUNCTION_LINES] == []
