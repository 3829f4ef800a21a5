"""What is asked of every file: annotations, fences of heavy libraries, nothing of the machine it was written on."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "paretoprune"
ROOMS = ("search", "pruning", "cluster", "results")
FOLDERS = (*ROOMS, PACKAGE, "tests", "benchmarks", "examples")

# Every library that is slow to import or belongs to one concern, and the rooms that may know it.
FENCES = {
    "torch": {"pruning"},
    "torchvision": {"pruning"},
    "torch_pruning": {"pruning"},
    "ultralytics": {"pruning"},
    "onnx": {"pruning"},
    "onnxruntime": {"pruning"},
    "openvino": {"pruning"},
    "tensorrt": {"pruning"},
    "pynvml": {"pruning"},
    "ray": {"search", "cluster"},
    "optuna": {"search"},
    "pydantic": {"search", "results", "pruning", "paretoprune"},  # what is persisted, beside its owner
    "click": {"search"},
    "rich": {"search", "paretoprune"},
    "pandas": {"results"},
    "matplotlib": {"results"},
    "plotly": {"results"},
    "jinja2": {"results"},
}
# Not loaded by `import paretoprune.search.cli`, so that --help answers at once.
NOT_FOR_HELP = (
    "torch", "torchvision", "torch_pruning", "ultralytics", "ray", "optuna", "pandas", "matplotlib", "plotly", "scipy",
    "sklearn", "pydantic", "numpy", "cv2",
)  # fmt: skip

# Runtimes for measuring that a user may have; asked for by name where they are missing.
OPTIONAL = {"tensorrt"}
# Runs on devices, with whatever runtime is there.
AGENT = "cluster/agent/agent.py"
# Under several distribution names, of which Ultralytics chooses one.
COMES_WITH_ULTRALYTICS = {"cv2"}

# Written in pieces, so that this file does not contain what it looks for.
_MACHINE_PATHS = re.compile(r"(?<![\w.$}])/" + r"(?:(?:root|work|Users|mnt|tmp/pp)/|home/[a-z]|opt/(?:pypi|wheels))")
_REGISTRIES = re.compile(
    r"(?:index-url|find-links|trusted-host)\s*[=: ]\s*['\"]?(?:https?|file):"
    r"|//[^/\s]*(?:artifactory|nexus|devpi)|//[^/\s]+/simple\b"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = name_of(path).partition("/")[0]
            yield node.lineno, own if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # A computed name is a registry of our own; its modules are checked where they lie.
            names = (str(ast.literal_eval(each)) for each in literals(node.args[:1]))
            yield from ((node.lineno, name.partition(".")[0]) for name in names)


def literals(nodes: list[ast.expr]) -> list[ast.expr]:
    return [node for node in nodes if isinstance(node, ast.Constant)]


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree_of(path)) if isinstance(node, Function))


def tracked_text_files() -> Iterator[tuple[Path, str]]:
    """What git has or would add; without git (an unpacked archive), everything that is not hidden or generated."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"^(\.(?!ci|git(hub|ignore)|pre-commit)|runs$|build$|dist$|.*\.egg-info$|__pycache__$)")
        found = (path for path in ROOT.rglob("*") if path.is_file())
        paths = [path for path in found if not any(map(hidden.match, path.relative_to(ROOT).parts))]
    for path in sorted(set(paths)):
        if path.is_file() and b"\0" not in (raw := path.read_bytes()):
            yield path, raw.decode("utf-8", errors="replace")


@pytest.mark.parametrize("room", [*ROOMS, PACKAGE])
def test_heavy_libraries_stay_behind_their_fence(room: str) -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {target}"
        for path in python_files(room)
        if name_of(path) != AGENT
        for line, target in imports(path)
        if room not in FENCES.get(target, {room})
    ]
    assert wrong == []


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import json, sys, paretoprune.search.cli; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) & set(NOT_FOR_HELP) == set()


def test_every_function_is_annotated() -> None:
    bare = [
        f"{name_of(path)}:{each.lineno} {each.name}: {', '.join(missing)}"
        for path in python_files(*FOLDERS)
        for each in functions(path)
        if (missing := unannotated(each))
    ]
    assert bare == []


def unannotated(function: Function) -> list[str]:
    listed = function.args
    arguments = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs, listed.vararg, listed.kwarg]
    missing = [each.arg for each in arguments if each and each.annotation is None and each.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None else [])


def test_annotations_are_not_evaluated_on_old_pythons() -> None:
    """Python 3.10 must run what is written in the newer notation; a file without functions has nothing to annotate."""
    without = [
        name_of(path)
        for path in python_files(*FOLDERS)
        if any(functions(path)) and "from __future__ import annotations" not in path.read_text(encoding="utf-8")
    ]
    assert without == []


def test_nothing_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{name_of(path)}:{number} {line.strip()[:100]}"
        for path, text in tracked_text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if _MACHINE_PATHS.search(line) or _REGISTRIES.search(line)
    ]
    assert found == []


def test_the_lock_names_packages_and_nothing_else() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][^\s;]*( ; .+)?")
    assert [line for line in lines if line and not line.startswith("#") and not pinned.fullmatch(line)] == []
    assert [line for line in lines if "://" in line or "+cpu" in line] == []


def asked_for() -> set[str]:
    """Distributions that pyproject.toml names, the extras' too."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = re.findall(r'"([A-Za-z0-9.-]+)(?:\[[a-z]+\])?[<>=!~]+[0-9]', text)
    assert len(names) > 20
    return {name.lower() for name in names}


def test_the_lock_serves_what_the_project_asks_for() -> None:
    """A dependency added to pyproject.toml without `make lock` would be missing on a fresh machine."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert asked_for() - set(re.findall(r"^([a-z0-9.-]+)==", lock, flags=re.MULTILINE)) == set()


def test_what_is_imported_is_asked_for() -> None:
    """What merely came along with something else today may be gone with its next release."""
    owners = metadata.packages_distributions()
    undeclared = {
        f"{name_of(path)}:{line} imports {target}"
        for path in python_files(*FOLDERS)
        if name_of(path) != AGENT
        for line, target in imports(path)
        if target not in {*sys.stdlib_module_names, *FOLDERS, *OPTIONAL, *COMES_WITH_ULTRALYTICS}
        and not asked_for() & {owner.lower() for owner in owners.get(target, [])}
    }
    assert undeclared == set()
