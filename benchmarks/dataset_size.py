"""What a search costs on 1,000, 20,000 and 100,000 images: the time to the first trial, and a trial's own.

Usage: python -m benchmarks.dataset_size [--trials N] [--steps N] [--val-images N] [--whole] [IMAGES ...]

A generated dataset: the built-in one's scenes, drawn once and linked under as many names as are asked for, a tenth of
them for validation; the built-in model at 64 px. A search for each size by the command line, one trial at a time, as it
comes but for a short training (`trial.steps`) on few validation images (`trial.val_images`), so that all three sizes
have more than a trial takes. `--whole`: without these two, as it was before there were any. The times are from the run
folder: when a file was written, and the records' phases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.surgery import commit
from paretoprune.base.atomic import write_json, write_text
from paretoprune.cluster.environment import usable_cpus
from paretoprune.pruning.builtin import BASELINE
from paretoprune.results.store.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCENES = 100  # different images
IMGSZ = 64


def linked_dataset(root: Path, images: int) -> Path:
    """The data.yaml of so many images, a tenth of them for validation."""
    from paretoprune.pruning.builtin.dataset import build_dataset

    build_dataset(root / "scenes", train=SCENES, val=SCENES, imgsz=96)
    for split, count in (("train", images - images // 10), ("val", images // 10)):
        for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
            (root / kind / split).mkdir(parents=True)
            for number in range(count):
                source = root / "scenes" / kind / split / f"{number % SCENES:05d}{suffix}"
                os.link(source, root / kind / split / f"{number:06d}{suffix}")
    text = (root / "scenes" / "data.yaml").read_text(encoding="utf-8")
    return write_text(root / "data.yaml", text)


def measured(images: int, asked: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One search on so many images."""
    data, run = linked_dataset(root / "data", images), root / "run"
    wanted = {
        "trial.steps": 0 if asked.whole else asked.steps,
        "trial.val_images": 0 if asked.whole else asked.val_images,
    }
    wanted |= {"space.imgsz": "[]", "search.early_stopping": "false", "recover.calibration_images": 32}
    wanted |= {"resources.max_concurrent_trials": 1, "latency.max_seconds": 0.5}
    command = [sys.executable, "-m", "paretoprune", "search", str(BASELINE), str(data), "--run", str(run)]
    command += ["--trials", str(asked.trials), "--imgsz", str(IMGSZ)]
    command += [part for key, value in wanted.items() for part in ("--set", f"{key}={value}")]
    began = time.time()
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr, check=True)
    folder = RunFolder(run)
    records = sorted(folder.read_records(), key=lambda record: record.finished_at)
    first = records[0].finished_at - sum(records[0].seconds.values())
    written = {path.name: path.stat().st_mtime for path in (folder.config, folder.baseline)}
    seconds = [sum(record.seconds.values()) for record in records]
    # What a trial took beside its phases counts, too: from one's end to the next one's
    between = [after.finished_at - before.finished_at for before, after in pairwise(records)]
    phases = {name: statistics.median(r.seconds.get(name, 0.0) for r in records) for name in records[0].seconds}
    return {
        "images": images, "val_images": records[0].metrics["val_images"],
        "checks_s": written["config.yaml"] - began, "unpruned_s": written["baseline.json"] - written["config.yaml"],
        "to_first_trial_s": first - began, "trial_s": statistics.median(seconds),
        "first_trial_s": seconds[0], "trial_to_trial_s": statistics.median(between), "phases_s": phases,
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """The result as a page."""
    how = "all images" if content["whole"] else f"at most {content['steps']} steps and {content['val_images']} images"
    lines = [
        "# What a search costs on a large dataset",
        "",
        f"{content['date']}, commit {content['commit']}, {content['cpus']} CPU cores. Written by "
        "`python -m benchmarks.dataset_size`.",
        "",
        f"The built-in model at {IMGSZ} px on generated datasets, {content['trials']} trials, one at a time, each of "
        f"{how} (`trial.steps`, `trial.val_images`). Seconds. *Checks*: until the run folder is begun. *Unpruned "
        "model*: Ray's start, reading labels, judging it on the sample and on all validation images, timing it, "
        "importance. *Trial to trial*: median from one trial's end to the next one's.",
        "",
        "| images | of them validation | checks | unpruned model | until the first trial begins | first trial "
        "| median trial | fine-tuning | validation | trial to trial |",
        "| --- " * 10 + "|",
    ]
    for row in content["rows"]:
        phases = row["phases_s"]
        cells = [row["checks_s"], row["unpruned_s"], row["to_first_trial_s"], row["first_trial_s"], row["trial_s"]]
        cells += [phases["finetune"], phases["evaluate"], row["trial_to_trial_s"]]
        numbers = " | ".join(f"{value:.1f}" for value in cells)
        lines.append(f"| {row['images']:,} | {row['images'] // 10:,} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each size, print the page, write it and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=int, default=[1_000, 20_000, 100_000])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--val-images", type=int, default=100)
    parser.add_argument("--whole", action="store_true", help="every image in every trial")
    parser.add_argument("--json", type=Path, default=RESULTS / "dataset_size.json", metavar="OUT")
    parser.add_argument("--add", action="store_true", help="to the sizes that OUT has already")
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text(encoding="utf-8"))["rows"] if asked.add else []
    for images in asked.images:
        with tempfile.TemporaryDirectory(prefix="paretoprune-sizes-") as root:
            rows.append(measured(images, asked, Path(root)))
        print(rows[-1], file=sys.stderr)
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(), "cpus": usable_cpus(),
        "trials": asked.trials, "steps": asked.steps, "val_images": asked.val_images, "whole": asked.whole,
        "rows": sorted(rows, key=lambda row: row["images"]),
    }  # fmt: skip
    print(markdown(content))
    write_json(asked.json, content)
    write_text(asked.json.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    main()
