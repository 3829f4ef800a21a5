"""Importance criteria: the contract of all of them, and each against its definition computed another way."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.data.calibration import Calibration, load_calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.graph.layers import ALWAYS, LayerTable
from paretoprune.pruning.importance import CRITERIA, Evidence, score
from paretoprune.pruning.importance.base import criterion
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import choose_kept, prune, remove, resolve
from tests.pruning.masking import build
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import SmoothLoss, tiny_calibration, tiny_model

RESIDUAL = 1  # the part of group model.2.cv1 that two convolutions give: a residual sum


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


@pytest.fixture(scope="module")
def calibration(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return tiny_calibration(tmp_path_factory.mktemp("calibration") / "shapes", model)


class CriterionContract:
    """What every criterion promises. A subclass says which one in `name`."""

    @pytest.fixture
    def name(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def evidence(self, model: nn.Module, table: LayerTable, calibration: Calibration) -> Evidence:
        return Evidence(model, table, calibration, seed=3)

    def test_one_finite_score_per_class(self, name: str, evidence: Evidence) -> None:
        scores = score(name, evidence)
        assert scores.shape == (evidence.table.class_count,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert scores[ALWAYS] == 0
        body = [group for group in evidence.table.groups if group.block < 4]  # a head may find no object to learn from
        assert all(np.ptp(scores[part]) > 0 for group in body for part in group.parts)

    def test_the_same_twice(self, name: str, evidence: Evidence) -> None:
        again = Evidence(evidence.model, evidence.table, evidence.calibration, evidence.seed)
        torch.rand(7)  # scores come from the evidence's seed, not from the global one
        assert np.array_equal(score(name, evidence), score(name, again))

    def test_the_model_is_not_changed(self, name: str, evidence: Evidence) -> None:
        before = copy.deepcopy(evidence.model)
        score(name, evidence)
        after = evidence.model
        states = zip(before.state_dict().values(), after.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        modules = zip(before.modules(), after.modules(), strict=True)
        assert all(a.training == b.training and len(a._forward_hooks) == len(b._forward_hooks) for a, b in modules)
        parameters = zip(before.parameters(), after.parameters(), strict=True)
        assert all(b.grad is None and a.requires_grad == b.requires_grad for a, b in parameters)

    def test_frozen_weights_do_not_matter(self, name: str, evidence: Evidence) -> None:
        frozen = copy.deepcopy(evidence.model).requires_grad_(False)  # as checkpoints come
        found = score(name, Evidence(frozen, evidence.table, evidence.calibration, evidence.seed))
        assert np.array_equal(found, score(name, evidence))

    def test_without_data_it_works_or_says_what_is_missing(self, name: str, evidence: Evidence) -> None:
        blind = Evidence(evidence.model, evidence.table, None, evidence.seed)
        if not CRITERIA[name].needs_data:
            assert np.array_equal(score(name, blind), score(name, evidence))
            return
        with pytest.raises(PruningError, match=f"importance '{name}' looks at images, but no dataset") as error:
            score(name, blind)
        assert "\n" not in str(error.value)

    def test_surgery_takes_it(self, name: str, evidence: Evidence) -> None:
        table = evidence.table
        widths = resolve(table, {"*": 0.5}, round_to=1)
        scores = score(name, Evidence(evidence.model, table, evidence.calibration))
        stays = choose_kept(table, widths, scores)
        pruned = remove(evidence.model, table, stays)
        assert pruned.model[1].conv.out_channels == 8  # type: ignore[index, union-attr]
        part = table.group_of["model.1"].parts[0]
        assert scores[part[stays[part]]].min() >= scores[part[~stays[part]]].max()


class TestEveryCriterion(CriterionContract):
    @pytest.fixture(params=sorted(set(CRITERIA) - {"random"}))
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_channels_in_another_order_keep_their_scores(self, name: str, evidence: Evidence) -> None:
        order = np.random.default_rng(0).permutation(16)
        shuffled: Any = copy.deepcopy(evidence.model)
        first, following = shuffled.model[1], shuffled.model[2].cv1.conv
        with torch.no_grad():
            for tensor in (first.conv.weight, *first.bn.state_dict().values()):
                if tensor.ndim:
                    tensor.copy_(tensor[order].clone())
            following.weight.copy_(following.weight[:, order].clone())
        found = score(name, Evidence(shuffled, evidence.table, evidence.calibration, evidence.seed))
        part = evidence.table.group_of["model.1"].parts[0]
        assert found[part] == pytest.approx(score(name, evidence)[part[order]], rel=1e-3)


class TestRandom(CriterionContract):
    @pytest.fixture
    def name(self) -> str:
        return "random"

    def test_another_seed_other_scores(self, evidence: Evidence) -> None:
        other = Evidence(evidence.model, evidence.table, seed=evidence.seed + 1)
        assert not np.array_equal(score("random", evidence), score("random", other))


@pytest.mark.parametrize("name", ["yolov10n", "yolo26n", "yolov8n-seg", "yolo11n-obb", "rtdetr-l"])
def test_what_looks_at_the_loss_knows_every_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = importlib.import_module(
        "paretoprune.pruning.importance.reconstruction"
    )  # it reads them all; how well, others test
    monkeypatch.setattr(cheap, "_ROUNDS", 1)
    monkeypatch.setattr(cheap, "_LARGEST", 64)
    model = build(name)
    table = build_layer_table(model)
    data = shapes_dataset(tmp_path / "shapes", train=2, polygons=name.endswith(("seg", "obb")))
    calibration = load_calibration(str(data), model, 160 if name == "rtdetr-l" else 64, images=2)
    large = name == "rtdetr-l"  # minutes on a CPU
    criteria = ("taylor", "hessian") if large else ("taylor", "hessian", "reconstruction")
    for found in (score(c, Evidence(model, table, calibration)) for c in criteria):
        body = np.concatenate([part for group in table.groups for part in group.parts if group.block < 5])
        assert (found[body] > 0).mean() > 0.5  # a channel behind a ReLU may be silent


def test_an_unknown_criterion_is_refused_with_the_known_ones(model: nn.Module, table: LayerTable) -> None:
    with pytest.raises(PruningError, match=r"must be one of activation, bn, .*taylor, but got 'l3'"):
        score("l3", Evidence(model, table))


def test_a_score_that_is_not_finite_is_refused(model: nn.Module, table: LayerTable) -> None:
    broken: Any = copy.deepcopy(model)
    broken.model[1].bn.weight.data[4] = float("nan")
    with pytest.raises(PruningError, match="importance 'bn' is not finite for 1 channels"):
        score("bn", Evidence(broken, table))


def test_adding_a_criterion_is_a_function(model: nn.Module, table: LayerTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretoprune.pruning.importance.base.CRITERIA", dict(CRITERIA))

    @criterion("later channels first")
    def later(evidence: Evidence) -> np.ndarray:
        return np.arange(evidence.table.class_count)

    found = score("later channels first", Evidence(model, table))
    widths = resolve(table, {"model.1": 0.5}, round_to=1)
    assert prune(model, table, widths, found)[1].kept == {"model.1.conv": tuple(range(8, 16))}


def weight(model: nn.Module, name: str) -> np.ndarray:
    found: np.ndarray = model.get_submodule(name).weight.detach().double().numpy()  # type: ignore[operator]
    return found


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_sums_over_the_group(model: nn.Module, table: LayerTable, name: str, power: int) -> None:
    """Rows of what gives a class's channels and columns of what reads them, each convolution's mean made 1."""
    first = np.abs(weight(model, "model.2.cv1.conv")) ** power
    second = np.abs(weight(model, "model.2.m.0.cv2.conv")) ** power
    inner = np.abs(weight(model, "model.2.m.0.cv1.conv")) ** power
    last = np.abs(weight(model, "model.2.cv2.conv")) ** power
    rows_first, rows_second = first.sum((1, 2, 3)), second.sum((1, 2, 3))
    read_inner, read_last = inner.sum((0, 2, 3)), last.sum((0, 2, 3))
    # cv2 reads both halves of the chunk and the sum; the second half's classes are in the sum too
    expected = rows_first[8:] / rows_first.mean() + rows_second / rows_second.mean()
    expected += read_inner / read_inner.mean() + (read_last[8:16] + read_last[16:]) / read_last.mean()
    part = table.group_of["model.2.cv1"].parts[RESIDUAL]
    assert score(name, Evidence(model, table))[part] == pytest.approx(expected, rel=1e-5)


def test_bn_is_the_scale(model: nn.Module, table: LayerTable) -> None:
    found: Any = copy.deepcopy(model)
    found.model[1].bn.weight.data *= torch.tensor([1.0, -1.0]).repeat(8)
    expected = np.abs(weight(model, "model.1.bn"))
    assert score("bn", Evidence(found, table))[table.convs["model.1.conv"].outputs] == pytest.approx(expected)


def test_fpgm_is_the_sum_of_distances(model: nn.Module, table: LayerTable) -> None:
    filters = [f.ravel() for f in weight(model, "model.1.conv")]
    sums = np.array([sum(float(np.sqrt(((a - b) ** 2).sum())) for b in filters) for a in filters])
    found = score("fpgm", Evidence(model, table))[table.convs["model.1.conv"].outputs]
    assert found == pytest.approx(sums / sums.mean(), rel=1e-3)


def test_lamp_divides_by_all_that_is_not_smaller(model: nn.Module, table: LayerTable) -> None:
    squares, found = score("l2", Evidence(model, table)), score("lamp", Evidence(model, table))
    for group in table.groups:
        for part in group.parts:
            expected = [squares[c] / sum(squares[d] for d in part if squares[d] >= squares[c]) for c in part]
            assert found[part] == pytest.approx(expected, rel=1e-6)
            assert found[part].max() == pytest.approx(1)


def test_activation_is_the_mean_absolute_response(model: Any, table: LayerTable, calibration: Calibration) -> None:
    with torch.no_grad():
        responses = model.model[1](model.model[0](calibration.images)).abs().mean((0, 2, 3)).double().numpy()
    found = score("activation", Evidence(model, table, calibration))[table.convs["model.1.conv"].outputs]
    assert found == pytest.approx(responses / responses.mean(), rel=1e-4)


@pytest.mark.parametrize(("layer", "part"), [("model.1", 0), ("model.2.cv1", RESIDUAL), ("model.4.cv3.0.0", 0)])
def test_taylor_is_the_squared_slope_of_the_loss_by_a_gate(calibration: Calibration, layer: str, part: int) -> None:
    model: Any = tiny_model(SmoothLoss)
    table = build_layer_table(model)
    found = score("taylor", Evidence(model, table, calibration))
    exact = copy.deepcopy(model).double()
    images = [batch["img"].double() for batch in calibration.chunks(1)]
    share = 1 / len(images)  # the loss of a batch is a mean, in which every image has this share
    for c in table.group_of[layer].parts[part][:3].tolist():
        losses = [[gated_loss(exact, table, c, gate, image) for gate in (1.001, 0.999)] for image in images]
        expected = sum(((up - down) / 0.002 * share) ** 2 for up, down in losses)
        assert found[c] == pytest.approx(expected, rel=1e-2)


def gated_loss(model: Any, table: LayerTable, chosen: int, gate: float, image: torch.Tensor) -> float:
    """The loss with the class's channels multiplied by `gate` wherever a convolution gives them."""
    handles = []
    for name, channels in table.convs.items():
        factor = torch.from_numpy(np.where(channels.outputs == chosen, gate, 1.0))[:, None, None]
        site = model.get_submodule(table.layer_of[name])
        handles.append(site.register_forward_hook(lambda _, __, out, factor=factor: out * factor))
    with torch.no_grad():
        loss = float(model.loss({"img": image})[0])
    for handle in handles:
        handle.remove()
    return loss


