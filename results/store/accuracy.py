"""Name of a network's accuracy: the one metric of its task that figures, tables and selections go by.

A detector, also one of masks, keypoints or oriented boxes, has `map50_95` (of the task's own target); a classifier has
no such figure and goes by `top1`. A record holds one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS: dict[str, str] = {"map50_95": "mAP50-95", "top1": "top-1 accuracy"}
"""Metric -> its name for people, the first one that a record holds counts."""
DEFAULT = "map50_95"
VAL_IMAGES = "val_images"
"""The metric that says on how many validation images the others were judged."""
ON_ALL = "_all"
"""Ends the names of an unpruned network's accuracy on all validation images, where trials are judged on a sample."""


def accuracy_name(metrics: Mapping[str, Any]) -> str:
    """The name of the accuracy among `metrics`; that of detectors where none is there."""
    return next((name for name in LABELS if name in metrics), DEFAULT)


def accuracy_of(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy among `metrics`, in [0, 1]; None where there is none."""
    value = metrics.get(accuracy_name(metrics))
    return float(value) if isinstance(value, (int, float)) else None


def accuracy_label(metrics: Mapping[str, Any]) -> str:
    """How people call the accuracy among `metrics`: "mAP50-95" or "top-1 accuracy"."""
    return LABELS[accuracy_name(metrics)]


def missing_metric(metrics: Mapping[str, Any]) -> str:
    """What `metrics` lack of what every measured network has, an accuracy and `latency_ms`; "" where both are there."""
    if accuracy_name(metrics) not in metrics:
        return DEFAULT
    return "" if "latency_ms" in metrics else "latency_ms"


def accuracy_text(metrics: Mapping[str, Any]) -> str:
    """For a line of progress: "mAP50-95 0.612"."""
    value = accuracy_of(metrics)
    return f"{accuracy_label(metrics)} {'-' if value is None else f'{value:.3f}'}"


def trade_off_text(metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A pruned network against the unpruned one in plain words: "1.87 times as fast, mAP50-95 0.012 lower".

    baseline: the unpruned network's metrics. The change of the accuracy is that of `metrics`, where it was evaluated
    beside the unpruned one, else the difference. What is unknown is left out.
    """
    name, words = accuracy_name(metrics), []
    if (speedup := metrics.get("speedup")) is not None:
        words.append(f"{speedup:.2f} times as fast")
    after, before = accuracy_of(metrics), accuracy_of(baseline)
    change = metrics.get(f"{name}_change")
    if change is None and after is not None and before is not None:
        change = after - before
    if change is not None:
        size = f"{abs(change):.3f}"
        kind = "lower" if change < 0 else "higher"
        words.append(f"{LABELS[name]} {'unchanged' if float(size) == 0 else f'{size} {kind}'}")
    return ", ".join(words)


def accuracies(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `metrics` that are an accuracy."""
    return {name: metrics[name] for name in LABELS if name in metrics}


def on_all_images(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """An unpruned network's `metrics` with its accuracy on all validation images, where they hold one: to be compared
    with finished networks, while what they have is to be compared with trials."""
    found = {name: metrics[f"{name}{ON_ALL}"] for name in (*LABELS, VAL_IMAGES) if f"{name}{ON_ALL}" in metrics}
    return {**metrics, **found}


def sample_text(metrics: Mapping[str, Any]) -> str:
    """By the unpruned network's `metrics`, which figures are of a sample of the validation images; "" where none is."""
    if f"{VAL_IMAGES}{ON_ALL}" not in metrics:
        return ""
    some, every = int(metrics[VAL_IMAGES]), int(metrics[f"{VAL_IMAGES}{ON_ALL}"])
    return (
        f"trials, and the unpruned model beside them, are judged on {some:,} of {every:,} validation images; finished "
        "networks, and the unpruned model beside these, on all"
    )
