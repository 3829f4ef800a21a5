"""The table of the fault suite: what was killed, and that nothing was lost, repeated or left running.

Usage: python -m benchmarks.faults

Runs tests/faults and writes what its tests recorded to benchmarks/results/faults.md and .json. Ends with the
tests' exit code, and writes nothing where one fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from paretoprune.cluster.environment import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults"
COLUMNS = {
    "scenario": "what died",
    "faults": "times",
    "asked": "trials asked",
    "finished": "finished",
    "failed": "of them failed",
    "lost": "lost",
    "repeated": "repeated",
    "zombies": "left running in the study",
    "seconds": "seconds",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "tests/faults"]
        command = [*pytest, f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the kind that holds properties
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
        rows = [json.loads(p.attrib["value"]) for p in ElementTree.parse(report).iter("property")]
    text = markdown(rows)
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and under it what each scenario notes."""
    lines = [
        "Real Ray, real driver, pretended training; every run is resumed until it is done. "
        f"{usable_cpus()} CPU cores, {time.strftime('%Y-%m-%d')}; `python -m benchmarks.faults`.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        row["seconds"] = round(row["seconds"])
        lines.append("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |")
    lines.append("")
    for row in rows:
        when = f" at: {', '.join(row['moments'])}." if row["moments"] else "."
        lines.append(f"- {row['scenario']}{when} {row['note']}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
