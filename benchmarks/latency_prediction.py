"""How well a plan's latency is predicted from widths and input size: held-out error by number of measured plans.

Usage:
  python -m benchmarks.latency_prediction measure [--networks yolov8n,builtin] [--plans 96] [--seconds 300]
  python -m benchmarks.latency_prediction report [--output benchmarks/results]

`measure` times random plans beside the unpruned network, one after the other, and appends them to the
file of measurements; it ends after `--seconds`, and called again goes on where it was. `report` fits, and needs no
quiet machine.

The plans are of three kinds in turn, so that they spread over the whole range of latencies: every width by itself at
random; one ratio with some scatter about it; one ratio per block. Independent widths alone would all come out near one
latency, and any predictor would look good on them. Sizes are drawn from those that a search has by default; the
unpruned network is always timed at the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from paretoprune.base.atomic import write_json
from paretoprune.pruning.graph.geometry import FloatArray, NetworkGeometry
from paretoprune.pruning.latency.model import MeasuredPlan, fit_latency_model
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.yolo.image_size import stride_of
from paretoprune.search.space.space import image_sizes

ASSETS = Path(os.environ.get("PARETOPRUNE_ASSETS") or Path(__file__).resolve().parents[2] / "shared" / "assets")
MEASUREMENTS = Path("runs") / "latency_prediction.json"
NETWORKS = {"yolov8n": 320, "builtin": 160}  # name -> side of the input, pixels
MAX_RATIO = 0.7
ROUND_TO = 8
THREADS = 1
SIZES = (8, 16, 32, 64)  # measured plans that a model is fitted on
UNSEEN = 32
SPLITS = 20
SHOWN = ("cpu_model", "cpu_usable", "python", "torch")
KINDS = ("independent", "uniform", "blocks")


def network(name: str) -> Any:
    """The built-in detector; any other from its official weights where they are at hand, else untrained."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.yolo.loading import load_model

    if name == "builtin":
        return load_model(BASELINE)
    weights = ASSETS / "weights" / f"{name}.pt"
    if weights.is_file():
        return load_model(weights)
    from benchmarks.surgery import network as untrained

    return untrained(name)


def random_ratios(table: Any, rng: np.random.Generator, kind: str) -> dict[str, float]:
    """Ratio by each group's first layer, from 0 to MAX_RATIO, before widths are rounded."""
    level = rng.uniform(0, MAX_RATIO)
    by_block = {group.block: rng.uniform(0, MAX_RATIO) for group in table.groups}
    ratios = {}
    for group in table.groups:
        if kind == "independent":
            ratio = rng.uniform(0, MAX_RATIO)
        elif kind == "uniform":
            ratio = level + rng.normal(0, 0.1)
        else:
            ratio = by_block[group.block] + rng.normal(0, 0.05)
        ratios[group.layers[0]] = float(np.clip(ratio, 0, MAX_RATIO))
    return ratios


def measure(names: Sequence[str], plans: int, seconds: float, path: Path) -> None:
    import torch

    from paretoprune.cluster.environment import describe_environment
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.surgery.surgery import prune, resolve

    end = time.monotonic() + seconds
    torch.set_num_threads(THREADS)
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"networks": {}}
    content.update(date=date.today().isoformat(), environment=describe_environment(), threads=THREADS)
    for name in names:
        model = network(name)
        table = build_layer_table(model)
        scores = np.random.default_rng(0).random(table.class_count)
        rows = content["networks"].setdefault(name, [])
        while len(rows) < plans and time.monotonic() < end:
            kind = KINDS[len(rows) % len(KINDS)]
            rng = np.random.default_rng([len(rows), 7])
            imgsz = int(rng.choice(image_sizes(NETWORKS[name], None, stride_of(model))))
            pruned, plan = prune(model, table, resolve(table, random_ratios(table, rng, kind), ROUND_TO), scores)
            found = measure_pair(pruned, model, imgsz, threads=THREADS, max_seconds=4.0, baseline_imgsz=NETWORKS[name])
            kept = ("speedup", "speedup_ci95", "median_ms", "baseline_median_ms", "converged")
            values = found.to_dict()
            rows.append(
                {"kind": kind, "imgsz": imgsz, "ratios": dict(plan.ratios), **{key: values[key] for key in kept}}
            )
            write_json(path, content)
        print(f"{name}: {len(rows)} of {plans} plans measured", flush=True)


def geometry_of(name: str) -> NetworkGeometry:
    from paretoprune.pruning.graph.geometry_reading import read_geometry
    from paretoprune.pruning.surgery.layer_table import build_layer_table

    model = network(name)
    return read_geometry(model, build_layer_table(model), NETWORKS[name])


