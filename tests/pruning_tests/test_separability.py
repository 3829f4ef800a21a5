"""Class-separability clustering: distances by their definition, clusters by brute force, proposals by construction."""

from __future__ import annotations

import itertools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pruning.calibration import Calibration
from pruning.checkpoints import save_checkpoint
from pruning.errors import PruningError
from pruning.importance import Evidence, score
from pruning.importance.clusters import cluster, distances, embed, knee, mean_simplified_silhouette, silhouette_curve
from pruning.importance.objects import responses_at_objects
from pruning.importance.separability import jeffries_matusita, propose_ratios
from pruning.layers import LayerTable, build_layer_table
from pruning.plan import Plan
from pruning.surgery import resolve
from pruning.workbench import Workbench
from search.cli import run
from tests.pruning_tests.recovery_material import shapes_dataset
from tests.pruning_tests.tiny import tiny_calibration, tiny_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


@pytest.fixture(scope="module")
def calibration(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return tiny_calibration(tmp_path_factory.mktemp("calibration") / "shapes", model)


def normal(x: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    return np.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("shift", "one", "two"), [(0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.5, 2.0), (2.5, 0.7, 1.9)])
def test_jeffries_matusita_is_the_integral_over_two_normals(shift: float, one: float, two: float) -> None:
    """sqrt of the integral of (sqrt(p) - sqrt(q))^2, by the trapezoid rule."""
    x = np.linspace(-40, 40, 200_001)
    squared = np.square(np.sqrt(normal(x, 0, one)) - np.sqrt(normal(x, shift, two)))
    expected = math.sqrt(((squared[1:] + squared[:-1]) / 2).sum() * (x[1] - x[0]))
    responses = np.array([[-one], [one], [shift - two], [shift + two]])  # two objects each: mean and deviation as asked
    assert jeffries_matusita(responses, np.array([4, 4, 9, 9])) == pytest.approx(np.array([[expected]]), abs=1e-4)


def test_jeffries_matusita_has_a_row_per_channel_and_a_column_per_pair() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 7], [5, 5, 5, 1])  # the last class has one object: no variance, no pair
    responses = rng.normal(size=(16, 6))
    responses[labels == 2, 3] += 1000  # channel 3 tells class 2 from the others
    found = jeffries_matusita(responses, labels)
    assert found.shape == (6, 3)
    assert (found >= 0).all()
    assert (found <= math.sqrt(2)).all()
    assert found[3, 1:] == pytest.approx(math.sqrt(2), abs=1e-6)  # pairs (0, 1), (0, 2), (1, 2)
    assert found[3, 0] < 1


def test_a_dead_channel_separates_nothing() -> None:
    responses = np.zeros((6, 1))
    assert jeffries_matusita(responses, np.repeat([0, 1], 3)) == pytest.approx(np.zeros((1, 1)))


def test_clusters_are_the_best_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for k in (2, 3, 4):
        centres = rng.normal(size=(k, 2)) * 20
        points = np.repeat(centres, 4, axis=0) + rng.normal(size=(4 * k, 2))
        apart = distances(points)
        best = min(itertools.combinations(range(len(points)), k), key=lambda m: apart[:, list(m)].min(1).sum())
        expected = apart[:, list(best)].argmin(1)
        found = cluster(points, k, seed=0)
        assert np.array_equal(expected[:, None] == expected, found[:, None] == found)


def test_simplified_silhouette_by_hand() -> None:
    # three points at 1 from the nearest and 2, 4, 1 from the second nearest medoid; a medoid counts 1
    apart = np.array([[1.0, 2.0, 9.0], [4.0, 1.0, 4.0], [1.0, 1.0, 7.0], [0.0, 3.0, 5.0]])
    assert mean_simplified_silhouette(apart) == pytest.approx((0.5 + 0.75 + 0 + 1) / 4)


def test_silhouette_is_one_where_every_point_is_a_medoid() -> None:
    points = np.random.default_rng(0).normal(size=(12, 2))
    means = silhouette_curve(points, [2, 6, 12])
    assert means[-1] == 1
    assert (means[:-1] < 1).all()


