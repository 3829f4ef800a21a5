"""Preview of a plan without writing anything: widths, parameters, GFLOPs, and the predicted latency.

Parameters and GFLOPs are exact: the plan is applied in memory. The latency comes from a model fitted on measured plans:
of a run, or of a short measuring pass over plans scattered about this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretoprune.base.image_size import size_text
from paretoprune.base.messages import Listener
from paretoprune.search.errors import SearchError

if TYPE_CHECKING:
    from paretoprune.pruning.graph.geometry import NetworkGeometry
    from paretoprune.pruning.latency.model import MeasuredPlan
    from paretoprune.pruning.plan import Plan

UNKNOWN = "unknown: only parameters and GFLOPs are; add --measure 12 (about a minute), or --run RUN of this model"
SECONDS_PER_PLAN = 3.0
_SCATTER = 0.1  # standard deviation of the ratios about their common strength
_BEYOND = 1.2  # times the plan's ratios: what the heaviest of the measured plans cuts
_GREATEST = 0.9


@dataclass(frozen=True)
class Measured:
    """Measured plans of one model at one size, the unpruned network's latency, and where they come from."""

    plans: tuple[MeasuredPlan, ...]
    baseline_ms: float
    source: str


def foretell(bench: Any, wanted: Any, measured: Measured | None) -> dict[str, Any]:
    """The row of `wanted` (ratios or a plan) on a :class:`pruning.workbench.Workbench`; latency from ``measured``.

    Keys as `paretoprune prune` prints them, the latency's among them (None where nothing is known), and `widths`: a
    row for each group that gets narrower.
    """
    from paretoprune.pruning.yolo.loading import model_stats

    pruned, plan = bench.prune(wanted)
    check_cuts(plan)
    before, after = model_stats(bench.model, bench.imgsz), model_stats(pruned, bench.imgsz)
    return {
        "layers_cut": len(plan.ratios),
        **({"branches_removed": list(plan.branches)} if plan.branches else {}),
        "params_m": after.params_m,
        "params_m_before": before.params_m,
        "gflops": after.gflops,
        "gflops_before": before.gflops,
        "size_mb": after.size_mb,
        **latency_row(bench.geometry, plan, measured),
        "widths": width_rows(bench.geometry, plan.ratios),
    }


def check_cuts(plan: Any) -> None:
    """A plan removes something; :class:`SearchError` where it does not."""
    if not plan.ratios and not plan.branches:
        raise SearchError("the plan rounds to no removed channel; use larger ratios or a smaller --round-to")


def latency_row(geometry: NetworkGeometry, plan: Plan, measured: Measured | None) -> dict[str, Any]:
    """The latency predicted for one plan, with its 95 % interval and the model's error over the measured plans."""
    names = (
        "latency_ratio", "latency_ratio_ci95", "speedup", "latency_ms", "latency_ms_before", "latency_error_median",
        "latency_error_p95", "latency_plans",
    )  # fmt: skip
    if measured is None:
        return {**dict.fromkeys(names), "latency_source": UNKNOWN}
    from paretoprune.pruning.latency.model import fit_latency_model

    model = fit_latency_model(geometry, measured.plans)
    found = model.predict([plan])
    ratio = float(found.ratio[0])
    values = (
        ratio, [float(found.low[0]), float(found.high[0])], 1 / ratio, ratio * measured.baseline_ms,
        measured.baseline_ms, model.error.median, model.error.p95, model.error.plans,
    )  # fmt: skip
    return {**dict(zip(names, values, strict=True)), "latency_source": measured.source}


def width_rows(geometry: NetworkGeometry, ratios: Mapping[str, float]) -> list[dict[str, Any]]:
    """Group by group what is left; ``layers`` lose their channels together."""
    shares = geometry.shares([ratios])[0]
    return [
        {
            "group": group.name,
            "layers": list(group.layers),
            "channels": group.channels,
            "width": round(x * group.channels),
        }
        for group, x in zip(geometry.groups, shares, strict=False)
        if x < 1
    ]


