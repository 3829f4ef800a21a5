"""Accuracy of a network cut to a budget, before any training by labels, beside what others get at as much work.

Usage: python -m benchmarks.recovery SECTION NETWORK [--seed S] [--minutes M] [--assets DIR] [--output DIR]
       python -m benchmarks.recovery table

NETWORK is one of coco, voc, bccd (YOLOv8n) and voc-s (YOLOv8s). All look at training images only and are validated on
the whole validation split. Every cell is appended to recovery.json at once, so the same command goes on where it was;
`table` writes recovery.md from what is there. Sections:
  cut        `paretoprune prune --keep-macs` with its defaults: no gradient step; the seed chooses the images looked at
  distilled  the same channels, with `--recover refit+distill`: at most 300 steps without labels
  sizes      the unpruned network at its own and at smaller input sizes
  l2         one ratio for all layers, channels by group L2; with the same refit, and without any recovery
  taylor     widths and channels by Taylor's criterion, in one step, with the same refit
  random     one ratio for all layers, channels at random, with the same refit
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recovery_table import markdown
from benchmarks.store import Store, Task, work
from benchmarks.surgery import commit
from paretoprune.pruning.budget.budget import Budget, chosen_for, cut_to, ratios_within
from paretoprune.pruning.budget.progressive import Report
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.importance.allocation import share_left
from paretoprune.pruning.names import RecoveryName
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.surgery import resolve
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import load_model

SIZES = (320, 288, 256, 224, 192, 160)  # pixels; the first one is what networks are cut for
IMAGES = 512  # calibration images, as `prune` takes
SECTIONS: dict[str, tuple[RecoveryName, ...]] = {  # with the recoveries that each has
    "cut": ("refit",),
    "distilled": ("refit+distill",),
    "sizes": (),
    "l2": ("none", "refit"),
    "taylor": ("refit",),
    "random": ("refit",),
}
OURS = ("cut", "distilled")


@dataclass(frozen=True)
class Network:
    """A checkpoint and its dataset, files of the assets, and per cent of the multiply-adds that a cut removes."""

    weights: str
    data: str
    fewer: tuple[int, ...]


NETWORKS = {
    "coco": Network("yolov8n.pt", "coco_val600", (30, 45, 60)),
    "voc": Network("voc_yolov8n.pt", "voc", (30, 50, 70)),
    "bccd": Network("bccd_yolov8n.pt", "bccd", (50, 66, 75)),
    "voc-s": Network("voc_yolov8s.pt", "voc", (30, 50, 70)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("section", choices=[*SECTIONS, "table"])
    parser.add_argument("network", choices=NETWORKS, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="no new cell is begun after these")
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("PARETOPRUNE_ASSETS", "../shared/assets")))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    store = Store(options.output / "recovery.json")
    if options.section == "table":
        wanted = [n for section in SECTIONS for key in NETWORKS for s in seeds(section) for n in names(section, key, s)]
        text = markdown(store, [name for name in wanted if not store.has(name)])
        (options.output / "recovery.md").write_text(text, encoding="utf-8")
        return
    if options.network is None:
        parser.error("give a network beside the section")
    torch.set_num_threads(1)
    subject = Subject(options.section, options.network, options.assets, options.seed)
    wanted = names(options.section, options.network, options.seed)
    tasks = [Task((name,), partial(subject.cell, name)) for name in wanted]
    done = work(store, tasks, options.minutes, partial(print, flush=True))
    print("all cells are there" if done else "the time is up; the same command goes on", flush=True)


def seeds(section: str) -> tuple[int, ...]:
    """Those that the table has cells of."""
    return (0, 1) if section in OURS else (0,)


def names(section: str, network: str, seed: int) -> list[dict[str, Any]]:
    """What identifies the cells of a section."""
    if section == "sizes":
        return [{"section": section, "network": network, "imgsz": size} for size in SIZES]
    return [
        {"section": section, "network": network, "fewer": fewer, "recover": recover, "seed": seed}
        for fewer in NETWORKS[network].fewer
        for recover in SECTIONS[section]
    ]


class Subject:
    """A network with its data, and what is made of them once for all cells of a command."""

    def __init__(self, section: str, network: str, assets: Path, seed: int) -> None:
        chosen = NETWORKS[network]
        self.weights, self.data = str(assets / "weights" / chosen.weights), str(assets / chosen.data / "data.yaml")
        importance = "reconstruction" if section in (*OURS, "sizes") else section
        self.bench = Workbench(
            self.weights, self.data, SIZES[0], calibration_images=IMAGES, importance=importance, seed=seed
        )
        self.evaluator = Evaluator(self.data, SIZES[0], "cpu", workers=0)
        # So that `distilled` need not choose again what `cut` has chosen
        self.plans = Path(tempfile.gettempdir()) / f"recovery-plans-{commit()}"

    def cell(self, name: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if name["section"] == "sizes":
            evaluator = Evaluator(self.data, name["imgsz"], "cpu", workers=0)
            found = evaluator.run(load_model(self.weights))["map50_95"]
            yield {"map50_95": round(found, 4), "images": evaluator.images}
            return
        bench, file = self.bench, self.plans / "{network}-{fewer}-{seed}.json".format(**name)
        times, budget = [time.process_time()], Budget(1 - name["fewer"] / 100)

        def report(line: str) -> None:
            print(line, flush=True)
            times.append(time.process_time())

        if name["section"] == "cut":  # the function behind `prune --keep-macs`
            cut = cut_to(bench, budget, name["recover"], report)
            model, plan, began = cut.model, cut.plan, times[-1]  # the last line is that of the refit
            plan.save(file)
        else:
            model, plan = bench.prune(self._wanted(name["section"], budget, file, report))
            if name["recover"] != "none":
                _ = bench.targets  # made once for all cuts, so not within the time
            began = time.process_time()
            bench.recover(model, plan, name["recover"], report=report)
        values = {
            "macs_kept": round(self._share(plan.ratios), 4),
            "choice_cpu_s": round(began - times[0], 1),
            "recovery_cpu_s": round(time.process_time() - began, 1),
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        yield {"map50_95": round(self.evaluator.run(model)["map50_95"], 4), **values}

    def _wanted(self, section: str, budget: Budget, file: Path, report: Report) -> Plan | Mapping[str, float]:
        """What to remove: the plan that `cut` chose, Taylor's widths, or the ratio that comes nearest to the budget."""
        if section == "distilled":
            return Plan.load(file) if file.is_file() else chosen_for(self.bench, budget, report)[0]
        if section == "taylor":
            return ratios_within(self.bench, budget)
        ratios = [{"*": float(ratio)} for ratio in np.arange(0.01, 0.9, 0.0025)]
        return min(ratios, key=lambda ratios: abs(self._share(ratios) - budget.share))

    def _share(self, ratios: Mapping[str, float]) -> float:
        """Of the multiply-adds that these ratios leave."""
        return share_left(self.bench.table, self.bench.conv_costs, resolve(self.bench.table, ratios))


if __name__ == "__main__":
    main()
