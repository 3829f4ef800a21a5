"""Effects of layers: against trials made from known effects; hypervolume over trials and hours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paretoprune.results.analysis.layer_effect_frames import hypervolume_frame, layers_frame
from paretoprune.results.analysis.layer_effects import FEWEST_TRIALS, insight
from paretoprune.results.store.records import TrialRecord, TrialState

Build = Callable[..., TrialRecord]
LAYERS = tuple(f"model.{i}.conv" for i in range(6))
COST = np.array([-0.30, -0.02, -0.10, 0.0, -0.05, -0.01])  # mAP by ratio
GAIN_MS = np.array([-1.0, -6.0, 0.0, -2.0, -0.5, -3.0])
BASELINE: dict[str, Any] = {
    "metrics": {"map50_95": 0.6, "latency_ms": 20.0},
    "groups": [{"name": name, "layers": [name, f"{name}.twin"]} for name in LAYERS],
    "layers": [{"layer": name, "block": i} for i, name in enumerate(LAYERS)],
}  # fmt: skip


def trials(record: Build, count: int, noise: float = 0.002) -> list[TrialRecord]:
    random = np.random.default_rng(0)
    made = []
    for index in range(count):
        ratios = random.uniform(0.0, 0.6, 6)
        metrics = {
            "map50_95": 0.6 + float(COST @ ratios) + random.normal(0.0, noise),
            "latency_ms": 20.0 + float(GAIN_MS @ ratios) + random.normal(0.0, 0.02),
        }
        both = {name: float(r) for layer, r in zip(LAYERS, ratios, strict=True) for name in (layer, f"{layer}.twin")}
        made.append(record(f"t{index}", ratios=both, metrics=metrics, finished_at=3600.0 * (index + 1)))
    return made


def test_known_effects_are_found_within_their_uncertainty(record: Build) -> None:
    found = insight(trials(record, 60), BASELINE)
    assert found is not None
    by_name = {layer.layer: layer for layer in found.layers}
    assert list(by_name) == sorted(by_name, key=lambda name: by_name[name].effects["map50_95"].per_tenth)
    assert set(by_name) == set(LAYERS)  # a group's second layer moves with the first
    for index, name in enumerate(LAYERS):
        for objective, truth in (("map50_95", COST), ("latency_ms", GAIN_MS)):
            effect = by_name[name].effects[objective]
            assert abs(effect.per_tenth - truth[index] / 10) < 4 * effect.per_tenth_sd
    assert found.layers[0].layer == LAYERS[0]
    assert max(found.layers, key=lambda layer: layer.effects["latency_ms"].share).layer == LAYERS[1]
    assert sum(layer.effects["map50_95"].share for layer in found.layers) == pytest.approx(1.0)
    assert found.explained["map50_95"] > 0.95


def test_chance_explains_nothing(record: Build) -> None:
    found = insight(trials(record, 30, noise=5.0), BASELINE)
    assert found is not None
    assert found.explained["map50_95"] < 0.3
    assert "The figures for mAP50-95 are not to be relied on." in found.reading
    assert found.explained["latency_ms"] > 0.95


def test_stopped_trials_say_something_about_latency_only(record: Build) -> None:
    made = trials(record, 40)
    stopped = [
        record(item.trial_id, ratios=item.ratios, metrics={**item.metrics, "map50_95": 0.0}, state=TrialState.STOPPED)
        for item in made[20:]
    ]
    found = insight([*made[:20], *stopped], BASELINE)
    assert found is not None
    assert found.trials == 20
    assert found.explained["map50_95"] > 0.8


def test_the_runs_own_objectives_are_explained(record: Build) -> None:
    """Size follows the second layer alone and latency another: whoever looked at latency would name the wrong one."""
    own = ("size_mb", "map50", "params_m")
    made = [
        record(
            item.trial_id,
            ratios=item.ratios,
            metrics={
                **item.metrics,
                "map50": 0.9 - 0.5 * item.ratios[LAYERS[3]],
                "size_mb": 6.0 - 2.0 * item.ratios[LAYERS[2]],
                "params_m": 3.0 - 1.5 * item.ratios[LAYERS[4]],
            },
        )
        for item in trials(record, 40)
    ]
    found = insight(made, BASELINE, own)
    assert found is not None
    assert found.objectives == own
    assert min(found.explained.values()) > 0.95
    assert found.layers[0].layer == LAYERS[3]  # by the accuracy among the objectives, wherever it stands
    by_name = {layer.layer: layer.effects for layer in found.layers}
    assert by_name[LAYERS[2]]["size_mb"].per_tenth == pytest.approx(-0.2, rel=0.05)
    assert by_name[LAYERS[4]]["params_m"].per_tenth == pytest.approx(-0.15, rel=0.05)
    assert "size and" in found.reading
    frame = layers_frame(made, BASELINE, own).set_index("layer")
    assert frame["size_per_tenth_mb"].idxmin() == LAYERS[2]
    assert frame["params_share"].idxmax() == LAYERS[4]
    assert frame["map50_share"].idxmax() == LAYERS[3]
    assert not any("latency" in column or "accuracy" in column for column in frame.columns)


def test_with_few_trials_there_is_no_insight_but_an_empty_frame(record: Build) -> None:
    made = trials(record, FEWEST_TRIALS - 1)
    assert insight(made, BASELINE) is None
    assert layers_frame(made, BASELINE).empty
    assert "latency_per_tenth_ms" in layers_frame(made, BASELINE).columns


def test_trials_that_leave_every_layer_whole_say_nothing(record: Build) -> None:
    whole = [record(f"t{index}", ratios={}) for index in range(FEWEST_TRIALS)]
    assert insight(whole, BASELINE) is None


def test_frames(record: Build) -> None:
    made = trials(record, 12)
    layers = layers_frame(made, BASELINE)
    assert layers["layer"].tolist()[0] == LAYERS[0]
    assert layers.attrs["trials"] == 12
    growth = hypervolume_frame(made, BASELINE)
    assert growth["trials"].tolist() == list(range(1, 13))
    assert growth["hypervolume_share"].is_monotonic_increasing
    spent = sum(made[0].seconds.values()) / 3600
    assert growth["hours"].tolist() == pytest.approx([index + spent for index in range(12)])
    assert growth["trial_hours"].tolist() == pytest.approx([spent * (index + 1) for index in range(12)])


def test_trials_beyond_the_bounds_do_not_compete(record: Build) -> None:
    from paretoprune.results.selection.selection import comparable, front

    inside, beyond = record("a", latency_ms=9.0), record("b", latency_ms=1.0, violations={"max_latency_ms": 0.5})
    assert comparable([inside, beyond]) == [inside]
    assert front([inside, beyond]) == [inside]
