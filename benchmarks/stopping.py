"""Stopping and what stopped trials tell the sampler, on the problem with the known front.

``python -m benchmarks.stopping [--seeds N] [--epochs E] --json OUT``: trials cost what an epoch takes for removal,
refit, measuring and validation, and one for each epoch. Only trials that went to their end count on the front. Ways:
``none`` (nobody is stopped), ``estimate`` (a stopped trial is told as what it would have reached), ``silence`` (nothing
is told of it), ``low`` (its figure at the rung told as final).
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.surgery import commit
from benchmarks.synthetic import SyntheticProblem, accuracy_of, exact_front, make_problem
from paretoprune.base.atomic import write_json, write_text
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.samplers.observations import Observation, ObservationBuilder
from paretoprune.search.samplers.study import SearchStudy, Suggestion
from paretoprune.search.samplers.warm_start import warm_start
from paretoprune.search.space.space import Levels
from paretoprune.search.stopping.rule import StoppingRule, rungs_of
from paretoprune.search.stopping.rungs import RungReport

WAYS = ("none", "estimate", "silence", "low")
IN_FLIGHT = 8
BUDGETS = (50, 100, 200, 400)
OBJECTIVES = {"map50_95": "max", "latency_ms": "min"}
RESULTS = Path(__file__).parent / "results"


@dataclass
class Course:
    """A pretended trial: its curve by epoch, what it told, and how far it is."""

    suggestion: Suggestion
    curve: list[float]
    latency_ms: float
    epochs: int = 0

    def record(self, state: TrialState) -> TrialRecord:
        """As the worker would write it."""
        history = [{"epochs": epoch, "map50_95": self.curve[epoch]} for epoch in range(self.epochs + 1)]
        best = max(self.curve[: self.epochs + 1])
        return TrialRecord(
            trial_id=f"t{self.suggestion.number}", state=state, plan_hash="", ratios={}, epochs=self.epochs,
            metrics={"map50_95": best, "latency_ms": self.latency_ms}, fidelity="epochs" if self.epochs else "refit",
            finished_at=0.0, history=history,
        )  # fmt: skip


@dataclass
class Campaign:
    """One search with one way of stopping."""

    problem: SyntheticProblem
    way: str
    epochs: int
    seed: int
    records: list[TrialRecord] = field(default_factory=list)
    reports: list[RungReport] = field(default_factory=list)
    finished: list[tuple[float, Levels]] = field(default_factory=list)
    stopped: int = 0

    def __post_init__(self) -> None:
        starts = warm_start(self.problem.space, 100)
        self.random = np.random.default_rng(self.seed)
        self.study = SearchStudy(self.problem.space, OBJECTIVES, "gp", self.seed, starts)
        self.teller = ObservationBuilder(tuple(OBJECTIVES))
        self.rule = StoppingRule()
        self.rungs = rungs_of(self.epochs, self.rule.reduction)

    def run(self, budget: float) -> None:
        """Until ``budget`` epochs were spent by all trials together."""
        spent, order = 0.0, 0
        queue: list[tuple[float, int, Course]] = []
        now = 0.0
        while spent < budget:
            while len(queue) < IN_FLIGHT:
                order += 1
                heapq.heappush(queue, (now + self.random.uniform(0.8, 1.2), order, self._begun()))
            now, _, course = heapq.heappop(queue)
            spent += 1.0
            if not self._ended(course, spent):
                course.epochs += 1
                order += 1
                heapq.heappush(queue, (now + self.random.uniform(0.9, 1.1), order, course))

    def share(self, front: np.ndarray[Any, np.dtype[np.float64]], budget: float) -> float:
        """Share of the front's hypervolume by trials that had come to their end when ``budget`` epochs were spent."""
        return self.problem.share([levels for spent, levels in self.finished if spent <= budget], front)

    def _begun(self) -> Course:
        suggestion = self.study.ask()
        assert suggestion is not None
        accuracy, latency = self.problem.truth(suggestion.levels)
        loss = 2.0 * (0.6 / accuracy - 1.0) ** (1.0 / 1.5)
        # Removal costs half as much again as what training leaves, and not alike for all plans.
        start = accuracy_of(1.5 * loss * float(self.random.lognormal(0.0, 0.15)))
        shares = (1.0 - np.exp(-2.0 * np.arange(self.epochs + 1) / self.epochs)) / (1.0 - np.exp(-2.0))
        curve = start + (accuracy - start) * shares + self.random.normal(0.0, self.problem.accuracy_noise, len(shares))
        measured = latency * (1.0 + self.random.normal(0.0, self.problem.latency_noise))
        return Course(suggestion, [max(0.0, float(value)) for value in curve], float(measured))

    def _ended(self, course: Course, spent: float) -> bool:
        """Whether the trial ends after the epoch that it has just done; then it is told."""
        if course.epochs == self.epochs:
            record = course.record(TrialState.COMPLETED)
            self.finished.append((spent, course.suggestion.levels))
        elif course.epochs in self.rungs and self.way != "none":
            costs = {"latency_ms": course.latency_ms}
            report = RungReport(
                f"t{course.suggestion.number}", course.epochs, max(course.curve[: course.epochs + 1]), costs
            )
            self.reports.append(report)
            if not self.rule.stops(report, self.reports):
                return False
            self.stopped += 1
            record = course.record(TrialState.STOPPED)
        else:
            return False
        self.records.append(record)
        self.teller.learn(record)
        low = record.state is TrialState.STOPPED and self.way == "low"
        told = Observation(record.metrics) if low else self.teller.told(record)
        if told is None or (record.state is TrialState.STOPPED and self.way == "silence"):
            self.study.fail(course.suggestion.number, "stopped")
        else:
            self.study.tell(course.suggestion.number, told)
        return True


