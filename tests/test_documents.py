"""Pages and files beside the code: nothing in them points to what is not there, what they repeat is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
NAMES = re.compile(
    r"`((?:search|pruning|cluster|results|tests|docs|benchmarks|examples)/[\w./-]*|\.ci/run|[A-Z]+\.md)`"
)


def read_yaml(name: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def of_pyproject(key: str) -> str:
    found = re.search(rf'^{key} = "(.*)"$', PYPROJECT, flags=re.MULTILINE)
    assert found is not None
    return found.group(1)


def anchors(page: Path) -> set[str]:
    """What a heading is linked by: lower case, without signs, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links]
    assert [str(path) for path, _ in targets if not path.exists()] == []
    assert [(path.name, anchor) for path, anchor in targets if anchor and anchor not in anchors(path)] == []


def test_the_index_names_every_page_once() -> None:
    listed = re.findall(r"^\d+\. \[(.*?)\]\((.*?)\)", (ROOT / "docs" / "index.md").read_text(), flags=re.MULTILINE)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert sorted(file for _, file in listed) == sorted(pages)
    assert all(title == file for title, file in listed)
    assert "(docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = NAMES.findall(text)
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []
    # Names in the code that its steps send people to.
    code = "".join(path.read_text(encoding="utf-8") for name in names if (path := ROOT / name).suffix == ".py")
    code += "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("pruning/*/*.py"))
    steps = text.partition("## How to add")[2]
    symbols = re.findall(r"`@?([A-Za-z_]+(?:\.[a-z]+)?)(?:\(.*?\))?`", steps)
    symbols = [symbol.rpartition(".")[2] for symbol in symbols if not symbol.endswith((".py", ".md", "name"))]
    assert len(symbols) > 10
    assert [symbol for symbol in symbols if not re.search(rf"\b{symbol}\b", code)] == []


def test_the_citation_is_of_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    for key, own in (("title", "name"), ("version", "version"), ("license", "license"), ("abstract", "description")):
        assert str(citation[key]).rstrip(".") == of_pyproject(own).rstrip(".")
    assert f"keywords = {citation['keywords']}".replace("'", '"') in PYPROJECT


def test_ci_runs_the_one_script_on_the_oldest_python() -> None:
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    versions = job["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 without quotes is 3.1
    assert f">={versions[0]}" == of_pyproject("requires-python")


def test_hooks_are_the_checks_of_make_lint() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint: setup\n")[2].partition("\n\n")[0]
    for line in lint.replace("$(BIN)", ".venv/bin").split("\n"):
        assert any(entry.startswith(line.strip().removesuffix(" .")) for entry in entries), line
    assert all(hook["language"] == "system" for hook in local["hooks"])