def test_hessian_sums_half_of_fisher_times_square_over_what_surgery_removes(
    model: nn.Module, table: LayerTable, calibration: Calibration
) -> None:
    found = score("hessian", Evidence(model, table, calibration))
    rises = copy.deepcopy(model)  # every weight replaced by the rise of the loss that removing it costs
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    from paretoprune.pruning.importance.gradients import loss_model

    other = loss_model(model, "cpu")
    for batch in calibration.chunks(1):
        weights = dict(other.named_parameters())
        gradients = torch.autograd.grad(other.loss(batch)[0].sum(), list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += 0 if gradient is None else gradient.square()
    for name, parameter in rises.named_parameters():
        parameter.data = 0.5 * parameters[name].detach().square() * total[name] / len(calibration.images)
    for chosen in (part[0] for group in table.groups for part in group.parts):
        stays = np.ones(table.class_count, dtype=bool)
        stays[chosen] = False
        cost = everything(rises) - everything(remove(rises, table, stays))
        assert found[chosen] == pytest.approx(cost, rel=1e-4, abs=1e-9 * everything(rises))


def test_reconstruction_is_the_error_that_no_refit_can_mend(
    model: Any, table: LayerTable, calibration: Calibration
) -> None:
    """The channel of model.1 that goes first: its one reader's regression without it, solved anew."""
    from paretoprune.pruning.importance.gradients import loss_model
    from paretoprune.pruning.importance.output_fisher import output_probe, position_weights
    from paretoprune.pruning.importance.reconstruction import observe

    evidence = Evidence(model, table, calibration)
    scores, part = score("reconstruction", evidence), table.group_of["model.1"].parts[0]
    with torch.no_grad():
        seen = model.model[1](model.model[0](calibration.images)).permute(0, 2, 3, 1).flatten(0, 2).double()
    probed, slopes = loss_model(model, "cpu"), list[torch.Tensor]()
    probed.model[2].cv1.conv.register_forward_hook(lambda _, __, out: out.register_hook(slopes.append) and None)
    output_probe(probed, calibration.images, torch.Generator().manual_seed(evidence.seed)).backward()
    counts = position_weights(slopes[0].square().sum(1).flatten())
    moments = torch.cov(seen.T, correction=0, aweights=counts.double())
    moments.diagonal().add_(1e-2 * moments.diagonal().mean())
    scale = observe(evidence)[1]["model.2.cv1.conv"].sqrt()
    weights = (model.model[2].cv1.conv.weight[:, :, 0, 0].detach().double() * scale[:, None]).T
    errors = []
    for gone in range(16):
        keep = [c for c in range(16) if c != gone]
        best = torch.zeros_like(weights)
        best[keep] = torch.linalg.solve(moments[keep][:, keep], (moments @ weights)[keep])
        errors.append(float(((weights - best) * (moments @ (weights - best))).sum()))
    place = table.convs["model.2.cv1.conv"].inputs
    cheapest = int(np.argmin(errors))
    assert int(part[np.argmin(scores[part])]) == int(place[cheapest])
    assert scores[place[cheapest]] == pytest.approx(errors[cheapest], rel=0.1)  # it looks at a sample of the positions


def everything(model: nn.Module) -> float:
    return sum(float(p.detach().double().sum()) for p in model.parameters())


def test_an_idle_channel_is_worth_nothing_to_what_looks_at_its_effect(calibration: Calibration, tmp_path: Path) -> None:
    model: Any = tiny_model()
    model.model[2].cv1.conv.weight.data[:, 5] = 0  # nobody reads channel 5 of model.1
    table = build_layer_table(model)
    idle = table.convs["model.1.conv"].outputs[5]
    for name in ("taylor", "hessian"):
        assert score(name, Evidence(model, table, calibration))[idle] == 0
    scores = score("reconstruction", Evidence(model, table, calibration))
    assert scores[idle] < 1e-6 * np.median(scores[table.convs["model.1.conv"].outputs])
    assert score("activation", Evidence(model, table, calibration))[idle] > 0
