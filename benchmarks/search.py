"""Searchers side by side.

``python -m benchmarks.search --synthetic [--seeds N] [--trials N] [--searchers a,b] --json OUT``
``python -m benchmarks.search --real [--seeds N] [--searchers a,b] [--work DIR] [--cells N] --json OUT``

Synthetic: the problem of :mod:`benchmarks.synthetic`, another one for every seed, eight trials in flight that end in a
random order. A row says which share of the exact front's hypervolume the plans tried so far have, by their values
without noise: of all, and of what lies above three quarters of the unpruned accuracy. A warm start is what a run knows
before its first trial: the unpruned model at every size, six plans by sensitivity and, to ``gp`` alone, the estimated
losses. ``ray-optuna-tpe`` is Ray's own OptunaSearch with Optuna's TPE as people use it, without any of ours.
Finished courses in OUT are not run again, so that an interrupted benchmark goes on.

Real: ours and what people do instead, on the demo data: see :mod:`benchmarks.real_search` and its table in
:mod:`benchmarks.real_table`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np

if not __package__:  # run as a file: its own folder comes first then, where `benchmarks` is not found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.surgery import commit
from benchmarks.synthetic import SIZES, SyntheticProblem, exact_front, make_problem
from paretoprune.base.atomic import write_json, write_text
from paretoprune.search.samplers.observations import Observation
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.samplers.warm_start import warm_start
from paretoprune.search.space.space import Levels

IN_FLIGHT = 8
CHECKPOINTS = (6, 12, 25, 50, 100, 200)
OBJECTIVES = {"map50_95": "max", "latency_ms": "min"}
PLAIN = "gp-without-estimates"
SEARCHERS = ("gp", PLAIN, "tpe", "nsga2", "random", "ray-optuna-tpe")
SLOW = ("optuna-gp",)
"""Named only on demand: some seconds a suggestion."""
RESULTS = Path(__file__).parent / "results"


class Asker(Protocol):
    """Anything that proposes plans and is told how they went."""

    def ask(self, number: int) -> Levels: ...
    def tell(self, number: int, metrics: dict[str, float]) -> None: ...


class OurStudy:
    """:class:`search.samplers.study.SearchStudy`, as the sweep uses it."""

    def __init__(self, problem: SyntheticProblem, sampler: str, seed: int, trials: int, warm: bool) -> None:
        starts = warm_start(problem.space, trials, problem.sensitivity) if warm else []
        prior = problem.prior if sampler == "gp" and warm else None
        name = "gp" if sampler == PLAIN else sampler
        self._study = SearchStudy(problem.space, OBJECTIVES, name, seed, starts, prior=prior)
        self._numbers: dict[int, int] = {}
        if warm:
            whole, random = problem.space.uniform(0.0), np.random.default_rng(seed)
            for size in range(len(SIZES)):  # the unpruned model and the free moves
                move = (*whole[:-1], size)
                self._study.replay(move, Observation(problem.observe(move, random)), f"unpruned@{SIZES[size]}")

    def ask(self, number: int) -> Levels:
        """The study's next plan."""
        suggestion = self._study.ask()
        assert suggestion is not None, "the space is far larger than any number of trials"
        self._numbers[number] = suggestion.number
        return suggestion.levels

    def tell(self, number: int, metrics: dict[str, float]) -> None:
        """Its result."""
        self._study.tell(self._numbers[number], Observation(metrics))


class RayOptuna:
    """``ray.tune.search.optuna.OptunaSearch`` over the same levels."""

    def __init__(self, problem: SyntheticProblem, seed: int) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._axes = [axis.name for axis in problem.space.axes]
        space = {name: optuna.distributions.IntDistribution(0, size - 1) for name, size in problem.space.sizes.items()}
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._search = OptunaSearch(space, metric=list(OBJECTIVES), mode=list(OBJECTIVES.values()), sampler=sampler)

    def ask(self, number: int) -> Levels:
        """Its next configuration."""
        chosen = self._search.suggest(str(number))
        return tuple(int(chosen[name]) for name in self._axes)

    def tell(self, number: int, metrics: dict[str, float]) -> None:
        """Its result."""
        self._search.on_trial_complete(str(number), result=metrics)


def make_asker(name: str, problem: SyntheticProblem, seed: int, trials: int, warm: bool) -> Asker:
    """A searcher by its name in the table."""
    if name == "ray-optuna-tpe":
        return RayOptuna(problem, seed)
    return OurStudy(problem, name, seed, trials, warm)


def run_course(asker: Asker, problem: SyntheticProblem, trials: int, seed: int) -> tuple[list[Levels], float]:
    """``trials`` plans in the order in which they ended, and the CPU seconds of one suggestion."""
    random = np.random.default_rng(seed)
    flying: list[tuple[float, int, Levels]] = []
    done: list[Levels] = []
    asked, thinking = 0, 0.0
    while len(done) < trials:
        while len(flying) < IN_FLIGHT and asked < trials:
            began = time.process_time()
            levels = asker.ask(asked)
            thinking += time.process_time() - began
            flying.append((len(done) / IN_FLIGHT + random.exponential(), asked, levels))
            asked += 1
        flying.sort()
        _, number, levels = flying.pop(0)
        asker.tell(number, problem.observe(levels, random))
        done.append(levels)
    return done, thinking / trials


