"""What applying a plan costs: ours with a layer table built once, beside torch-pruning with a graph built every time.

Usage: python -m benchmarks.surgery [--plans 20] [--applications 500] [--output benchmarks/results]

Every plan has its own random width in every group. Both sides remove the same channels of the same model, one after
the other, the order turned round from plan to plan; the resulting networks are compared bit for bit before anything is
timed. One thread, garbage collection off while the clock runs. The graph is traced at 64 pixels (the least that these
networks take) and at 640 (what torch-pruning's own YOLOv8 example traces).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from benchmarks.graph_surgery import FAMILIES as GRAPH_FAMILIES
from benchmarks.graph_surgery import remove_by_graph
from paretoprune.cluster.environment import describe_environment
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import choose_kept, kept_indices, prune
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

FAMILIES = (
    "yolov3-tiny yolov5n yolov5s yolov6n yolov8n yolov8s yolov8m yolov9t yolov9s yolov10n yolo11n yolo11s yolo12n "
    "yolo26n rtdetr-l"
).split()
TRACED_AT = (64, 640)  # pixels
_SHOWN = ("cpu_model", "cpu_usable", "python", "torch", "torch-pruning", "ultralytics")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--plans", type=int, default=20, help="timed plans per family")
    parser.add_argument("--applications", type=int, default=500, help="applications that memory is watched over")
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "environment": describe_environment(),
        "plans": options.plans,
        "against_graph": [
            row for name in GRAPH_FAMILIES if name in options.families for row in against_graph(name, options.plans)
        ],
        "families": [family(name, options.plans) for name in options.families],
        "memory": memory("yolov8n", options.applications),
    }
    text = markdown(result)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "surgery.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "surgery.md").write_text(text, encoding="utf-8")


def network(name: str) -> nn.Module:
    """An untrained network of the family; what surgery costs does not depend on the weights."""
    from ultralytics import RTDETR, YOLO

    torch.manual_seed(0)
    with quiet_ultralytics():
        model: nn.Module = (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml").model
    return model.eval().requires_grad_(True)


def random_widths(table: LayerTable, rng: np.random.Generator) -> dict[int, int]:
    drawn = {group.id: int(rng.choice(group.widths(8))) for group in table.groups}
    return {g: w for g, w in drawn.items() if w < table.groups[g].channels}


def timed(action: Callable[[], object]) -> float:
    """Milliseconds; without garbage collection in between, as `timeit` does it."""
    gc.disable()
    start = time.perf_counter()
    made = action()  # held until the clock stops: freeing it is not the work
    end = time.perf_counter()
    gc.enable()
    del made
    return (end - start) * 1e3


def against_graph(name: str, plans: int) -> list[dict[str, Any]]:
    """One row per size that the graph is traced at; times are paired by plan."""
    model = network(name)
    table, rng = build_layer_table(model), np.random.default_rng(0)
    scores = rng.random(table.class_count)
    rows = []
    for pixels in TRACED_AT:
        ours, theirs = [], []
        check_same(model, table, scores, random_widths(table, rng), pixels)
        for i in range(plans):
            widths = random_widths(table, rng)
            kept = kept_indices(table, choose_kept(table, widths, scores))
            sides = [
                (ours, lambda w=widths: prune(model, table, w, scores)),
                (theirs, lambda k=kept, p=pixels: remove_by_graph(model, table, k, p)),
            ]
            for times, action in sides if i % 2 else reversed(sides):
                times.append(timed(action))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            {"family": name, "traced_at": pixels, "ours_ms": spread(ours), "graph_ms": spread(theirs)}
            | {"times_faster": spread(ratios)}
        )
    return rows


def check_same(model: nn.Module, table: LayerTable, scores: np.ndarray, widths: dict[int, int], pixels: int) -> None:
    """Both ways give the same network, bit for bit; also warms both up."""
    ours, plan = prune(model, table, widths, scores)
    theirs = remove_by_graph(model, table, plan.kept, pixels).state_dict()
    mine = ours.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine), "the two ways gave different networks"


def family(name: str, plans: int) -> dict[str, Any]:
    model = network(name)
    build = [timed(lambda: build_layer_table(model)) for _ in range(3)]
    table, rng = build_layer_table(model), np.random.default_rng(0)
    scores = rng.random(table.class_count)
    drawn = [random_widths(table, rng) for _ in range(plans)]
    apply = [timed(lambda w=w: prune(model, table, w, scores)) for w in drawn]  # type: ignore[misc]
    return {
        "family": name,
        "groups": len(table.groups),
        "params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "table_ms": spread(build),
        "apply_ms": spread(apply),
    }


def memory(name: str, applications: int) -> dict[str, Any]:
    """Resident memory in MB (1e6 bytes) while plans are applied one after the other, no network kept."""
    model = network(name)
    table, rng = build_layer_table(model), np.random.default_rng(0)
    scores = rng.random(table.class_count)
    process = psutil.Process()
    seen = {}
    for i in range(1, applications + 1):
        prune(model, table, random_widths(table, rng), scores)
        if i % max(1, applications // 10) == 0:
            seen[i] = round(process.memory_info().rss / 1e6, 1)
    return {"family": name, "applications": applications, "rss_mb": seen}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and the middle half."""
    low, middle, high = np.percentile(list(values), [25, 50, 75])
    return {"median": round(float(middle), 2), "p25": round(float(low), 2), "p75": round(float(high), 2)}


def commit() -> str:
    """Short hash, with a mark where the tree was changed; 'unknown' without git."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def markdown(result: dict[str, Any]) -> str:
    shown = ", ".join(f"{key} {result['environment'][key]}" for key in _SHOWN if key in result["environment"])
    lines = [
        "# Surgery",
        "",
        f"{result['date']}, commit {result['commit']}, one thread; {shown}. Median (middle half), {result['plans']} "
        "plans with a random width in every group. Written by `python -m benchmarks.surgery`.",
        "",
        "## Beside torch-pruning, its graph built for every plan",
        "",
        "| family | graph traced at | ours, ms | torch-pruning, ms | times faster |",
        "|---|---|---|---|---|",
    ]
    for row in result["against_graph"]:
        cells = (shown_spread(row[key]) for key in ("ours_ms", "graph_ms", "times_faster"))
        lines.append(f"| {row['family']} | {row['traced_at']} px | {' | '.join(cells)} |")
    lines += ["", "## Every family", "", "| family | parameters, M | groups | layer table, ms | one plan, ms |"]
    lines.append("|---|---|---|---|---|")
    for row in result["families"]:
        cells = (shown_spread(row[key]) for key in ("table_ms", "apply_ms"))
        lines.append(f"| {row['family']} | {row['params_m']} | {row['groups']} | {' | '.join(cells)} |")
    watched = result["memory"]
    first, *_, last = watched["rss_mb"].items()
    lines += ["", "## Memory", ""]
    lines.append(
        f"{watched['family']}, resident: {first[1]} MB after {first[0]} applications, {last[1]} MB after {last[0]} "
        f"({', '.join(str(v) for v in watched['rss_mb'].values())})."
    )
    return "\n".join(lines) + "\n"


def shown_spread(value: dict[str, float]) -> str:
    return f"{value['median']:.1f} ({value['p25']:.1f} to {value['p75']:.1f})"


if __name__ == "__main__":
    main()