def held_out(geometry: NetworkGeometry, rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Errors on plans that a model fitted on `size` others has not seen, over SPLITS random splits.

    Beside it, what the model says of itself, and two plainer predictors on the same splits: the median of the measured
    plans, and a straight line over multiply-adds.
    """
    measured = [
        MeasuredPlan(
            Plan(row["ratios"], imgsz=row["imgsz"]),
            1 / row["speedup"],
            float(np.ptp(row["speedup_ci95"])) / 2 / row["speedup"],
        )
        for row in rows
    ]
    errors: dict[str, list[float]] = {"model": [], "median": [], "macs": []}
    by_size: dict[int, list[float]] = {}
    covered: list[bool] = []
    said = []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(measured))
        known, unseen = [measured[i] for i in order[:size]], [measured[i] for i in order[-UNSEEN:]]
        plans = [each.plan for each in unseen]
        true = np.array([plan.latency_ratio for plan in unseen])
        model = fit_latency_model(geometry, known)
        foretold = model.predict(plans)
        said.append((model.error.median, model.error.p95))
        covered.extend((foretold.low <= true) & (true <= foretold.high))
        middle = np.full(len(true), np.median([plan.latency_ratio for plan in known]))
        guesses = {"model": foretold.ratio, "median": middle, "macs": line_over_macs(geometry, known, plans)}
        for kind, guess in guesses.items():
            errors[kind].extend(np.abs(guess / true - 1))
        for plan, error in zip(plans, np.abs(foretold.ratio / true - 1), strict=True):
            by_size.setdefault(plan.imgsz or geometry.imgsz, []).append(float(error))
    return {
        "plans": size,
        "covered": float(np.mean(covered)),
        "said_median": float(np.mean([median for median, _ in said])),
        "said_p95": float(np.mean([p95 for _, p95 in said])),
        "by_size": {str(size): float(np.median(values)) for size, values in sorted(by_size.items())},
        **{
            f"{kind}_{name}": float(np.quantile(values, q))
            for kind, values in errors.items()
            for name, q in (("median", 0.5), ("p95", 0.95), ("largest", 1.0))
        },
    }


def line_over_macs(geometry: NetworkGeometry, known: Sequence[MeasuredPlan], plans: Sequence[Plan]) -> FloatArray:
    def macs(of: Sequence[Plan]) -> FloatArray:
        sized = [geometry.at(plan.imgsz) for plan in of]
        return np.array([at.macs(at.shares([p.ratios])).sum() for at, p in zip(sized, of, strict=True)])

    measured = [MeasuredPlan(Plan({}), 1.0), *known]
    line = np.polynomial.Polynomial.fit(macs([p.plan for p in measured]), [p.latency_ratio for p in measured], 1)
    return np.asarray(line(macs(plans)))


def report(measurements: Path, output: Path) -> None:
    content = json.loads(measurements.read_text(encoding="utf-8"))
    networks: dict[str, Any] = {}
    for name, rows in content["networks"].items():
        ratios = [1 / row["speedup"] for row in rows]
        curve = [held_out(geometry_of(name), rows, size) for size in SIZES if size + UNSEEN <= len(rows)]
        networks[name] = {
            "imgsz": NETWORKS[name],
            "plans": len(rows),
            "latency_ratios": [min(ratios), float(np.median(ratios)), max(ratios)],
            "baseline_ms": float(np.median([row["baseline_median_ms"] for row in rows])),
            "measured_halfwidth": float(np.median([np.ptp(r["speedup_ci95"]) / 2 / r["speedup"] for r in rows])),
            "curve": curve,
        }
    kept = ("date", "environment", "threads")
    result = {**{key: content[key] for key in kept}, "splits": SPLITS, "unseen": UNSEEN, "networks": networks}
    text = markdown(result)
    print(text)
    bare = {
        name: [{k: v for k, v in row.items() if k != "ratios"} for row in rows]
        for name, rows in content["networks"].items()
    }
    write_json(output / "latency_prediction.json", {**result, "measurements": bare})  # the ratios are the seeds'
    (output / "latency_prediction.md").write_text(text, encoding="utf-8")


def markdown(result: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key} {result['environment'][key]}" for key in SHOWN if key in result["environment"])
    lines = [
        "# Latency predicted from widths and input size",
        "",
        f"Measured {result['date']}, {result['threads']} thread, batch 1, runtime torch, float32; {shown}. Written by "
        "`python -m benchmarks.latency_prediction measure` and `report`.",
        "",
        f"Relative error of the latency ratio (pruned / unpruned) on {result['unseen']} plans that the model has not "
        f'seen, over {result["splits"]} random splits; "says of itself" is its own estimate from the measured plans '
        'alone; "within" is the share of unseen measurements inside the model\'s 95 % interval. Beside it: a straight '
        "line over multiply-adds, and the median of the measured plans.",
    ]
    for name, found in result["networks"].items():
        low, middle, high = found["latency_ratios"]
        lines += [
            "",
            f"## {name}, unpruned at {found['imgsz']} px",
            "",
            f"{found['plans']} random plans, ratios {low:.2f} to {high:.2f} (median {middle:.2f}) of "
            f"{found['baseline_ms']:.1f} ms; one measurement's 95 % interval is ±{found['measured_halfwidth']:.1%}.",
            "",
            "| measured plans | median | 95th percentile | largest | says of itself: median, 95th | within "
            "| line over multiply-adds: median, 95th | median plan: median, 95th | median by input size, px |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in found["curve"]:
            pairs = (f"{row[f'{k}_median']:.1%}, {row[f'{k}_p95']:.1%}" for k in ("said", "macs", "median"))
            own, macs, median = pairs
            sizes = ", ".join(f"{size}: {error:.1%}" for size, error in row["by_size"].items())
            lines.append(
                f"| {row['plans']} | {row['model_median']:.1%} | {row['model_p95']:.1%} | {row['model_largest']:.1%} "
                f"| {own} | {row['covered']:.0%} | {macs} | {median} | {sizes} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--networks", default=",".join(NETWORKS))
    measuring.add_argument("--plans", type=int, default=96)
    measuring.add_argument("--seconds", type=float, default=300)
    reporting = commands.add_parser("report")
    reporting.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    for command in (measuring, reporting):
        command.add_argument("--measurements", type=Path, default=MEASUREMENTS)
    options = parser.parse_args(arguments)
    if options.command == "measure":
        measure(options.networks.split(","), options.plans, options.seconds, options.measurements)
    else:
        report(options.measurements, options.output)


if __name__ == "__main__":
    main()
