"""Ours and its rivals on the demo data: hypervolume of the fully fine-tuned picks against epochs spent.

A cell is one searcher with one seed. Ours is the product itself (`paretoprune search`, with its stopping); a rival's
plans go through the same trial (:func:`search.trial.trial.run_trial`). After a third, two thirds and all of a cell's
epochs its front so far is reduced to the same number of picks, each is fine-tuned fully (the same for all), and the
hypervolume of what came out counts: accuracy above 0, cost below the unpruned model's. Everything finished lies in the
work folder and is not done again, so the whole can be run in pieces.

The cost is latency, or, on a machine that other jobs share, the multiply-adds: a latency measured there says more about
the neighbours than about the plan.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals import RIVALS, Problem
from paretoprune.base.atomic import write_json
from paretoprune.pruning.graph.geometry import NetworkGeometry
from paretoprune.pruning.plan import Plan
from paretoprune.results.selection.pareto import hypervolume, non_dominated
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.space.space import Space, build_space

OURS = "ours"
SEARCHERS = (OURS, *RIVALS)
PARTS = (1 / 3, 2 / 3, 1.0)  # of a cell's epochs, at which it is judged
CURVE_RATIOS = (0.5,)  # at which FastNAS's curves are sampled; between them they are straight


@dataclass(frozen=True)
class Settings:
    """What a comparison is made with; a work folder belongs to one.

    `our_trials`: ours spends its epochs on few of its trials, the others end before their first one.
    `cost`: the objective beside accuracy, `latency_ms` or `gflops`. `slots`: trials at a time.
    """

    trials: int = 6
    our_trials: int = 12
    epochs: int = 1
    picks: int = 2
    full_epochs: int = 3
    train_images: int = 80
    val_images: int = 64
    cost: str = "gflops"
    slots: int = 1

    @property
    def budget(self) -> int:
        """Epochs of a cell."""
        return self.trials * self.epochs

    def config(self, dataset: Path, seed: int) -> dict[str, Any]:
        """The run's settings, nested."""
        from paretoprune.pruning.builtin import BASELINE, IMGSZ

        return {
            "model": {"path": str(BASELINE), "imgsz": IMGSZ},
            "data": {"path": str(dataset)},
            "search": {"trials": self.our_trials, "seed": seed, "objectives": ["map50_95", self.cost]},
            "trial": {"epochs": self.epochs},
            "recover": {"calibration_images": 32},
            "finetune": {"epochs": self.full_epochs, "patience": 0},
            "latency": {"max_seconds": 1.5 if self.cost == "latency_ms" else 0.2, "threads": 1},
            "resources": {"cpus_per_trial": 1, "parallel": self.slots},
        }


# ---- in the worker processes

_TOOLS: dict[str, Any] = {}


def _tools(settings: Mapping[str, Any]) -> tuple[Any, Any, RunConfig]:
    """This process's tools, made at the first call for these settings."""
    key = json.dumps(settings, sort_keys=True)
    if key not in _TOOLS:
        from paretoprune.cluster.device_lock import DeviceLock
        from paretoprune.cluster.environment import pin_threads
        from paretoprune.search.trial.factory import make_tools

        pin_threads(1)
        _TOOLS.clear()
        config, gate = build_config(dict(settings)), DeviceLock("cpu")
        _TOOLS[key] = (make_tools(config, "cpu", gate), gate, config)
    found: tuple[Any, Any, RunConfig] = _TOOLS[key]
    return found


def work_on_plan(settings: Mapping[str, Any], name: str, ratios: dict[str, float], folder: Path, ms: float) -> None:
    """One trial of a rival; its record lies in `folder` afterwards."""
    from paretoprune.search.storage.request import TrialRequest
    from paretoprune.search.trial.trial import TrialSettings, run_trial

    tools, gate, config = _tools(settings)
    request = TrialRequest(trial_id=name, ratios=ratios, provenance="rival")
    run_trial(request, TrialSettings(config.trial.epochs, True, ms), tools, gate, folder)


def work_on_pick(settings: Mapping[str, Any], checkpoint: Path, folder: Path) -> dict[str, float]:
    """The full fine-tuning of one pick: its metrics afterwards."""
    tools, _, _ = _tools(settings)
    with tools.logging(folder / "finetune.log"):
        tuned = tools.finetune_fully(tools.load(checkpoint), folder / "full")
    tools.release()
    return {name: float(value) for name, value in tuned.metrics.items() if isinstance(value, (int, float))}


