"""Plans, widths and refusals of the surgery, on one model."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.graph.layers import LayerTable, prunable_share
from paretoprune.pruning.importance import Evidence, score
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies.common import touched
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import canonical_ratios, prune, replay, resolve
from tests.pruning.masking import build, relative_error


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build("yolov8n")


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


@pytest.fixture(scope="module")
def scores(model: nn.Module, table: LayerTable) -> np.ndarray:
    return score("l2", Evidence(model, table))


def test_real_weights_pruned_equals_masked(assets: Path) -> None:
    from paretoprune.pruning.yolo.loading import load_model

    real = load_model(assets / "weights" / "yolov8n.pt")
    table = build_layer_table(real)
    scores = score("l2", Evidence(real, table))
    for ratio in (0.25, 0.5, 0.75):
        pruned, plan = prune(real, table, resolve(table, {"*": ratio}), scores)
        assert relative_error(real, pruned, plan.kept, torch.rand(2, 3, 192, 192)) < 2e-5


def test_the_prunable_share_is_all_but_the_heads_last_layers(model: nn.Module, table: LayerTable) -> None:
    sizes = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    last = [f"model.22.{tower}.{scale}.2" for tower in ("cv2", "cv3") for scale in range(3)]
    left = sum(sizes[name] for name in [*last, "model.22.dfl.conv"])
    assert prunable_share(model, table) == pytest.approx(1 - left / sum(sizes.values()))


@pytest.mark.parametrize(
    ("round_to", "ratio", "expected"), [(8, 0.5, 16), (8, 0.3, 24), (1, 0.3, 22), (8, 0.99, 8), (16, 0.4, 16)]
)
def test_widths_as_planned(
    model: nn.Module, table: LayerTable, scores: np.ndarray, round_to: int, ratio: float, expected: int
) -> None:
    pruned, plan = prune(model, table, resolve(table, {"model.1": ratio}, round_to), scores)
    assert pruned.model[1].conv.out_channels == expected  # type: ignore[index, union-attr]
    assert pruned.model[2].cv1.conv.in_channels == expected  # type: ignore[index, union-attr]
    assert plan.ratios == {"model.1": round(1 - expected / 32, 6)}
    assert len(plan.kept["model.1.conv"]) == expected


def test_both_halves_of_a_chunk_keep_the_same_width(model: nn.Module, table: LayerTable, scores: np.ndarray) -> None:
    pruned, plan = prune(model, table, resolve(table, {"model.4.cv1": 0.5}), scores)
    kept = np.array(plan.kept["model.4.cv1.conv"])
    assert (kept < 32).sum() == (kept >= 32).sum() == 16
    assert pruned.model[4].c == 16  # type: ignore[index, union-attr]
    assert pruned.model[4].m[0].cv2.conv.out_channels == 16  # type: ignore[index, union-attr]


def test_the_channels_of_highest_score_stay(model: nn.Module, table: LayerTable) -> None:
    scores = np.zeros(table.class_count)
    outputs = table.convs["model.3.conv"].outputs
    wanted = [5, 9, 11, 20, 33, 40, 52, 63]
    scores[outputs[wanted]] = 1.0
    _, plan = prune(model, table, resolve(table, {"model.3": 0.875}), scores)
    assert list(plan.kept["model.3.conv"]) == wanted


def test_same_plan_same_network_bit_for_bit(
    model: nn.Module, table: LayerTable, scores: np.ndarray, tmp_path: Path
) -> None:
    first, plan = prune(model, table, resolve(table, {"model.?.*": 0.4, "model.8.*": 0.6}), scores)
    plan.save(tmp_path / "plan.json")
    again, plan_again = replay(model, table, Plan.load(tmp_path / "plan.json"))
    assert plan_again.kept == plan.kept
    assert plan_again.hash == plan.hash == json.loads((tmp_path / "plan.json").read_text())["hash"]
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_pruned_network_can_be_pruned_again(model: nn.Module, table: LayerTable, scores: np.ndarray) -> None:
    once, _ = prune(model, table, resolve(table, {"*": 0.3}), scores)
    second_table = build_layer_table(once)
    scores_again = score("l2", Evidence(once, second_table))
    twice, plan = prune(once, second_table, resolve(second_table, {"*": 0.3}), scores_again)
    assert relative_error(once, twice, plan.kept, torch.rand(1, 3, 96, 96)) < 2e-5
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, once, twice)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("ratios", "expected"),  # ratio by layer, in whichever order the keys are given
    [
        ({"model.*": 0.5, "model.3": 0.25, "model.5": 0.0}, {"model.3": 0.25, "model.5": 0.0, "model.1": 0.5}),
        ({"model.?": 0.25, "*": 0.5}, {"model.3": 0.25, "model.4.cv2": 0.5}),
        ({"*": 0.75, "model.4.*": 0.5, "model.4.cv?": 0.25}, {"model.4.cv2": 0.25, "model.3": 0.75}),
        ({"model.[57]": 0.25, "model.*": 0.5, "*": 0.75, "model.7": 0.0}, {"model.5": 0.25, "model.7": 0.0}),
        # All of these lose their channels together: what governs one governs all
        ({"*": 0.25, "model.4.cv1": 0.5}, {"model.4.cv1": 0.5, "model.4.m.0.cv2": 0.5, "model.4.m.0.cv1": 0.25}),
        ({"model.4.m.*.cv2": 0.25, "model.4.cv*": 0.5}, {"model.4.cv1": 0.25, "model.4.cv2": 0.5}),
        ({"model.4.m.0.cv2": 0.0, "model.4.*": 0.5}, {"model.4.cv1": 0.0, "model.4.m.1.cv2": 0.0, "model.4.cv2": 0.5}),
    ],
)
def test_names_beat_patterns_and_longer_patterns_shorter_ones(
    table: LayerTable, ratios: dict[str, float], expected: dict[str, float], turned: bool
) -> None:
    found = canonical_ratios(table, resolve(table, dict(reversed(ratios.items())) if turned else ratios))
    assert {layer: found.get(layer, 0.0) for layer in expected} == expected
    meant = {layer for layer in expected if any(fnmatchcase(layer, key) for key in ratios)}
    assert expected.keys() & set(touched(table, ratios)) == {layer for layer in meant if expected[layer]}


def test_of_equal_patterns_the_later_counts(table: LayerTable) -> None:
    for ratios, expected in (
        ({"model.?": 0.25, "mode?.3": 0.5}, 0.5),
        ({"mode?.3": 0.5, "model.?": 0.25}, 0.25),
    ):
        assert canonical_ratios(table, resolve(table, ratios))["model.3"] == expected
        kept = Plan.from_json(json.loads(json.dumps(Plan(ratios).to_json())))
        assert list(kept.ratios) == list(ratios)  # written as they were given


@pytest.mark.parametrize(
    "text",
    [
        '{"ratios": {"model.4.*": 0.3, "model.3": 0.1, "model.4.*": 0.5}}',
        '{"ratios": {}, "ratios": {"model.4.*": 0.5}}',
    ],
)
def test_a_key_twice_in_a_plan_file_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan.json must give every key once, but has '(model.4.\*|ratios)' twice"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({"model.1": 1.0}, "a ratio must lie in [0, 1)"),
        ({"model.1": -0.1}, "a ratio must lie in [0, 1)"),
        ({"model.1": float("nan")}, "a ratio must lie in [0, 1)"),
        ({"model.99": 0.5}, "it has none named model.99"),
        ({"backbone.*": 0.5}, "it has none named backbone.*"),
        ({"model.22.cv2.0.2": 0.5}, "model.22.cv2.0.2 is not prunable: its output channels have a fixed meaning"),
        ({"model.4.cv1": 0.5, "model.4.m.0.cv2": 0.25}, "lose their channels together"),
    ],
)
def test_a_plan_that_cannot_be_applied_is_refused(table: LayerTable, ratios: dict[str, float], words: str) -> None:
    with pytest.raises(PlanError) as error:
        resolve(table, ratios)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "ratios", "words"),
    [
        ("yolov8s", {"*": 0.5}, "it does not fit model.2.m.0.cv2, model.4.m.0.cv2, "),
        ("yolov8s", {"model.3": 0.5}, "it does not fit model.3 of this one"),  # the kept indices exist there as well
        ("yolo11n", {"model.6.m.1.cv1": 0.5}, "it does not fit model.6.m.1.cv1 of this one"),
    ],
)
def test_a_plan_of_another_model_is_refused_with_the_layers_that_do_not_fit(
    model: nn.Module, table: LayerTable, scores: np.ndarray, name: str, ratios: dict[str, float], words: str
) -> None:
    _, plan = prune(model, table, resolve(table, ratios), scores)
    other = build(name)
    with pytest.raises(PlanError) as error:
        replay(other, build_layer_table(other), plan)
    assert str(error.value).startswith("the plan is for another model: " + words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kept",
    [
        {"model.3.conv": (0, 64)},  # it has 64 channels
        {"model.3.conv": (-1, 5)},
        {"model.3.conv": ()},
        {"model.4.cv1.conv": tuple(range(32))},  # one half of a chunk whole, the other gone
        {"model.22.cv2.0.2": tuple(range(10))},  # not prunable
        {"model.3.conv": tuple(range(32)), "model.5.conv": tuple(range(64))},  # more than the ratios say
    ],
)
def test_kept_channels_that_fit_no_plan_are_refused(
    model: nn.Module, table: LayerTable, kept: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(PlanError, match="for another model") as error:
        replay(model, table, Plan({"model.3": 0.5}, kept))
    assert "\n" not in str(error.value)


def test_ratios_alone_give_the_same_network_again(model: nn.Module, table: LayerTable, scores: np.ndarray) -> None:
    first, second = (prune(model, table, resolve(table, {"*": 0.4}), scores) for _ in range(2))
    assert first[1].kept == second[1].kept
    states = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_plan_file_by_pattern(model: nn.Module, table: LayerTable, scores: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"ratios": {"model.4.*": 0.3, "model.4.cv2": 0.5}}')  # as written by hand
    _, plan = prune(model, table, resolve(table, Plan.load(path).ratios), scores)
    assert plan.ratios == {
        "model.4.cv1": 0.25, "model.4.cv2": 0.5, "model.4.m.0.cv1": 0.25, "model.4.m.0.cv2": 0.25,
        "model.4.m.1.cv1": 0.25, "model.4.m.1.cv2": 0.25,
    }  # fmt: skip


def test_what_a_plan_file_holds(model: nn.Module, table: LayerTable, scores: np.ndarray, tmp_path: Path) -> None:
    pruned, plan = prune(model, table, resolve(table, {"*": 0.5}), scores)
    plan.save(tmp_path / "new" / "plan.json")
    content = json.loads((tmp_path / "new" / "plan.json").read_text())
    assert set(content) == {"schema_version", "hash", "ratios", "kept"}
    assert content["schema_version"] == 1
    assert content["ratios"] == plan.ratios
    for name, indices in content["kept"].items():
        assert indices == sorted(set(indices))
        assert len(indices) == pruned.get_submodule(name).out_channels
    assert Plan.load(tmp_path / "new" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]  # no temporary file left


def test_the_hash_is_of_the_ratios_alone() -> None:
    plan = Plan({"model.5": 0.25, "model.1": 0.5})
    assert plan.hash == hashlib.sha256(b'[["model.1", "0.500000"], ["model.5", "0.250000"]]').hexdigest()[:16]
    assert plan.hash == Plan({"model.1": 0.5, "model.5": 0.25}).hash  # in any order
    assert plan.hash == Plan({"model.1": 0.5, "model.5": 0.25 + 1e-9, "model.7": 0.0}).hash
    assert plan.hash == Plan(plan.ratios, {"model.1.conv": (0, 1)}).hash
    assert plan.hash != Plan({"model.1": 0.5, "model.5": 0.26}).hash


def test_size_and_branches_are_part_of_a_plan_and_of_its_hash(tmp_path: Path) -> None:
    """Of one without them the hash is what it was; a file without them is of a plan without them."""
    ratios = {"model.1": 0.5}
    plans = [Plan(ratios), Plan(ratios, imgsz=256), Plan(ratios, imgsz=224), Plan(ratios, branches=("b", "a"))]
    assert len({plan.hash for plan in plans}) == 4
    assert plans[3].hash == Plan(ratios, branches=("a", "b")).hash
    full = Plan(ratios, {"model.1.conv": (0, 1)}, 256, ("model.2.m.0",))
    full.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert (content["imgsz"], content["branches_removed"]) == (256, ["model.2.m.0"])
    assert Plan.load(tmp_path / "plan.json") == full
    # What earlier versions wrote of squares
    ratios = {"model.1": 0.5, "model.5": 0.25}
    assert Plan(ratios, imgsz=256, branches=("b",)).hash == "58ca69ed587eaa63"


def test_a_plan_for_a_rectangle_is_a_list_in_its_file(tmp_path: Path) -> None:
    plan = Plan({"model.1": 0.5}, imgsz=(384, 640))
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["imgsz"] == [384, 640]
    assert Plan.load(tmp_path / "plan.json") == plan
    assert len({plan.hash, *(Plan(plan.ratios, imgsz=size).hash for size in (384, 640, (640, 384)))}) == 4
    for wrong in ([384, 640, 3], "wide", 0, 1.5):
        content = {"ratios": {}, "imgsz": wrong}
        with pytest.raises(PlanError, match="the plan: the image size must be a side in pixels, or height"):
            Plan.from_json(content)


def test_canonical_ratios_are_equal_exactly_for_equal_widths(table: LayerTable) -> None:
    a, b, c = (canonical_ratios(table, resolve(table, {"model.*": r})) for r in (0.30, 0.31, 0.45))
    assert a == b != c
    assert Plan(a).hash == Plan(b).hash != Plan(c).hash


def test_an_edited_plan_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan({"model.1": 0.5}).save(path)
    path.write_text(path.read_text().replace("0.5", "0.25"))
    with pytest.raises(PlanError, match="was changed after it was written"):
        Plan.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"ratio": 1}',
        "{",
        '{"ratios": {"a": "x"}}',
        '{"schema_version": 9, "ratios": {}}',
        '{"ratios": {}, "kept": {"a": 3}}',
        '{"ratios": {}, "kept": [1]}',
        '{"ratios": {}, "kept": {"a": ["0"]}}',
        '{"ratios": {}, "kept": {"a": [0.5]}}',
        '{"ratios": {}, "kept": {"a": [-1]}}',
        '{"ratios": {}, "kept": {"a": [1, 1]}}',
        '{"ratios": {}, "hash": 7}',
        '{"ratios": {}, "imgsz": "256"}',
        '{"ratios": {}, "branches_removed": "model.2.m.0"}',
        '{"ratios": {"a": %s}}' % ("9" * 401),
        '{"ratios": {"a": [0.5]}}',
        '{"ratios": {"a": true}}',
        '{"ratios": {"a": NaN}}',
        '{"ratios": ' * 100_000,
        "\udcff",
    ],
    ids=lambda text: text[:40],
)
def test_a_broken_plan_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400
