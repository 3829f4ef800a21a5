"""Class-separability clustering: channels that tell the same classes apart stand in for each other.

Per channel, the Jeffries-Matusita distance between its responses at the objects of every pair of classes gives a row of
a channels x class-pairs matrix. The rows are embedded in the plane and clustered around medoids; of each cluster the
channel with the largest weight stays. As many clusters as the plan's width keeps, or, without a plan, as the knee of
the mean simplified silhouette over the possible widths proposes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from pruning.importance.base import Evidence, criterion
from pruning.importance.clusters import cluster, embed, knee, silhouette_curve
from pruning.importance.objects import ObjectResponses, responses_at_objects
from pruning.importance.weights import l2
from pruning.layers import Group, LayerTable

_log = logging.getLogger(__name__)
_LEAST_OBJECTS = 2  # of a class, for a variance
_VARIANCE_FLOOR = 1e-6  # of the variance over all objects: a class that always gets one answer is no perfect class

Place = tuple[int, int]  # group id, number of the part in it


@criterion("separability", needs_data=True, by_width=True)
def separability(evidence: Evidence) -> np.ndarray:
    """Above 1 for the channel of largest weight of each cluster, below for the others, by weight within both."""
    weights = l2(evidence)
    scores = weights / (1 + weights)
    widths = propose_widths(evidence) if evidence.widths is None else evidence.widths
    for group_id, width in widths.items():
        group = evidence.table.groups[group_id]
        for number, (part, k) in enumerate(zip(group.parts, group.kept_per_part(width), strict=True)):
            points = _points(evidence).get((group_id, number))
            if points is None or k >= len(part):
                continue  # eval mode does not reach it: the weights alone decide
            numbers = cluster(points, k, evidence.seed)
            heaviest = np.argsort(-weights[part], kind="stable")
            _, first = np.unique(numbers[heaviest], return_index=True)
            scores[part[heaviest[first]]] += 1
    return scores


def propose_ratios(evidence: Evidence, round_to: int = 8) -> dict[str, float]:
    """Layer (the first of its group) -> ratio that leaves one channel for each cluster, see `propose_widths`."""
    groups = evidence.table.groups
    return {groups[g].name: round(1 - w / groups[g].channels, 6) for g, w in propose_widths(evidence, round_to).items()}


def propose_widths(evidence: Evidence, round_to: int = 8) -> dict[int, int]:
    """Width by group id at the knee of the mean simplified silhouette over the widths the group may have.

    The part that needs most of its channels decides for its group. A group stays whole, and is left out, where a part's
    curve has no knee; on most layers of a trained detector the curve rises evenly, so that is the common case. Over
    all integers from 2 on, instead of over widths, noise among the first few puts the knee at 2 to 5 for any layer.
    """
    found = {}
    for group in evidence.table.groups:
        widths = sorted(w for w in group.widths(round_to) if min(group.kept_per_part(w)) > 1)
        knees = [_knee_width(evidence, group, number, widths) for number in range(len(group.parts))]
        width = max(group.channels if w is None else w for w in knees)
        if width < group.channels:
            found[group.id] = width
    return found


def _knee_width(evidence: Evidence, group: Group, number: int, widths: list[int]) -> int | None:
    points = _points(evidence).get((group.id, number))
    if points is None or len(widths) < 3:
        return None
    means = silhouette_curve(points, [group.kept_per_part(w)[number] for w in widths])
    return knee(widths, means)


def jeffries_matusita(responses: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Distance between the responses to every pair of classes, taken as normal distributions.

    sqrt(2 (1 - exp(-B))) with the Bhattacharyya distance
    B = (m1 - m2)^2 / (4 (v1 + v2)) + ln((v1 + v2) / (2 s1 s2)) / 2 (Bruzzone, Roli and Serpico 1995).

    Args:
        responses: (objects, channels); labels: (objects,). Classes with fewer than two objects are left out.

    Returns:
        shape (channels, class pairs), in [0, sqrt(2)]; pairs in ascending order of their classes.
    """
    names, counts = np.unique(labels, return_counts=True)
    names = names[counts >= _LEAST_OBJECTS]
    means = np.array([responses[labels == c].mean(0) for c in names])
    floor = _VARIANCE_FLOOR * responses.var(0) + 1e-30
    variances = np.array([responses[labels == c].var(0) for c in names]) + floor
    one, two = np.triu_indices(len(names), 1)
    both = variances[one] + variances[two]
    apart = np.square(means[one] - means[two]) / (4 * both)
    apart += 0.5 * np.log(both / (2 * np.sqrt(variances[one] * variances[two])))
    return np.sqrt(2 * -np.expm1(-np.maximum(apart, 0))).T


def _points(evidence: Evidence) -> dict[Place, np.ndarray]:
    """Every part's channels in the plane, shape (channels, at most 2); made at the first plan, then remembered."""
    memo: dict[str, dict[Place, np.ndarray]] = evidence.memo
    if "points" not in memo:
        objects = responses_at_objects(evidence)
        describe = _description(objects.labels)
        memo["points"] = {
            (group.id, number): embed(np.mean(rows, axis=0))
            for group in evidence.table.groups
            for number, part in enumerate(group.parts)
            if (rows := [describe(r) for r in _part_responses(evidence.table, objects, part)])
        }
    return memo["points"]


def _part_responses(table: LayerTable, objects: ObjectResponses, part: np.ndarray) -> Iterator[np.ndarray]:
    """(objects, channels of the part) from every convolution that gives these channels and that eval mode reaches."""
    for name, responses in objects.responses.items():
        outputs = table.convs[name].outputs
        if np.isin(part, outputs).all():
            position = {c: i for i, c in enumerate(outputs.tolist())}
            yield responses[:, [position[c] for c in part.tolist()]]


def _description(labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What describes a channel: (objects, channels) -> (channels, class pairs), or (channels, objects) of one class."""
    separable = int((np.unique(labels, return_counts=True)[1] >= _LEAST_OBJECTS).sum())
    if separable > 1:
        return lambda responses: jeffries_matusita(responses, labels)
    _log.warning(
        "importance 'separability' tells classes apart, but the calibration images show %d class(es) with two objects "
        "or more; clustering the plain responses instead. More calibration images may show more classes.",
        separable,
    )
    return lambda responses: (responses / max(float(responses.std()), 1e-30)).T