def synthetic(
    searchers: Iterable[str], seeds: int, trials: int, layers: int, noise: float, tile: int,
    known: list[dict[str, Any]], keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all courses; ``known`` ones are taken over, ``keep`` is called after every new one."""
    rows = list(known)
    had = {(row["searcher"], row["warm_start"], row["seed"]) for row in rows}
    for name in searchers:
        for warm in {"ray-optuna-tpe": (False,), PLAIN: (True,)}.get(name, (False, True)):
            for seed in range(seeds):
                if (name, warm, seed) in had:
                    continue
                problem = make_problem(layers, seed, noise, tile)
                front = exact_front(problem)
                asker = make_asker(name, problem, seed, trials, warm)
                plans, thinking = run_course(asker, problem, trials, seed)
                course = {"searcher": name, "warm_start": warm, "seed": seed}
                rows += [
                    {**course, "trials": count, "hv_ratio": round(problem.share(plans[:count], front), 4),
                     "useful_hv_ratio": round(problem.share(plans[:count], front, 0.75), 4),
                     "suggestion_s": round(thinking, 4)}
                    for count in CHECKPOINTS if count <= trials
                ]  # fmt: skip
                keep(rows)
                shares = [row["hv_ratio"] for row in rows if row.items() >= course.items()]
                print(f"{name} warm={warm} seed={seed}: {shares}", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]], value: str = "hv_ratio") -> list[str]:
    """Mean (least) share by searcher and number of trials."""
    counts = sorted({row["trials"] for row in rows})
    lines = [f"| searcher | warm start | seeds | {' | '.join(map(str, counts))} | CPU s a suggestion |"]
    lines.append("|---|---|---|" + "---|" * (len(counts) + 1))
    for name, warm in dict.fromkeys((row["searcher"], row["warm_start"]) for row in rows):
        own = [row for row in rows if (row["searcher"], row["warm_start"]) == (name, warm)]
        cells = []
        for count in counts:
            shares = [row[value] for row in own if row["trials"] == count]
            cells.append(f"{mean(shares):.2f} ({min(shares):.2f})" if shares else "")
        seeds = len({row["seed"] for row in own})
        thinking = mean(row["suggestion_s"] for row in own)
        lines.append(f"| {name} | {'yes' if warm else 'no'} | {seeds} | {' | '.join(cells)} | {thinking:.3f} |")
    return lines


def markdown(content: dict[str, Any]) -> str:
    """The result as a page."""
    settings = content["settings"]
    return "\n".join(
        [
            "# Searchers on a problem with a known front",
            "",
            f"{content['date']}, commit {content['commit']}. {settings['layers']} ratios, {IN_FLIGHT} trials in "
            f"flight, noise {0.006 * settings['noise']:.3g} mAP and {settings['noise']:.3g} % of latency (standard "
            f"deviations), latency in tiles of {settings['tile']} channels; another problem for every seed. Share of "
            "the exact front's hypervolume after so many trials: mean (least of the seeds). Written by "
            "`python -m benchmarks.search --synthetic`.",
            "",
            *table(content["rows"]),
            "",
            "The same of what lies above three quarters of the unpruned accuracy, where people choose:",
            "",
            *table(content["rows"], "useful_hv_ratio"),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, write JSON and, for the results folder, the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", action="store_true", help="The problem with the known front.")
    parser.add_argument("--real", action="store_true", help="The demo data, with real trainings.")
    parser.add_argument("--work", type=Path, default=Path("runs") / "real_search", help="--real: where trials lie.")
    parser.add_argument("--cells", type=int, help="--real: end after so many new cells.")
    parser.add_argument("--seeds", type=int, help="Default: 5, and 3 for --real.")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--searchers", help=f"Of {', '.join((*SEARCHERS, *SLOW))}; --real has others.")
    parser.add_argument("--layers", type=int, default=24, help="Ratios of the problem.")
    parser.add_argument("--noise", type=float, default=1.0, help="Times 0.006 mAP and 1 %% of latency.")
    parser.add_argument("--tile", type=int, default=16, help="Channels in which latency moves.")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    options = parser.parse_args(arguments)
    if options.synthetic == options.real:
        parser.error("give --synthetic or --real")
    if options.real:
        from benchmarks.real_table import real

        return real(parser, options)
    options.seeds = options.seeds or 5
    options.searchers = options.searchers or ",".join(SEARCHERS)
    names = [name for name in options.searchers.split(",") if name]
    unknown = [name for name in names if name not in (*SEARCHERS, *SLOW)]
    if unknown:
        parser.error(f"--searchers: unknown {unknown[0]!r}; known are {', '.join((*SEARCHERS, *SLOW))}")
    settings = {key: getattr(options, key) for key in ("trials", "layers", "noise", "tile")}
    known = json.loads(options.json.read_text()) if options.json.is_file() else {}
    old = known.get("rows", []) if known.get("settings") == settings else []
    content: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(), "commit": commit(), "settings": settings, "rows": old,
    }  # fmt: skip

    def keep(rows: list[dict[str, Any]]) -> None:
        content["rows"] = rows
        write_json(options.json, content)

    keep(synthetic(names, options.seeds, *settings.values(), known=old, keep=keep))
    page = markdown(content)
    print(page)
    if options.json.resolve().parent == RESULTS:
        write_text(options.json.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