def rows_of(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """One row a way, a seed and a budget."""
    rows = []
    for seed in range(seeds):
        problem = make_problem(seed=seed)
        front = exact_front(problem)
        for way in WAYS:
            campaign = Campaign(problem, way, epochs, seed)
            campaign.run(max(BUDGETS))
            counts = {"completed": len(campaign.finished), "stopped": campaign.stopped}
            rows += [
                {"way": way, "seed": seed, "epochs_spent": budget,
                 "hv_ratio": round(campaign.share(front, budget), 4), **counts}
                for budget in BUDGETS
            ]  # fmt: skip
    return rows


def markdown(content: dict[str, Any]) -> str:
    """The result as a page."""
    rows = content["rows"]
    lines = [
        "# Stopping on the problem with the known front",
        "",
        f"{content['date']}, commit {content['commit']}. Trials of {content['epochs']} epochs, {IN_FLIGHT} in flight, "
        f"{content['seeds']} seeds; share of the front's hypervolume by trials that went to their end, after so many "
        "epochs in all (the refit counts as one): mean (least). Written by `python -m benchmarks.stopping`.",
        "",
        f"| way | {' | '.join(map(str, BUDGETS))} | completed | stopped |",
        "|---|" + "---|" * (len(BUDGETS) + 2),
    ]
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        shares = [[row["hv_ratio"] for row in own if row["epochs_spent"] == budget] for budget in BUDGETS]
        cells = [f"{mean(values):.2f} ({min(values):.2f})" for values in shares]
        counts = [f"{mean(row[name] for row in own):.0f}" for name in ("completed", "stopped")]
        lines.append(f"| {way} | {' | '.join([*cells, *counts])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, print the table, write JSON and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="Of a trial.")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    options = parser.parse_args()
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(), "seeds": options.seeds,
        "epochs": options.epochs, "rows": rows_of(options.seeds, options.epochs),
    }  # fmt: skip
    write_json(options.json, content)
    page = markdown(content)
    print(page)
    if options.json.resolve().parent == RESULTS:
        write_text(options.json.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
