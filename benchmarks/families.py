"""The table of supported families and tasks, from what the exactness tests find.

Usage: python -m benchmarks.families

Runs tests/pruning/surgery/test_families.py and writes what its tests recorded to benchmarks/results/families.md,
which docs/families.md shows. Ends with the tests' exit code, and writes nothing where one fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/pruning/surgery/test_families.py"
TABLE = ROOT / "benchmarks" / "results" / "families.md"
HEADER = "| model | groups | prunable share of convolution weights | largest relative error | layer table, ms |"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "-k", "pruned_equals_masked", TESTS]
        command = [*pytest, f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the kind that holds properties
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
        text = table(report)
    TABLE.write_text(text, encoding="utf-8")
    print(text)
    return 0


def table(report: Path) -> str:
    """The Markdown table of a JUnit report, in the tests' order."""
    lines = [HEADER, "|---|---|---|---|---|"]
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[2].rstrip("]")
        found = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        share = f"{float(found['reach']):.1%}"
        lines.append(
            f"| {name} | {found['groups']} | {share} | {found['worst_relative_error']} | {found['table_ms']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
