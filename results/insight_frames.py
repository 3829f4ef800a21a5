"""Tables of what the trials say about the layers, and of how the front grew; see :mod:`results.insight`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import pandas as pd

from results.figures import hypervolume_curve
from results.insight import LayerInsight, insight
from results.objectives import DEFAULT_OBJECTIVES
from results.records import TrialRecord
from results.selection import comparable


def layers_frame(records: Sequence[TrialRecord], baseline: Mapping[str, Any]) -> pd.DataFrame:
    """One row a layer that the trials varied (see `insight.LayerInsight` for the columns), costly ones first.

    Empty below `insight.FEWEST_TRIALS` completed trials. `attrs`: accuracy_explained, latency_explained, trials.
    """
    found = insight(records, baseline)
    frame = pd.DataFrame(
        [asdict(layer) for layer in found.layers] if found else [], columns=[item.name for item in fields(LayerInsight)]
    )
    if found:
        frame.attrs = {name: getattr(found, name) for name in ("accuracy_explained", "latency_explained", "trials")}
    return frame


def hypervolume_frame(
    records: Sequence[TrialRecord], baseline: Mapping[str, Any], objectives: Sequence[str] = DEFAULT_OBJECTIVES
) -> pd.DataFrame:
    """How the front grew, a row a comparable trial in order of arrival.

    Columns: trials, hours (wall clock since the first trial began), trial_hours (of all trials that had finished by
    then, whatever became of them), hypervolume_share (of the baseline's box, see `figures.hypervolume_curve`).
    """
    curve = hypervolume_curve(records, baseline, objectives)
    arrived = sorted(comparable(records), key=lambda record: record.finished_at)
    spent = {record.trial_id: sum(record.seconds.values()) for record in records}
    rows = [
        {
            "trials": count,
            "hours": hours,
            "trial_hours": sum(spent[r.trial_id] for r in records if r.finished_at <= record.finished_at) / 3600,
            "hypervolume_share": share,
        }
        for count, hours, record, share in zip(curve.trials, curve.hours, arrived, curve.shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["trials", "hours", "trial_hours", "hypervolume_share"])
