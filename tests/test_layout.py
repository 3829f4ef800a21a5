"""Where code lies: who may import whom, and how large a file may be. The picture is in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("paretoprune", "search", "pruning", "cluster", "results", "tests", "benchmarks", "examples")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
ONE_FILE = "cluster/agent/agent.py"  # copied to devices by itself

MAX_MODULES = 20

FOUR = ("search", "pruning", "cluster", "results")
MAY_IMPORT = {"search": {*FOUR, "base"}, **{name: {name, "base"} for name in FOUR[1:]}, "paretoprune/base": {"base"}}
# Inside each of the four, what stands in a line imports only what stands in it or below it.
FLOORS = {
    "search": """
        cli
        commands
        api
        finalists comparison
        sweep
        worker
        trial
        monitoring
        stopping
        samplers
        space
        storage
        config
        errors
    """,
    # A refit weighs errors as the importance of outputs does, so recovery stands above importance.
    "pruning": """
        strategies budget
        workbench
        recovery
        importance
        export
        training
        surgery
        evaluation latency
        graph
        data
        yolo builtin
        device plan
        errors names
    """,
    "results": """
        report
        analysis
        selection
        store
        errors
    """,
    "cluster": """
        doctor launch joining_nodes waiting
        nodes ray_connection
        agent device_lock environment lock_directory packages ray_patience ray_place ray_watch resources scratch
        devices
        errors
    """,
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


def name_of(path: Path) -> str:
    """`search.trial.context` for its file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {name_of(path): path for path in python_files(*FOUR)}


def edges() -> Iterator[tuple[str, str, str]]:
    """(place, module, module that it imports) among the four's modules."""
    known = modules()
    for name, path in known.items():
        for where, imported in imports(path):
            target = imported.removeprefix("paretoprune.")
            if target not in known:
                target = target.rpartition(".")[0]
            if target in known and target != name:
                yield where, name, target


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


@pytest.mark.parametrize("folder", FLOORS)
def test_inside_each_of_the_four_imports_go_down(folder: str) -> None:
    lines = [line.split() for line in FLOORS[folder].strip().splitlines()]
    floor = {name: depth for depth, line in enumerate(lines) for name in line}
    packages = {name.split(".")[1] for name in modules() if name.startswith(f"{folder}.")}
    assert packages == set(floor)
    upward = []
    for where, name, target in edges():
        (room, part), (other, below) = name.split(".")[:2], target.split(".")[:2]
        if room == other == folder and floor[below] < floor[part]:
            upward.append(f"{where} imports {target}")
    assert upward == []


def test_there_is_no_circle() -> None:
    """Nor one that is hidden in a function or under TYPE_CHECKING."""
    below: dict[str, set[str]] = {name: set() for name in modules()}
    for _, name, target in edges():
        below[name].add(target)
    while bottom := {name for name, targets in below.items() if not targets & below.keys()}:
        for name in bottom:
            del below[name]
    assert below == {}, "these import each other, or stand above such"


def test_no_folder_is_full() -> None:
    counts = Counter(
        path.parent.relative_to(ROOT).as_posix() for path in modules().values() if path.name != "__init__.py"
    )
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == {}


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
    paths = [path for path in python_files(*FOLDERS) if path != ROOT / ONE_FILE]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    functions = [(path, node) for path in python_files(*FOLDERS) for node in nodes(path) if isinstance(node, Function)]
    spans = [(place(path, node), (node.end_lineno or node.lineno) - node.lineno + 1) for path, node in functions]
    assert [(where, span) for where, span in spans if span > MAX_FUNCTION_LINES] == []