def prepare_baseline(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the rivals look at, as plain data: metrics, geometry, scores by class of channels, sensitivity curves."""
    from paretoprune.pruning.workbench import Workbench
    from paretoprune.search.trial.trial import latency_metrics

    tools, gate, config = _tools(settings)
    bench = Workbench(config.model.path, config.data.path, config.model.imgsz, calibration_images=32)
    space = build_space(bench.table, config.space)
    with gate.measuring():
        measured = tools.start_measure(tools.baseline).result()
    metrics = {**tools.evaluate(tools.baseline), **tools.stats(tools.baseline)}
    latency = latency_metrics({**measured, "speedup": 1.0}, float(measured["median_ms"]))
    scores = {"taylor": bench.loss_scores, "l2": Workbench(config.model.path, importance="l2").scores}
    groups = {group.name: np.concatenate(group.parts) for group in bench.table.groups}
    by_axis = {k: [s[groups[axis.groups[0].name]].tolist() for axis in space.width_axes] for k, s in scores.items()}
    return {
        "metrics": {**metrics, "latency_ms": latency["latency_ms"]},
        "geometry": bench.geometry.to_json(),
        "scores": by_axis,
        "losses": [_curve(tools, axis.groups[0], float(metrics["map50_95"])) for axis in space.width_axes],
    }


def _curve(tools: Any, group: Any, whole: float) -> list[float]:
    """Accuracy lost at each width of one group, all others whole, nothing recovered."""
    sampled = sorted({group.nearest(ratio) for ratio in CURVE_RATIOS}, reverse=True)
    ratios, losses = [0.0], [0.0]
    for width in (w for w in sampled if w < group.channels):
        network, _ = tools.prune(Plan(dict.fromkeys(group.layers, group.ratio(width))))
        ratios.append(group.ratio(width))
        losses.append(whole - float(tools.evaluate(network)["map50_95"]))
    return [float(np.interp(group.ratio(width), ratios, losses)) for width in group.widths]


# ---- in the driver


@dataclass(frozen=True)
class Comparison:
    """One work folder: its settings, dataset, what was prepared, and processes to work in."""

    root: Path
    pool: ProcessPoolExecutor
    settings: Settings
    dataset: Path
    baseline: Mapping[str, Any]
    problem: Problem

    def run_settings(self, seed: int) -> dict[str, Any]:
        """The settings of a cell's workers."""
        return self.settings.config(self.dataset, seed)

    def cost(self, record: TrialRecord) -> float:
        """A trial's cost over the unpruned model's."""
        if self.settings.cost == "latency_ms":
            return float(record.metrics["latency_ratio"])
        return float(record.metrics[self.settings.cost]) / float(self.baseline["metrics"][self.settings.cost])

    def cell(self, searcher: str, seed: int) -> Path:
        """Where a cell's trials lie."""
        return self.root / f"{searcher}-{seed}"


@contextmanager
def opened(root: Path, settings: Settings) -> Iterator[Comparison]:
    """The comparison with its worker processes: spawned, since torch lives in them, each with one thread."""
    with ProcessPoolExecutor(settings.slots, mp_context=get_context("spawn")) as pool:
        yield _prepared(root, settings, pool)


def _prepared(root: Path, settings: Settings, pool: ProcessPoolExecutor) -> Comparison:
    """Build the dataset and look at the baseline, unless that was done."""
    from paretoprune.pruning.builtin import BASELINE
    from paretoprune.pruning.builtin.dataset import build_dataset
    from paretoprune.pruning.surgery.layer_table import build_layer_table
    from paretoprune.pruning.yolo.loading import load_model

    dataset = build_dataset(root / "data", train=settings.train_images, val=settings.val_images).resolve()
    known = root / "baseline.json"
    if not known.is_file():
        write_json(known, pool.submit(prepare_baseline, settings.config(dataset, 0)).result())
    baseline = json.loads(known.read_text(encoding="utf-8"))
    space: Space = build_space(build_layer_table(load_model(BASELINE)), build_config(settings.config(dataset, 0)).space)
    problem = Problem(
        space=space,
        geometry=NetworkGeometry.from_json(baseline["geometry"]),
        scores={name: [np.array(s) for s in scores] for name, scores in baseline["scores"].items()},
        losses=[np.array(losses) for losses in baseline["losses"]],
    )
    return Comparison(root.resolve(), pool, settings, dataset, baseline, problem)


def run_ours(comparison: Comparison, seed: int) -> list[TrialRecord]:
    """The product, as a person starts it; goes on where it was interrupted."""
    folder = comparison.cell(OURS, seed)
    config = build_config(comparison.run_settings(seed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.yaml"
    config.save(file)
    command = [sys.executable, "-m", "paretoprune", "search", config.model.path, config.data.path]
    subprocess.run([*command, "--config", str(file), "--run", str(folder)], check=True)
    return RunFolder(folder).read_records()


def run_rival(comparison: Comparison, searcher: str, seed: int) -> list[TrialRecord]:
    """A rival's trials, two at a time, told in the order in which they end."""
    from paretoprune.search.storage.request import TrialRequest, trial_name

    folder = RunFolder(comparison.cell(searcher, seed))
    rival = RIVALS[searcher](comparison.problem, comparison.settings.trials, seed)
    known = {record.trial_id: record for record in _records_in(folder)}
    running: dict[Future[None], tuple[str, Any]] = {}
    records, number, more = [], 0, True
    settings, ms = comparison.run_settings(seed), float(comparison.baseline["metrics"]["latency_ms"])
    while more or running:
        while more and len(running) < comparison.settings.slots:
            levels = rival.ask() if number < comparison.settings.trials else None
            more = levels is not None
            if levels is None:
                break
            name, ratios = trial_name(number), comparison.problem.space.plan(levels).ratios
            number += 1
            if name in known and known[name].ratios == ratios:
                records.append(known[name])
                _tell(comparison, rival, levels, known[name])
                continue
            TrialRequest(trial_id=name, ratios=ratios, provenance=searcher).save(folder)
            work = comparison.pool.submit(work_on_plan, settings, name, ratios, folder.trial_dir(name), ms)
            running[work] = (name, levels)
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            name, levels = running.pop(future)
            future.result()
            records.append(_record(folder, name))
            _tell(comparison, rival, levels, records[-1])
    return records


def _tell(comparison: Comparison, rival: Any, levels: Any, record: TrialRecord) -> None:
    if record.state is TrialState.COMPLETED:
        rival.tell(levels, {"map50_95": float(record.metrics["map50_95"]), "cost": comparison.cost(record)})


def _record(folder: RunFolder, name: str) -> TrialRecord:
    text = (folder.trial_dir(name) / "record.json").read_text(encoding="utf-8")
    return TrialRecord.from_json(json.loads(text))


def _records_in(folder: RunFolder) -> list[TrialRecord]:
    return [_record(folder, path.parent.name) for path in sorted(folder.trials_dir.glob("*/record.json"))]


def run_cell(comparison: Comparison, searcher: str, seed: int) -> dict[str, Any]:
    """All of one cell: trials, picks at each part of the budget, their full fine-tuning; a row for each part."""
    began = time.monotonic()
    records = run_ours(comparison, seed) if searcher == OURS else run_rival(comparison, searcher, seed)
    records.sort(key=lambda record: record.finished_at)
    settings, cost = comparison.settings, comparison.cost
    chosen = {part: picks_of(_until(records, part * settings.budget), settings.picks, cost) for part in PARTS}
    full = _fine_tuned(comparison, searcher, seed, {r.trial_id: r for picks in chosen.values() for r in picks})
    rows = []
    for part, picks in chosen.items():
        points = [(full[pick.trial_id], cost(pick)) for pick in picks]
        row = {"part": round(part, 3), "epochs": _epochs(_until(records, part * settings.budget))}
        rows.append({**row, "hypervolume": volume(points), "front": points})
    minutes = (time.monotonic() - began) / 60
    worked = sum(sum(record.seconds.values()) for record in records) / 60
    return {
        "searcher": searcher,
        "seed": seed,
        "rows": rows,
        "trials": len(records),
        "trial_minutes": round(worked, 2),
        "minutes": round(minutes, 2),
    }


def _fine_tuned(comparison: Comparison, searcher: str, seed: int, picks: Mapping[str, TrialRecord]) -> dict[str, float]:
    """Accuracy of every pick after the full fine-tuning, by trial id."""
    folder = RunFolder(comparison.cell(searcher, seed))
    settings = comparison.run_settings(seed)
    files = {name: folder.trial_dir(name) / "full.json" for name in picks}
    running = {
        name: comparison.pool.submit(work_on_pick, settings, folder.trial_checkpoint(name), folder.trial_dir(name))
        for name, file in files.items() if not file.is_file()
    }  # fmt: skip
    for name, future in running.items():
        write_json(files[name], future.result())
    return {name: float(json.loads(file.read_text(encoding="utf-8"))["map50_95"]) for name, file in files.items()}


def _until(records: Sequence[TrialRecord], epochs: float) -> list[TrialRecord]:
    """The first trials that together spent at most `epochs`."""
    spent = np.cumsum([record.epochs for record in records])
    return [record for record, total in zip(records, spent, strict=True) if total <= epochs + 1e-9]


def _epochs(records: Iterable[TrialRecord]) -> int:
    return sum(record.epochs for record in records)


def volume(points: Sequence[tuple[float, float]]) -> float:
    """Hypervolume of (accuracy, cost) beyond accuracy 0 and cost 1."""
    if not points:
        return 0.0
    return hypervolume(np.array([[-accuracy, cost] for accuracy, cost in points]), np.array([0.0, 1.0]))


def picks_of(records: Sequence[TrialRecord], count: int, cost: Callable[[TrialRecord], float]) -> list[TrialRecord]:
    """The `count` completed trials whose own points have the most hypervolume together: the same rule for all."""
    completed = [record for record in records if record.state is TrialState.COMPLETED]
    if not completed:
        return []
    points = [(float(record.metrics["map50_95"]), cost(record)) for record in completed]
    front = np.flatnonzero(non_dominated(np.array([[-accuracy, spent] for accuracy, spent in points])))
    sets = combinations(front.tolist(), min(count, len(front)))
    best = max(sets, key=lambda chosen: volume([points[i] for i in chosen]))
    return [completed[i] for i in best]