def from_run(run: Path, geometry: NetworkGeometry) -> Measured:
    """The measured plans of a run's records. Raises :class:`SearchError` where it is another model's, or too short."""
    from paretoprune.pruning.graph.geometry import NetworkGeometry
    from paretoprune.pruning.latency.model import FEWEST_PLANS
    from paretoprune.search.space.latency_predictor import measured_plan
    from paretoprune.search.sweep.preflight import existing_run

    folder, _ = existing_run(run)
    baseline = folder.read_baseline()
    if not baseline.get("geometry"):
        raise SearchError(f"the baseline.json of {run} holds no geometry, it is of an older version; use --measure 12")
    theirs = NetworkGeometry.from_json(baseline["geometry"])
    if theirs.groups != geometry.groups:
        raise SearchError(f"{run} searched another model than this one; give the run of this model, or --measure 12")
    if theirs.imgsz != geometry.imgsz:
        raise SearchError(
            f"{run} measured at {size_text(theirs.imgsz)} px, but --imgsz is {size_text(geometry.imgsz)}; "
            f"give --imgsz {size_text(theirs.imgsz)}"
        )
    plans = tuple(plan for record in folder.read_records() if (plan := measured_plan(record)) is not None)
    if len(plans) < FEWEST_PLANS:
        raise SearchError(
            f"a latency model needs at least {FEWEST_PLANS} measured plans, but {run} has {len(plans)}; "
            "let it go on, or use --measure 12"
        )
    metrics = baseline["metrics"]
    predicts = (metrics.get("latency_conditions") or {}).get("span") == "predict"
    source = f"{len(plans)} plans of {run}, on {baseline.get('device')}{', of whole predictions' if predicts else ''}"
    return Measured(plans, float(metrics["latency_ms"]), source)


def by_measuring(bench: Any, wanted: Any, count: int, device: str, say: Listener) -> Measured:
    """Measure ``count`` plans scattered about the wanted one beside the unpruned network, each alone on the device.

    ``say`` is told which.
    """
    from paretoprune.pruning.latency.model import MeasuredPlan
    from paretoprune.pruning.latency.pair import measure_pair
    from paretoprune.search.trial.exclusive_device import alone_on, measuring_threads

    ratios = bench.prune(wanted)[1].ratios
    by_group = {group.layers[0]: ratios[group.layers[0]] for group in bench.table.groups if group.layers[0] in ratios}
    plans, baselines = [], []
    threads = measuring_threads()
    for number, drawn in enumerate(scattered(by_group, count), 1):
        say(f"measuring plan {number} of {count}")
        network, plan = bench.prune(drawn)
        with alone_on(device):
            found = measure_pair(
                network, bench.model, bench.imgsz, device=device, threads=threads, max_seconds=SECONDS_PER_PLAN
            )
        low, high = found.speedup_ci95
        plans.append(MeasuredPlan(plan, 1 / found.speedup, (high - low) / 2 / found.speedup))
        baselines.append(found.baseline_median_ms)
    source = f"{count} plans measured now at {size_text(bench.imgsz)} px, on {device}"
    return Measured(tuple(plans), float(np.median(baselines)), source)


def scattered(ratios: Mapping[str, float], count: int, seed: int = 0) -> Sequence[dict[str, float]]:
    """Plans about ``ratios``: from hardly any of it to a little beyond it, the ratio of each layer scattered."""
    random = np.random.default_rng(seed)
    drawn = []
    for number in range(count):
        strength = _BEYOND * (number + 0.5) / count
        plan = {layer: strength * ratio + random.normal(0, _SCATTER) for layer, ratio in ratios.items()}
        drawn.append({layer: float(np.clip(ratio, 0.0, _GREATEST)) for layer, ratio in plan.items()})
    return drawn
