"""Is a latency right while the same machine trains? The device lock, repeated measurements, and the intervals.

Usage: python -m benchmarks.latency arms [--rounds 8] [--append]
       python -m benchmarks.latency repeat [--pairs 20] [--append]
       python -m benchmarks.latency coverage
       (each: [--output benchmarks/results])

arms: yolov8n at 320 pixels, pruned by half, beside the unpruned one; two processes fine-tune the built-in model on the
built-in dataset, each batch under the device's lock as in a search. In every round, in turning order: "idle" (the
trainers are stopped by SIGSTOP), "locked" (they run, the measurement takes the lock as a trial's does) and "unlocked"
(they run, it does not). repeat: the same two networks measured again and again on the idle machine, each time in a new
process; two consecutive measurements agree if the 95 % interval of their difference holds zero. coverage: simulated,
how often the 95 % interval holds the true speed-up where quads follow one another. The parts gather in one JSON and one
table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.latency_table import table
from benchmarks.latency_trainers import Trainers
from benchmarks.surgery import commit
from paretoprune.cluster.device_lock import DeviceLock
from paretoprune.cluster.environment import describe_environment
from paretoprune.pruning.latency.pair import measure_pair
from paretoprune.pruning.latency.statistics import Quad, speedup
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

ARMS = ("idle", "locked", "unlocked")
IMGSZ, RATIO, THREADS = 320, 0.5, 1
CORRELATIONS, COUNTS, SIMULATED = (0.0, 0.3, 0.6, 0.8), (12, 28, 60, 200), 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("part", choices=("arms", "repeat", "coverage", "once"))
    parser.add_argument("--rounds", type=int, default=8, help="arms: times that each of the three is measured")
    parser.add_argument("--pairs", type=int, default=20, help="repeat: pairs of measurements")
    parser.add_argument("--max-seconds", type=float, default=8.0, help="of one measurement")
    parser.add_argument("--append", action="store_true", help="to the measurements that the output holds already")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    if options.part == "once":  # what `repeat` starts
        print(json.dumps(measured(pair(), options.max_seconds)))
        return
    path = options.output / "latency.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = {"arms": arms, "repeat": repeat, "coverage": coverage}[options.part](options)
    earlier = content.get(options.part, {}).get("rows", []) if options.append else []
    command = f"python -m benchmarks.latency {options.part}"
    if options.part == "arms":
        command += f" --rounds {options.rounds}"
    elif options.part == "repeat":
        command += f" --pairs {options.pairs}"
    content[options.part] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": command + (" --append" if options.append else ""),
        "environment": describe_environment(),
        "max_seconds": options.max_seconds,
        "rows": earlier + rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = table(content)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def pair() -> tuple[nn.Module, nn.Module]:
    """yolov8n pruned by half, and unpruned. Untrained: latency does not depend on the weights."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    with TemporaryDirectory() as folder, quiet_ultralytics():
        path = Path(folder) / "yolov8n.pt"
        save_checkpoint(DetectionModel("yolov8n.yaml", verbose=False), path)
        bench = Workbench(str(path), None, IMGSZ, "cpu", importance="l2")
        return bench.prune({"*": RATIO})[0], bench.model


def measured(models: tuple[nn.Module, nn.Module], max_seconds: float) -> dict[str, Any]:
    """One measurement, opened anew."""
    return measure_pair(*models, IMGSZ, threads=THREADS, max_seconds=max_seconds).to_dict()


def arms(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each measurement, with how many batches the trainers did meanwhile."""
    models, rows = pair(), []
    measured(models, 2.0)  # the first one pays for what is loaded once
    with TemporaryDirectory(prefix="paretoprune-bench-") as folder, Trainers(2, Path(folder)) as trainers:
        lock = DeviceLock("cpu", trainers.locks)
        for number in range(options.rounds):
            order = ARMS[number % 3 :] + ARMS[: number % 3]
            for arm in order:
                if arm == "idle":
                    trainers.pause()
                else:
                    trainers.go_on()
                if arm == "locked":
                    with lock.measuring():
                        row = trainers.counting(lambda: measured(models, options.max_seconds))
                else:
                    row = trainers.counting(lambda: measured(models, options.max_seconds))
                rows.append({"arm": arm, **row})
                print(number, arm, round(row["speedup"], 3), row["speedup_ci95"], row["trainer_batches"], flush=True)
    return rows


def repeat(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measurements one after the other, each in a process of its own; rows 2 i and 2 i + 1 are a pair."""
    command = [sys.executable, "-m", "benchmarks.latency", "once", "--max-seconds", str(options.max_seconds)]
    rows = []
    for number in range(2 * options.pairs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(number, round(rows[-1]["speedup"], 3), rows[-1]["speedup_ci95"], flush=True)
    return rows


def coverage(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of simulated measurements whose interval holds the truth, by the correlation of neighbouring quads."""
    generator = np.random.default_rng(0)
    rows = []
    for correlation in CORRELATIONS:
        for count in COUNTS:
            hits = 0
            for _ in range(SIMULATED):
                drift = [generator.normal()]
                for innovation in generator.normal(size=count - 1):
                    drift.append(correlation * drift[-1] + math.sqrt(1 - correlation**2) * innovation)
                times = 6.0 * np.exp(0.02 * np.array(drift))
                found = speedup([Quad(((4.0,), (4.0,)), ((each,), (each,))) for each in times.tolist()])
                hits += found.low <= 1.5 <= found.high
            rows.append({"correlation": correlation, "quads": count, "covered": hits / SIMULATED})
    return rows


if __name__ == "__main__":
    main()
