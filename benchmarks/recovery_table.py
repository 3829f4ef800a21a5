"""Tables of the recovery benchmark from its cells; what is not measured yet is an empty cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.recovery_store import Cell, Store
from paretoprune.pruning.names import RECOVERIES

_SHOWN = ("cpu_model", "cpu_usable", "python", "torch", "ultralytics")


def markdown(store: Store, unmeasured: Mapping[str, tuple[int, int]]) -> str:
    """The whole report; `unmeasured`: by section, missing cells and how many there are to be."""
    environment = store.content["environment"]
    shown = ", ".join(f"{key} {environment[key]}" for key in _SHOWN if key in environment)
    left = [f"{missing} of {count} cells of `{section}`" for section, (missing, count) in unmeasured.items()]
    commits = sorted({c["commit"] for c in store.cells})
    lines = [
        "# Removal and recovery",
        "",
        f"{', '.join(sorted({c['date'] for c in store.cells}))}; commits {', '.join(commits)}; "
        f"no GPU; the last run's environment: {shown}. Not measured in one run: cells are of these dates and commits "
        "and, where a cell has no `cpu`, of an AMD EPYC or an Intel Xeon. "
        "mAP50-95 on the validation split, 320 px (demo data: 160 px). Written by `python -m benchmarks.recovery`; "
        "every cell with its date and commit is in recovery.json. An empty cell is not measured.",
        "",
        f"Not measured yet: {', '.join(left)}." if left else "All cells are measured.",
        "",
    ]
    for section in (_speed, _aimed, _before, _seeds, _full, _epochs, _ranks, _cost):
        lines += section(store)
    if store.content["notes"]:
        lines += ["## What was tried, and what did not win", "", *(f"- {note}" for note in store.content["notes"]), ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    shown = [["" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *shown]] + [""]


def _unique(cells: Iterable[Cell], name: str) -> list[Any]:
    return list(dict.fromkeys(c[name] for c in cells if name in c))


def _speed(store: Store) -> list[str]:
    rows = [
        (c["model"], c["plan"], c["macs_share"], c["params_m"], f"{c['speedup']:.2f}", _interval(c["speedup_ci95"]))
        for c in sorted(store.find(section="speed"), key=lambda c: (c["model"], c["plan"]))
    ]
    head = ("model", "plan", "share of the multiply-adds", "parameters, M", "speed-up", "95 % interval")
    text = "Paired with the unpruned network, batch 1, one thread. Which channels go does not matter to the speed."
    return ["## The plans and their speed", "", text, "", *table(head, rows)] if rows else []


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _aimed(store: Store) -> list[str]:
    rows = []
    for c in sorted(store.find(section="before"), key=lambda c: (c["model"], c["plan"])):
        if c["plan"].startswith("aimed"):
            speed = store.value("speedup", section="speed", model=c["model"], plan=c["plan"])
            unpruned = store.value("map50_95", section="before", model=c["model"], plan="unpruned")
            rows.append((c["model"], c["plan"].removeprefix("aimed "), speed, unpruned, c["map50_95"]))
    head = ("model", "fewer multiply-adds", "speed-up", "unpruned", "after removal and refit")
    text = "The product's defaults, widths by sensitivity, no gradient step."
    return ["## At the aimed sizes, before any gradient step", "", text, "", *table(head, rows)] if rows else []


def _before(store: Store) -> list[str]:
    lines = []
    for model in _unique(store.find(section="before"), "model"):
        unpruned = store.value("map50_95", section="before", model=model, plan="unpruned")
        lines += [f"## Before any gradient step: {model} (unpruned {unpruned or float('nan'):.3f})", ""]
        cells = list(store.find(section="before", model=model))
        recoveries = [how for how in RECOVERIES if how in _unique(cells, "recovery")]
        for kind in ("uniform", "sensitivity"):
            plans = sorted(p for p in _unique(cells, "plan") if p.startswith(kind))
            if not plans:
                continue
            words = "one ratio for all layers" if kind == "uniform" else "widths by sensitivity"
            shares = {p: store.value("macs_share", section="before", model=model, plan=p) for p in plans}
            fewer = ", ".join(f"{p.removeprefix(kind + ' ')}: {100 * (1 - s):.1f} %" for p, s in shares.items())
            lines += [f"{words.capitalize()}; multiply-adds removed, as planned and as realised: {fewer}.", ""]
            head = ["criterion", *(f"{p.removeprefix(kind + ' ')} {r}" for p in plans for r in recoveries)]
            rows = []
            for criterion in _unique((c for c in cells if c["plan"] in plans), "criterion"):
                known = {(c["plan"], c["recovery"]): c["map50_95"] for c in cells if c.get("criterion") == criterion}
                rows.append([criterion, *(known.get((p, r)) for p in plans for r in recoveries)])
            lines += table(head, rows)
    return lines


def _seeds(store: Store) -> list[str]:
    rows = []
    for plan in sorted(_unique(store.find(section="seeds"), "plan")):
        found = sorted((c["seed"], c["map50_95"]) for c in store.find(section="seeds", plan=plan))
        values = [value for _, value in found]
        speed = store.value("speedup", section="speed", model="bccd", plan=plan)
        rows.append((plan.removeprefix("aimed "), speed, ", ".join(f"{v:.3f}" for v in values), spread(values)))
    head = ("fewer multiply-adds", "speed-up of seed 0's plan", "mAP50-95 by seed", "mean, standard deviation")
    text = (
        "The product's defaults, no gradient step; the seed chooses the calibration images, and so widths and channels."
    )
    return ["## Other calibration images, bccd", "", text, "", *table(head, rows)] if rows else []


def _full(store: Store) -> list[str]:
    rows = []
    for c in store.find(section="full"):
        speed = store.value("speedup", section="speed", model="bccd", plan=c["plan"])
        rows.append((c["plan"], speed, c["start"], c["start_map50_95"], c["epochs"], c["map50_95"], c["last"]))
    head = ("plan", "speed-up", "start", "before", "epochs", "mAP50-95", "of the last epoch")
    text = (
        "Unpruned 0.612, from 12 epochs of training; trained on alike it gains, too (README.md). mAP50-95 "
        "is that of the best epoch by the validation images that it is measured on. One seed."
    )
    return ["## After full fine-tuning, bccd", "", text, "", *table(head, rows)] if rows else []


def _epochs(store: Store) -> list[str]:
    cells = list(store.find(section="epochs"))
    if not cells:
        return []
    counts = sorted(_unique(cells, "epochs"))
    rows = []
    for arm in _unique(cells, "arm"):
        for start in _unique((c for c in cells if c["arm"] == arm), "start"):
            per = [list(store.find(section="epochs", arm=arm, start=start, epochs=n)) for n in counts]
            begin = next(c["start_map50_95"] for p in per for c in p)
            rows.append([arm, start, begin, *(spread([c.get("epochs_alone", c["map50_95"]) for c in p]) for p in per)])
    text = (
        "Widths by sensitivity, 50 % fewer multiply-adds, channels by reconstruction. "
        "Mean and standard deviation over the seeds (their number in "
        "brackets) of the best epoch's averaged network; the start is not counted as a candidate here, in the product "
        "it is."
    )
    head = ["arm", "start", "mAP50-95 of the start", *(f"{n} epoch{'s' * (n > 1)}" for n in counts)]
    return ["## Few epochs, one ingredient changed, bccd", "", text, "", *table(head, rows)]


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation} ({len(values)})"


def _ranks(store: Store) -> list[str]:
    truth = {c["plan"]: c["map50_95"] for c in store.find(section="ranks", way="full")}
    rows = []
    for way in _unique(store.find(section="ranks"), "way"):
        for count in sorted(_unique(store.find(section="ranks", way=way), "epochs")):
            score = {c["plan"]: c["map50_95"] for c in store.find(section="ranks", way=way, epochs=count)}
            plans = sorted(score.keys() & truth.keys())
            if way == "full" or len(plans) < 3:
                continue
            scores = [score[p] for p in plans]
            found = kendall_tau(scores, [truth[p] for p in plans])
            low, high = bootstrap_tau(scores, [truth[p] for p in plans])
            rows.append((way, count, len(plans), found, f"{low:.2f} to {high:.2f}", f"{np.mean(scores):.3f}"))
    if not rows:
        return []
    full_epochs = store.value("epochs", section="ranks", way="full")
    shares = [c["macs_share"] for c in store.find(section="ranks", way="full")]
    text = (
        f"{len(truth)} random plans that keep {min(shares):.2f} to {max(shares):.2f} of the multiply-adds, demo data "
        f"with 300 training images, full: {full_epochs} epochs; "
        f"after full fine-tuning {min(truth.values()):.3f} to {max(truth.values()):.3f}. 'plain': L2, plain removal, "
        "Ultralytics' default training; 'ours': the product's criterion, refit and short fine-tuning. Tau-b; interval "
        "from resampling the plans."
    )
    head = ("recovery", "epochs", "plans", "Kendall's tau", "95 % interval", "mean mAP50-95")
    return ["## Rank fidelity: a trial's score against the fully fine-tuned one", "", text, "", *table(head, rows)]


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Tau-b in [-1, 1]; 0 where one side is constant (it ranks nothing)."""
    from scipy.stats import kendalltau

    found = float(kendalltau(a, b).statistic)
    return 0.0 if np.isnan(found) else found


def bootstrap_tau(a: Sequence[float], b: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """2.5 and 97.5 % points of tau over plans drawn with replacement."""
    rng, x, y = np.random.default_rng(0), np.asarray(a), np.asarray(b)
    taus = [kendall_tau(x[i], y[i]) for i in (rng.integers(0, len(x), len(x)) for _ in range(draws))]
    low, high = np.percentile(taus, [2.5, 97.5])
    return float(low), float(high)


def _cost(store: Store) -> list[str]:
    rows = [
        (c["plan"], f"{c['refit_seconds']:.1f}", f"{c['epoch_seconds']:.1f}", c["refit_seconds"] / c["epoch_seconds"])
        for c in store.find(section="cost")
    ]
    head = ("plan", "one refit, s", "one fine-tuning epoch with its validation, s", "refit / epoch")
    return ["## What a refit costs, bccd", "", *table(head, rows)] if rows else []
