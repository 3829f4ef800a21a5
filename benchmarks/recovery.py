"""What brings accuracy back after removal, and how early a trial's score tells the truth.

Usage: python -m benchmarks.recovery SECTION [--part I/N] [--minutes M] [--assets DIR] [--output benchmarks/results]
       python -m benchmarks.recovery table

Every measured cell is appended to recovery.json at once, so the same command again goes on where it was; `table` writes
recovery.md from what is there. Sections:
  before   mAP50-95 before any gradient step: every criterion x recovery on the same plans, 15, 30 and 45 % fewer
           multiply-adds, yolov8n on coco/ and the blood-cell detector on bccd/ (calibrated on train, evaluated on val);
           of the criteria the three main ones here, two of them without batch-norm statistics
  others   the same for every criterion x recovery, widths by sensitivity
  seeds    the product's defaults with other calibration images, bccd/
  speed    the plans' speed-ups, paired with the unpruned network (nothing else may run meanwhile)
  full     after full fine-tuning on bccd/
  epochs   after 1, 3 and 10 epochs on bccd/, ours and with one ingredient changed, three seeds
  ranks    Kendall's tau between a trial's score and the score after a full fine-tuning, 12 random plans, demo data
  cost     seconds of a refit beside those of one fine-tuning epoch
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.recovery_material import ARMS, LESS, UNMIXED, Subject, tune
from benchmarks.recovery_store import Store, Task, work
from benchmarks.recovery_table import markdown
from paretoprune.pruning.importance import CRITERIA
from paretoprune.pruning.latency.pair import measure_pair
from paretoprune.pruning.names import RECOVERIES
from paretoprune.pruning.recovery.refit import recalibrate_batch_norm
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.precision import training_precision

MAIN_CRITERIA = ("reconstruction", "taylor", "l2")
# Per cent fewer multiply-adds of the plans that the aims are about: around 1.3, 1.6 and 2.0 times as fast for bccd
AIMED = {"coco": (28,), "bccd": (37, 42, 50, 57, 64, 66, 70, 72, 75)}
KINDS = ("sensitivity", "uniform")  # how the widths of a plan are chosen
FULL_LESS = (75, 70, 42)
SEEDS = (0, 1, 2)
SEEDS_LESS = (30, 50, 66, 70, 72, 75)
EPOCHS = (1, 3, 10)
EPOCHS_LESS = 50  # per cent fewer multiply-adds of the plan that few epochs are tried on
FULL_EPOCHS = 30
RANK_PLANS, RANK_FULL_EPOCHS, RANK_EPOCHS = 12, 10, (0, 1, 3)
RANK_IMAGES = 300  # training images of the demo data, half of what `paretoprune demo` has
RANK_SHARES = (0.45, 0.55)  # of the multiply-adds that stay in a random plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("section", choices=[*SECTIONS, "table"])
    parser.add_argument("--minutes", type=float, default=600, help="no new cell is begun after these")
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("PARETOPRUNE_ASSETS", "../shared/assets")))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="1/1", help="I/N: this process does every N-th task, from the I-th on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    store = Store(options.output / "recovery.json")
    if options.section != "table":
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory(prefix="recovery-") as scratch:
            first, count = map(int, options.part.split("/"))
            tasks = islice(SECTIONS[options.section](options.assets, Path(scratch)), first - 1, None, count)
            done = work(store, tasks, options.minutes, say)
        say("all cells are there" if done else "the time is up; the same command goes on")
    store.load()
    text = markdown(store, unmeasured(store, options.assets))
    (options.output / "recovery.md").write_text(text, encoding="utf-8")


def unmeasured(store: Store, assets: Path) -> dict[str, tuple[int, int]]:
    """Per section with missing cells, how many are missing and how many there are to be."""
    found: dict[str, tuple[int, int]] = {}
    counted: list[dict[str, Any]] = []  # `others` goes through what `before` has, too
    for section, tasks in SECTIONS.items():
        names = [name for task in tasks(assets, Path()) for name in task.names if name not in counted]
        counted += names
        if missing := sum(not store.has(name) for name in names):
            found[section] = (missing, len(names))
    return found


def say(line: str) -> None:
    print(line, flush=True)


def subjects(assets: Path) -> Iterator[Subject]:
    yield Subject("coco", str(assets / "weights" / "yolov8n.pt"), str(assets / "coco" / "data.yaml"), 320)
    yield blood_cells(assets)


def blood_cells(assets: Path) -> Subject:
    return Subject("bccd", str(assets / "weights" / "bccd_yolov8n.pt"), str(assets / "bccd" / "data.yaml"), 320)


@cache
def demo(scratch: Path) -> Subject:
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset

    return Subject("demo", str(BASELINE), str(build_dataset(scratch / "demo", train=RANK_IMAGES)), 160)


# -- before any gradient step ----------------------------------------------------------------------------------------


def before(assets: Path, scratch: Path) -> Iterator[Task]:
    for subject in subjects_kept(assets):
        yield Task(({"section": "before", "model": subject.name, "plan": "unpruned"},), partial(_unpruned, subject))
    for subject in subjects_kept(assets):
        for less in AIMED[subject.name]:
            yield _before(subject, "aimed", less, MAIN_CRITERIA[0], ("refit",))
    for criterion in MAIN_CRITERIA:
        yield from _plans(assets, criterion, RECOVERIES if criterion == MAIN_CRITERIA[0] else ("none", "refit"))


def others(assets: Path, scratch: Path) -> Iterator[Task]:
    """Every criterion with every recovery, with the widths that the product takes."""
    for criterion in sorted(CRITERIA, key=lambda name: name not in MAIN_CRITERIA):
        yield from _plans(assets, criterion, RECOVERIES, ("sensitivity",))


def _plans(assets: Path, criterion: str, recoveries: tuple[str, ...], kinds: Sequence[str] = KINDS) -> Iterator[Task]:
    for subject in reversed(subjects_kept(assets)):
        for kind in kinds:
            for less in LESS:
                yield _before(subject, kind, less, criterion, recoveries)


_KEPT: dict[Path, list[Subject]] = {}


def subjects_kept(assets: Path) -> list[Subject]:
    """The subjects with what was computed for earlier cells."""
    return _KEPT.setdefault(assets, list(subjects(assets)))


def _unpruned(subject: Subject) -> Iterator[dict[str, Any]]:
    yield {"map50_95": subject.map50_95(subject.bench.model)}


def _before(subject: Subject, kind: str, less: int, criterion: str, recoveries: tuple[str, ...]) -> Task:
    plan = {"section": "before", "model": subject.name, "plan": f"{kind} {less} %"}
    names = tuple({**plan, "criterion": criterion, "recovery": how} for how in recoveries)

    def make() -> Iterator[dict[str, Any]]:
        widths = planned(subject, kind, less)
        share = round(subject.share(widths), 4)
        network = None
        for how in recoveries:
            if how == "refit+bn" and network is not None:  # on top of the refit before it
                recalibrate_batch_norm(network, subject.bench.calibration.images)
            else:
                network = subject.recovered(widths, criterion, how)
            yield {"macs_share": share, "map50_95": subject.map50_95(network)}

    return Task(names, make)


def seeds(assets: Path, scratch: Path) -> Iterator[Task]:
    """How much of a figure is the choice of calibration images."""
    for seed in SEEDS:
        subject = replace(blood_cells(assets), seed=seed)
        for less in SEEDS_LESS:
            name = {"section": "seeds", "plan": f"aimed {less} %", "seed": seed}
            yield Task((name,), partial(_seeds, subject, less))


def _seeds(subject: Subject, less: int) -> Iterator[dict[str, Any]]:
    widths = subject.by_sensitivity(less)
    network = subject.recovered(widths)
    yield {"macs_share": round(subject.share(widths), 4), "map50_95": subject.map50_95(network)}


# -- speed -----------------------------------------------------------------------------------------------------------


def planned(subject: Subject, kind: str, less: int) -> dict[int, int]:
    """Widths by group id of the plan that a cell calls '{kind} {less} %'."""
    return subject.uniform(less) if kind == "uniform" else subject.by_sensitivity(less)


def speed(assets: Path, scratch: Path) -> Iterator[Task]:
    """Which channels go does not matter to time, so each plan is timed once."""
    for subject in reversed(subjects_kept(assets)):
        plans = [("aimed", less) for less in AIMED[subject.name]]
        for kind, less in [*plans, *((kind, less) for kind in KINDS for less in LESS)]:
            name = {"section": "speed", "model": subject.name, "plan": f"{kind} {less} %"}
            yield Task((name,), partial(_speed, subject, kind, less))


def _speed(subject: Subject, kind: str, less: int) -> Iterator[dict[str, Any]]:
    yield timed(subject, planned(subject, kind, less))


def timed(subject: Subject, widths: dict[int, int]) -> dict[str, Any]:
    """Paired speed-up of these widths, batch 1."""
    network, _ = subject.pruned(widths, "l2")  # which channels does not matter to time
    found = measure_pair(network, subject.bench.model, subject.imgsz, threads=1, max_seconds=12)
    return {
        "macs_share": round(subject.share(widths), 4),
        "params_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 3),
        "speedup": round(found.speedup, 3),
        "speedup_ci95": [round(v, 3) for v in found.speedup_ci95],
    }


# -- after fine-tuning -----------------------------------------------------------------------------------------------


def epochs(assets: Path, scratch: Path) -> Iterator[Task]:
    """The cells of each table row that say most come first; the longest fine-tunings last."""
    subject = subjects_kept(assets)[1]
    for count in EPOCHS:
        for seed in SEEDS:
            for arm, start in _rows(count):
                name = {"section": "epochs", "arm": arm, "start": start, "epochs": count, "seed": seed}
                yield Task((name,), partial(_epochs, subject, name, scratch))


def _rows(count: int) -> list[tuple[str, str]]:
    """(arm, start) of the rows that have a cell for `count` epochs; where nothing is mixed, ours is without it, too."""
    mixes = training_precision(nn.Identity(), "cpu", True) != "fp32"
    rows = [(arm, "refit") for arm in ARMS if mixes or arm != UNMIXED]
    rows += [(arm, "plain removal") for arm in ("ours", "Ultralytics' defaults")]
    return rows if count < max(EPOCHS) else [*rows, ("ours", "refit and 3 epochs")]


def _epochs(subject: Subject, name: dict[str, Any], scratch: Path) -> Iterator[dict[str, Any]]:
    start = subject.recovered(
        subject.by_sensitivity(EPOCHS_LESS), "", "none" if name["start"] == "plain removal" else "refit"
    )
    if name["start"] == "refit and 3 epochs":
        start = trial(subject, start, name["seed"], scratch)
    yield {
        "start_map50_95": subject.map50_95(start),
        **tune(subject, start, name["epochs"], name["seed"], name["arm"], scratch / "tune"),
    }


def trial(subject: Subject, start: nn.Module, seed: int, scratch: Path) -> nn.Module:
    """What a trial of 3 epochs makes of the network."""
    short = FinetuneSettings(epochs=3, imgsz=subject.imgsz, seed=seed, workers=0)
    return finetune(start, subject.data, short, scratch / "short").model


def full(assets: Path, scratch: Path) -> Iterator[Task]:
    subject = subjects_kept(assets)[1]
    for start in ("refit", "refit and 3 epochs"):
        for less in FULL_LESS:
            name = {"section": "full", "plan": f"aimed {less} %", "start": start, "epochs": FULL_EPOCHS}
            yield Task((name,), partial(_full, subject, less, start, scratch))


def _full(subject: Subject, less: int, start: str, scratch: Path) -> Iterator[dict[str, Any]]:
    network = subject.recovered(subject.by_sensitivity(less))
    begin = subject.map50_95(network)
    if start != "refit":
        network = trial(subject, network, 0, scratch)
    yield {"start_map50_95": begin, **tune(subject, network, FULL_EPOCHS, 0, "ours", scratch / "tune")}


# -- does a short trial tell the truth? ------------------------------------------------------------------------------


def ranks(assets: Path, scratch: Path) -> Iterator[Task]:
    kinds = [(way, count) for count in RANK_EPOCHS for way in ("ours", "plain")]
    for way, count in [("full", RANK_FULL_EPOCHS), *kinds]:
        for plan in range(RANK_PLANS):
            name = {"section": "ranks", "plan": plan, "way": way, "epochs": count}
            yield Task((name,), partial(_ranks, name, scratch))


def _ranks(name: dict[str, Any], scratch: Path) -> Iterator[dict[str, Any]]:
    subject = demo(scratch)
    widths = random_widths(subject, name["plan"])
    plain = name["way"] == "plain"
    start = subject.recovered(widths, "l2" if plain else "", "none" if plain else "refit")
    begin = {"macs_share": round(subject.share(widths), 4), "start_map50_95": subject.map50_95(start)}
    if not name["epochs"]:
        yield {**begin, "map50_95": begin["start_map50_95"]}
    else:
        arm = "Ultralytics' defaults" if plain else "ours"
        yield {**begin, **tune(subject, start, name["epochs"], 0, arm, scratch / "tune")}


def random_widths(subject: Subject, number: int) -> dict[int, int]:
    """Random widths by group id whose multiply-adds lie in `RANK_SHARES`; drawn anew until they do."""
    groups, rng = subject.bench.table.groups, np.random.default_rng(number)
    while True:
        drawn = {g.id: g.widths(8)[int(len(g.widths(8)) * rng.random() ** 2)] for g in groups}  # the wide ones oftener
        widths = {g: w for g, w in drawn.items() if w < groups[g].channels}
        if RANK_SHARES[0] <= subject.share(widths) <= RANK_SHARES[1]:
            return widths


# -- cost ------------------------------------------------------------------------------------------------------------


def cost(assets: Path, scratch: Path) -> Iterator[Task]:
    subject = subjects_kept(assets)[1]
    for less in LESS:
        yield Task(({"section": "cost", "plan": f"sensitivity {less} %"},), partial(_cost, subject, less, scratch))


def _cost(subject: Subject, less: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Seconds of one refit (targets and calibration images are there: they are made once a worker) and one epoch."""
    widths = subject.by_sensitivity(less)
    network, plan = subject.pruned(widths, subject.bench.importance)
    _ = subject.bench.targets
    begin = time.monotonic()
    subject.bench.recover(network, plan, "refit")
    refit_seconds = time.monotonic() - begin
    row = finetune(
        network, subject.data, FinetuneSettings(epochs=1, imgsz=subject.imgsz, workers=0), scratch / "cost"
    ).history[0]
    yield {"refit_seconds": round(refit_seconds, 1), "epoch_seconds": round(row["seconds"], 1)}


SECTIONS: dict[str, Callable[[Path, Path], Iterable[Task]]] = {
    "before": before,
    "others": others,
    "seeds": seeds,
    "speed": speed,
    "full": full,
    "epochs": epochs,
    "ranks": ranks,
    "cost": cost,
}

if __name__ == "__main__":
    main()
