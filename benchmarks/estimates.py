"""Searchers on a real network, judged right after recovery: what they have of the front after so many trials.

Usage: python -m benchmarks.estimates RUN --known FILE [--trials 24] [--seeds 3] [--searchers gp,tpe] [--minutes M]

RUN is a folder of `paretoprune search --epochs 0`, whose model, dataset, scores, first plans are used; all
searchers begin with these. One trial at a time: a plan is cut, refitted and validated; its cost is its multiply-adds,
which do not depend on the machine. What a plan gave is kept in FILE, so that the same command goes on, and no plan is
evaluated twice. `gp-without-estimates` is `gp` without the estimated losses and without the path among its candidates.

Figures: the hypervolume (accuracy above 0, multiply-adds below the unpruned model's) over the box of the unpruned
model's two; the same with accuracy above three quarters of the unpruned model's; the share of its multiply-adds that
the smallest plan within 0.02 of its accuracy has; the best accuracy with at most 0.4, 0.5 and 0.7 of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from paretoprune.base.atomic import write_json
from paretoprune.pruning.device import NullGate
from paretoprune.pruning.yolo.image_size import stride_of
from paretoprune.results.selection.pareto import hypervolume
from paretoprune.results.store.accuracy import accuracy_name
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import load_config
from paretoprune.search.samplers.observations import Observation
from paretoprune.search.samplers.prior import Prior
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.samplers.warm_start import warm_start
from paretoprune.search.space.space import Levels, Space, build_space, image_sizes
from paretoprune.search.trial.operations import PruningOperations

PLAIN = "gp-without-estimates"
SEARCHERS = ("gp", PLAIN, "optuna-gp", "tpe", "nsga2", "random")
OBJECTIVES = {"accuracy": "max", "gflops": "min"}
CHECKPOINTS = (6, 12, 18, 24, 40)
SHARES = (0.4, 0.5, 0.7)


class Judge:
    """Accuracy and multiply-adds of plans, each once."""

    def __init__(self, run: RunFolder, known: Path) -> None:
        config = load_config(run.config)
        self._tools = PruningOperations(config, "cpu", NullGate())
        self._tools.recall_scores(run.path)
        bench, sizes = self._tools._bench, config.space.imgsz
        wanted = image_sizes(config.model.imgsz, sizes, stride_of(bench.model))
        self.space: Space = build_space(bench.table, config.space, sizes=wanted, branches=bench.branches)
        self._file = known
        self._known: dict[str, list[float]] = json.loads(known.read_text()) if known.is_file() else {}

    def __call__(self, levels: Levels) -> dict[str, float]:
        plan = self.space.plan(levels)
        if plan.hash not in self._known:
            its, model = self._tools.at(plan.imgsz), self._tools.baseline
            if plan.ratios or plan.branches:
                model, plan_applied = its.prune(plan)
                its.recover(model, plan_applied)
            metrics = its.evaluate(model)
            self._known[plan.hash] = [metrics[accuracy_name(metrics)], its.stats(model)["gflops"]]
            self._tools.release()
            write_json(self._file, self._known)
        return dict(zip(OBJECTIVES, self._known[plan.hash], strict=True))


def course(judge: Judge, baseline: dict[str, Any], searcher: str, seed: int, trials: int) -> list[dict[str, float]]:
    """What the trials of one search gave, in their order."""
    space = judge.space
    prior = Prior.of(space, baseline) if searcher == "gp" else None
    name = "gp" if searcher == PLAIN else searcher
    study = SearchStudy(space, OBJECTIVES, name, seed, warm_start(space, trials, baseline["sensitivity"]), prior=prior)
    whole = space.uniform(0.0)
    for size in range(max(1, len(space.image_sizes))):
        move = (*whole[:-1], size) if space.image_sizes else whole
        study.replay(move, Observation(judge(move)), f"unpruned {size}")
    found = []
    for _ in range(trials):
        suggestion = study.ask()
        assert suggestion is not None
        found.append(judge(suggestion.levels))
        study.tell(suggestion.number, Observation(found[-1]))
    return found


def figures(found: list[dict[str, float]], unpruned: dict[str, float]) -> list[float]:
    """The two hypervolumes over their boxes, the share of the work within 0.02, the best accuracy within `SHARES`."""
    losses, (top, work) = np.array([[-row["accuracy"], row["gflops"]] for row in found]), unpruned.values()
    volumes = [hypervolume(losses, np.array([-low * top, work])) / ((1 - low) * top * work) for low in (0.0, 0.75)]
    within = min((r["gflops"] for r in found if r["accuracy"] >= top - 0.02), default=work) / work
    best = [
        max((r["accuracy"] for r in found if r["gflops"] <= share * unpruned["gflops"]), default=0.0)
        for share in SHARES
    ]
    return [*volumes, within, *best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--known", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--searchers", default=",".join(SEARCHERS))
    parser.add_argument("--minutes", type=float, default=600, help="No further search is begun after these.")
    options = parser.parse_args()
    folder, began = RunFolder(options.run), time.monotonic()
    judge, baseline = Judge(folder, options.known), folder.read_baseline()
    unpruned = judge(judge.space.uniform(0.0))
    rows: dict[str, list[list[list[float]]]] = {}
    for seed in range(options.seeds):
        for searcher in options.searchers.split(","):
            if time.monotonic() - began < 60 * options.minutes:
                found = course(judge, baseline, searcher, seed, options.trials)
                at = [figures(found[:count], unpruned) for count in CHECKPOINTS if count <= options.trials]
                rows.setdefault(searcher, []).append(at)
                line = f"{searcher} seed {seed}: {[[round(value, 3) for value in row[:3]] for row in at]}"
                print(line, file=sys.stderr, flush=True)
    counts = [count for count in CHECKPOINTS if count <= options.trials]
    print(f"Unpruned: {unpruned['accuracy']:.3f}, {unpruned['gflops']:.2f} GFLOPs.\n")
    names = ("hypervolume", "hypervolume above 3/4", "work within 0.02")
    heads = [f"{name}, {count} trials" for name in names for count in counts] + [f"best at {share}" for share in SHARES]
    print(f"| searcher | seeds | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 2)}")
    for searcher, courses in rows.items():
        cells = [[course[k][n] for course in courses] for n in range(len(names)) for k in range(len(counts))]
        cells += [[course[-1][len(names) + k] for course in courses] for k in range(len(SHARES))]
        texts = [f"{mean(cell):.3f} ({min(cell):.3f})" for cell in cells]
        print(f"| {searcher} | {len(courses)} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
