"""The tables of `benchmarks.latency`, from its JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from paretoprune.pruning.latency.statistics import Speedup, agree

_SHOWN = ("cpu_model", "cpu_usable", "python", "torch", "ultralytics")


def table(content: Mapping[str, Any]) -> str:
    """All parts that were measured, as Markdown."""
    parts = {"arms": _arms, "repeat": _repeat, "coverage": _coverage}
    lines = ["# Latency while the machine trains", ""]
    for name, show in parts.items():
        if name in content:
            part = content[name]
            facts = ", ".join(f"{key} {part['environment'][key]}" for key in _SHOWN if key in part["environment"])
            lines += [*show(part), "", f"{part['date']}, `{part['command']}`, commit {part['commit']}; {facts}.", ""]
    return "\n".join(lines)


def deviations(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Arm -> how far each of its speed-ups is from the median of the idle arm's, as a fraction with its sign."""
    idle = statistics.median(row["speedup"] for row in rows if row["arm"] == "idle")
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row["speedup"] / idle - 1)
    return found


def _arms(part: Mapping[str, Any]) -> list[str]:
    rows = part["rows"]
    lines = [
        "## With the lock, and without it",
        "",
        "yolov8n pruned by half beside the unpruned one, 320 pixels, batch 1, one thread, eager PyTorch, at most "
        f"{part['max_seconds']:g} s a measurement; two processes fine-tune on the built-in dataset. The arms take "
        "turns.",
        "",
        "| arm | measurements | speed-up, median | least .. greatest | off the idle median: median of the amounts "
        "| largest | own 95 % interval, +- (median) | latency, ms (median) | trainers' uses of the device meanwhile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, off in deviations(rows).items():
        mine = [row for row in rows if row["arm"] == arm]
        speedups = [row["speedup"] for row in mine]
        halves = [(row["speedup_ci95"][1] - row["speedup_ci95"][0]) / 2 / row["speedup"] for row in mine]
        batches = [row["trainer_batches"] for row in mine]
        amounts = [abs(value) for value in off]
        lines.append(
            f"| {arm} | {len(mine)} | {statistics.median(speedups):.3f} | {min(speedups):.3f} .. {max(speedups):.3f} | "
            f"{statistics.median(amounts):.1%} | {max(amounts):.1%} | {statistics.median(halves):.1%} | "
            f"{statistics.median(row['median_ms'] for row in mine):.1f} | {min(batches)} .. {max(batches)} |"
        )
    found = deviations(rows)
    medians = {arm: abs(statistics.median(off)) for arm, off in found.items()}
    largest = {arm: max(map(abs, off)) for arm, off in found.items()}
    lines += [
        "",
        f"Off the idle machine's median speed-up: through the lock {largest['locked']:.1%} at most and the median of "
        f"all {medians['locked']:.1%}; without the lock {largest['unlocked']:.1%} at most and the median of all "
        f"{medians['unlocked']:.1%}.",
    ]
    return lines


def _repeat(part: Mapping[str, Any]) -> list[str]:
    found = [Speedup(row["speedup"], *row["speedup_ci95"]) for row in part["rows"]]
    pairs = list(zip(found[::2], found[1::2], strict=True))
    agreeing = sum(agree(one, other) for one, other in pairs)
    apart = [abs(math.log(one.value / other.value)) for one, other in pairs]
    return [
        "## Measured twice",
        "",
        f"The same two networks measured {len(found)} times on the idle machine, each time in a new process: the 95 % "
        f"interval of the difference holds zero in **{agreeing} of {len(pairs)}** pairs. Two measurements differ by "
        f"{statistics.median(apart):.2%} (median; largest {max(apart):.2%}); half of their interval is "
        f"{statistics.median(each.halfwidth for each in found):.2%} (median). All {len(found)}: "
        f"{min(each.value for each in found):.3f} .. {max(each.value for each in found):.3f}.",
    ]


def _coverage(part: Mapping[str, Any]) -> list[str]:
    counts = sorted({row["quads"] for row in part["rows"]})
    lines = [
        "## How often the 95 % interval holds the truth",
        "",
        "Simulated quads that follow one another as a first-order autoregression, 1,000 measurements a cell.",
        "",
        "| correlation of neighbours | " + " | ".join(f"{count} quads" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for correlation in sorted({row["correlation"] for row in part["rows"]}):
        cells = {row["quads"]: row["covered"] for row in part["rows"] if row["correlation"] == correlation}
        lines.append(f"| {correlation:g} | " + " | ".join(f"{cells[count]:.1%}" for count in counts) + " |")
    return lines