def test_the_knee_is_the_number_of_clusters() -> None:
    points, widths = sixteen_clusters(), list(range(8, 65, 8))
    means = silhouette_curve(points, widths)
    assert knee(widths, means) == 16
    assert means[1] > 0.95
    assert knee([8, 16], means[:2]) is None
    assert knee(widths, np.linspace(0.1, 1, 8)) is None  # a straight line has no knee


def sixteen_clusters() -> np.ndarray:
    """64 points: 16 tight clusters of 4, far from each other."""
    grid = np.array(list(itertools.product(range(4), range(4))), dtype=float) * 10
    return np.repeat(grid, 4, axis=0) + np.random.default_rng(0).normal(size=(64, 2)) * 0.1


def test_embedding_keeps_the_distances_of_a_plane() -> None:
    plane = np.random.default_rng(0).normal(size=(9, 2))
    turned = plane @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0][:2]
    assert distances(embed(turned)) == pytest.approx(distances(plane))
    assert embed(plane[:, :1]).shape == (9, 1)  # two classes give one pair


def test_of_each_cluster_the_heaviest_channel_stays(
    model: nn.Module, table: LayerTable, calibration: Calibration
) -> None:
    group = table.group_of["model.1"]
    part = group.parts[0]
    points = np.repeat([0.0, 10.0, 20.0, 30.0], 4)[:, None]
    evidence = Evidence(model, table, calibration, widths={group.id: 4}, memo={"points": {(group.id, 0): points}})
    scores, weights = score("separability", evidence), score("l2", evidence)
    for members in part.reshape(4, 4):
        best = members[weights[members].argmax()]
        assert scores[best] > 1
        assert (scores[members[members != best]] < 1).all()
    order = np.argsort(-scores[part][scores[part] < 1])
    assert np.array_equal(order, np.argsort(-weights[part][scores[part] < 1]))


def test_as_many_clusters_as_the_plan_keeps(model: nn.Module, table: LayerTable, calibration: Calibration) -> None:
    base = Evidence(model, table, calibration)
    for ratio in (0.25, 0.5):
        widths = resolve(table, {"*": ratio}, round_to=1)
        scores = score("separability", replace(base, widths=widths))
        for group in table.groups:
            for part, kept in zip(group.parts, group.kept_per_part(widths[group.id]), strict=True):
                assert (scores[part] > 1).sum() == kept
    untouched = score("separability", replace(base, widths={}))
    assert (untouched <= 1).all()


def test_a_proposal_is_the_number_of_clusters(model: nn.Module, table: LayerTable, calibration: Calibration) -> None:
    group = table.group_of["model.4.cv2.0.0"]
    loose = np.random.default_rng(0).normal(size=(64, 2))  # one cloud
    other = table.group_of["model.4.cv2.1.0"]
    memo = {"points": {(group.id, 0): sixteen_clusters(), (other.id, 0): loose}}
    evidence = Evidence(model, table, calibration, memo=memo)
    assert propose_ratios(evidence) == {"model.4.cv2.0.0": 0.75}
    scores = score("separability", evidence)  # without a plan: as proposed
    assert (scores[group.parts[0]] > 1).sum() == 16
    assert (scores[other.parts[0]] <= 1).all()


def test_the_part_that_needs_most_decides(model: nn.Module, table: LayerTable, calibration: Calibration) -> None:
    group = table.group_of["model.2.cv1"]
    tight = np.array([[x, 0.001 * i] for x in (0.0, 100.0, 200.0, 300.0) for i in range(2)])
    six, none = (np.random.default_rng(seed).normal(size=(8, 2)) for seed in (4, 0))  # where their knees are
    for second, expected in ((tight, {"model.2.cv1": 0.5}), (six, {"model.2.cv1": 0.25}), (none, {})):
        memo = {"points": {(group.id, 0): tight, (group.id, 1): second}}
        assert propose_ratios(Evidence(model, table, calibration, memo=memo), round_to=1) == expected


