"""Tables of what the trials say about the layers, and of how the front grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd

from paretoprune.results.analysis.figures import hypervolume_curve
from paretoprune.results.analysis.layer_effects import Insight, insight
from paretoprune.results.selection.selection import comparable
from paretoprune.results.store.accuracy import LABELS
from paretoprune.results.store.objectives import DEFAULT_OBJECTIVES, words
from paretoprune.results.store.records import TrialRecord


def layers_frame(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> pd.DataFrame:
    """One row a layer that the trials varied, costly ones first; see `insight.Effect`.

    Columns: layer, block, mean_ratio, and for each objective what a tenth of the layer's channels does to it, the
    standard deviation of that, and the layer's share: `latency_per_tenth_ms`, `latency_per_tenth_sd_ms`,
    `latency_share`; the task's own accuracy is called `accuracy`. Empty below `insight.FEWEST_TRIALS` completed trials.
    `attrs`: trials, and for each objective how much is explained (`latency_explained`).
    """
    return insight_frame(insight(records, baseline, objectives), objectives)


def insight_frame(found: Insight | None, objectives: Sequence[str] = DEFAULT_OBJECTIVES) -> pd.DataFrame:
    """`layers_frame` of what is known already; None: too few trials, an empty table."""
    columns = ["layer", "block", "mean_ratio", *(column for name in objectives for column in _effect_columns(name))]
    rows = []
    for layer in found.layers if found else ():
        row = {"layer": layer.layer, "block": layer.block, "mean_ratio": layer.mean_ratio}
        for name, effect in layer.effects.items():
            row.update(zip(_effect_columns(name), astuple(effect), strict=True))
        rows.append(row)
    frame = pd.DataFrame(rows, columns=columns)
    if found:
        frame.attrs = {f"{_quantity(name)[0]}_explained": share for name, share in found.explained.items()}
        frame.attrs["trials"] = found.trials
    return frame


def _effect_columns(name: str) -> tuple[str, str, str]:
    quantity, unit = _quantity(name)
    return f"{quantity}_per_tenth{unit}", f"{quantity}_per_tenth_sd{unit}", f"{quantity}_share"


def _quantity(name: str) -> tuple[str, str]:
    """An objective's name without its unit, and the unit as columns end in it."""
    unit = f"_{words(name)[1].lower()}" if words(name)[1] else ""
    return "accuracy" if name in LABELS else name.removesuffix(unit), unit


def hypervolume_frame(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> pd.DataFrame:
    """How the front grew, a row a comparable trial in order of arrival.

    Columns: trials, hours (wall clock since the first trial began), trial_hours (of all trials that had finished by
    then, whatever became of them), hypervolume_share (of the baseline's box, see `figures.hypervolume_curve`).
    """
    curve = hypervolume_curve(records, baseline, objectives)
    arrived = sorted(comparable(records), key=lambda record: record.finished_at)
    everybody = sorted(records, key=lambda record: record.finished_at)
    spent = np.concatenate([[0.0], np.cumsum([sum(record.seconds.values()) for record in everybody])])
    ended = np.searchsorted([r.finished_at for r in everybody], [r.finished_at for r in arrived], side="right")
    rows = [
        {
            "trials": count,
            "hours": hours,
            "trial_hours": float(spent[by_then]) / 3600,
            "hypervolume_share": share,
        }
        for count, hours, by_then, share in zip(curve.trials, curve.hours, ended, curve.shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["trials", "hours", "trial_hours", "hypervolume_share"])