@pytest.mark.parametrize("keep", ["one class", "no object"])
def test_with_one_class_it_says_so_and_clusters_the_responses(
    model: nn.Module, table: LayerTable, calibration: Calibration, caplog: pytest.LogCaptureFixture, keep: str
) -> None:
    batch = dict(calibration.batch)
    if keep == "one class":
        batch["cls"] = torch.zeros_like(batch["cls"])
    else:
        batch.update({k: batch[k][:0] for k in ("cls", "bboxes", "batch_idx")})
    widths = resolve(table, {"model.1": 0.5}, round_to=1)
    with caplog.at_level(logging.WARNING):
        scores = score("separability", Evidence(model, table, Calibration(batch), widths=widths))
    assert "tells classes apart, but the calibration images show 1 class" in caplog.text
    assert (scores[table.group_of["model.1"].parts[0]] > 1).sum() == 8


def test_responses_are_means_over_the_cells_of_the_box(model: Any, table: LayerTable, calibration: Calibration) -> None:
    batch = dict(calibration.batch)
    batch["bboxes"] = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.999, 0.0, 0.001, 0.001]])
    batch["batch_idx"], batch["cls"] = torch.tensor([0.0, 5.0, 5.0]), torch.tensor([[1.0], [0.0], [2.0]])
    found = responses_at_objects(Evidence(model, table, Calibration(batch)))
    with torch.no_grad():
        map_ = model.model[0](calibration.images)  # 32 x 32 cells
    expected = torch.stack([map_[0, :, :, :16].mean((1, 2)), map_[5].mean((1, 2)), map_[5, :, 0, 31]])
    assert found.responses["model.0.conv"] == pytest.approx(expected.double().numpy(), rel=1e-4)
    assert found.labels.tolist() == [1, 0, 2]


def test_the_workbench_clusters_for_each_plan_and_looks_at_the_images_once(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "tiny.pt")
    data = str(shapes_dataset(tmp_path / "shapes"))
    bench = Workbench(str(tmp_path / "tiny.pt"), data, 64, importance="separability", round_to=1)
    first, _ = bench.prune({"model.1": 0.25})
    points = bench.evidence.memo["points"]
    second, plan = bench.prune({"model.1": 0.75})
    assert [m.model[1].conv.out_channels for m in (first, second)] == [12, 4]  # type: ignore[index, union-attr]
    assert bench.evidence.memo["points"] is points
    alone = Workbench(str(tmp_path / "tiny.pt"), data, 64, importance="separability", round_to=1)
    assert alone.prune({"model.1": 0.75})[1].kept == plan.kept  # no plan depends on the one before
    assert all(0 < r < 1 for r in bench.propose_ratios().values())
    with pytest.raises(PruningError, match="importance 'l2' proposes no ratios"):
        Workbench(str(tmp_path / "tiny.pt"), importance="l2").propose_ratios()


def test_the_command_line_takes_the_proposed_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, data = tmp_path / "tiny.pt", tmp_path / "out.pt", str(shapes_dataset(tmp_path / "shapes"))
    save_checkpoint(tiny_model(), model)
    given = ["prune", str(model), "--ratio", "auto", "-o", str(out), "--round-to", "1", "--imgsz", "64"]
    assert run([*given, "--data", data, "--recover", "none", "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["params_m"] < row["params_m_before"]
    bench = Workbench(str(model), data, 64, importance="separability", round_to=1)
    by_group = {table_row["layer"]: table_row["group"] for table_row in bench.table.to_rows()}
    cut = {by_group[layer] for layer in Plan.load(tmp_path / "out.plan.json").ratios}
    assert cut == {by_group[layer] for layer in bench.propose_ratios()}
    for wrong, line in ((given, "--ratio auto looks at images"), ([*given, "--ratio", "half"], "not a valid float")):
        assert run(wrong) == 2
        assert line in capsys.readouterr().err
