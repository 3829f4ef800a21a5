"""Recovery without gradients, against closed forms and networks whose answer is known."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics.nn.modules import Conv

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.graph.patches import gather_patches
from paretoprune.pruning.recovery import refit as refit_module
from paretoprune.pruning.recovery.least_squares import Moments, solve_by_output, solve_ridge
from paretoprune.pruning.recovery.refit import RefitSettings, Targets, recalibrate_batch_norm, refit
from paretoprune.pruning.recovery.refit_targets import images_that_fit, record_targets
from paretoprune.pruning.surgery.layer_table import build_layer_table
from paretoprune.pruning.surgery.surgery import prune, resolve
from paretoprune.pruning.workbench import Workbench
from tests.pruning.masking import build

pytestmark = pytest.mark.slow

TIGHT = RefitSettings(positions=500, ridge=1e-9)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build("yolov8n")


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LayerTable:
    return build_layer_table(model)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def responses(model: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def response_error(a: nn.Module, b: nn.Module, layer: str, images: torch.Tensor) -> float:
    """Root mean square difference of a layer's responses, relative to their standard deviation."""
    x, y = responses(a, layer, images), responses(b, layer, images)
    return float((x - y).square().mean().sqrt() / x.std())


def test_outputs_that_count_observations_differently_get_their_own_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 5, generator=draw)
    x -= x.mean(1, keepdim=True)
    y = torch.randn(2, 400, 3, generator=draw) + x @ torch.randn(2, 5, 3, generator=draw)
    counts = torch.rand(2, 400, 3, generator=draw) + 0.05
    start, penalty = torch.randn(2, 5, 3, generator=draw), 7.0
    shared = x.transpose(1, 2) @ x + penalty * torch.eye(5)
    factor = torch.linalg.cholesky(shared.double())
    dw, db = solve_by_output(x, counts * y, counts, 0 - start, factor, torch.tensor(penalty), steps=20)
    for system in range(2):
        for output in range(
            3
        ):  # (A'WA + penalty) v = A'Wy + penalty * start, A with a column of ones for the intercept
            a = torch.cat([x[system], torch.ones(400, 1)], dim=1).double()
            weighed = a * counts[system, :, output, None]
            left = weighed.T @ a + penalty * torch.diag(torch.tensor([1.0] * 5 + [0.0]))
            right = weighed.T @ y[system, :, output].double() + penalty * F.pad(start[system, :, output], (0, 1))
            expected = torch.linalg.solve(left, right)
            torch.testing.assert_close(dw[system, :, output].double(), expected[:5], atol=1e-4, rtol=1e-4)
            assert float(db[system, 0, output]) == pytest.approx(float(expected[5]), abs=1e-4)


def test_moments_in_chunks_give_ordinary_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 500, 7, generator=g) + 3, torch.randn(1, 7, 4, generator=g)
    y = x @ w + torch.randn(1, 1, 4, generator=g) + 0.1 * torch.randn(1, 500, 4, generator=g)
    moments = Moments.about(x[:, :50], y[:, :50])
    for start in range(0, 500, 50):
        moments.add(x[:, start : start + 50], y[:, start : start + 50])
    found = solve_ridge(moments, torch.zeros(1, 7, 4), torch.zeros(1, 1, 4), 0.0)
    design = torch.cat([x[0], torch.ones(500, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, y[0].double()).solution
    assert torch.allclose(found.weights[0], expected[:7], atol=1e-4)
    assert torch.allclose(found.intercept[0, 0], expected[7], atol=1e-4)
    rest = y[0].double() - design @ expected
    centred = y[0].double() - y[0].double().mean(0)
    assert found.missed == pytest.approx(float(rest.square().sum() / centred.square().sum()), rel=1e-3)
    assert found.missed_before == pytest.approx(float(y.double().square().sum() / centred.square().sum()), rel=1e-3)


def test_a_heavy_ridge_keeps_the_weights() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, start = torch.randn(1, 100, 5, generator=g), torch.randn(1, 100, 2, generator=g), torch.randn(1, 5, 2)
    moments = Moments.about(x, y)
    moments.add(x, y)
    assert torch.allclose(solve_ridge(moments, start, torch.zeros(1, 1, 2), 1e9).weights, start.double(), atol=1e-6)


def test_outputs_that_share_an_intercept_get_one_and_the_weights_for_it() -> None:
    """An input that hardly varies: a free intercept per output would do its work, a shared one cannot."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 3, generator=g) * torch.tensor([1.0, 1.0, 1e-3]) + 1
    w = torch.randn(1, 3, 4, generator=g)
    moments = Moments.about(x, y := x @ w + torch.tensor([0.5, 0.5, -0.5, -0.5]))
    moments.add(x, y)
    found = solve_ridge(moments, torch.zeros(1, 3, 4), torch.zeros(1, 1, 4), 1e-2, shared=2)
    pairs = found.intercept[0, 0].reshape(2, 2)
    rest = y.double() - x.double() @ found.weights - found.intercept
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert float(rest.square().mean().sqrt()) < 0.01
    assert found.missed == pytest.approx(float(rest.square().sum() / (y - y.mean(1)).square().sum()), rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 4, 2)]
)
def test_patches_are_what_the_convolution_sees(kernel: int, stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation)
    source = torch.randn(2, 3, 16, 16)
    out = conv(source)
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (2, *out.shape[2:])), indexing="ij"), -1).reshape(
        -1, 3
    )
    rows = F.pad(source, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
    patches = gather_patches(rows, conv, places)
    computed = patches.transpose(1, 2).flatten(1) @ conv.weight.flatten(1).T + conv.bias
    assert torch.allclose(computed, out[places[:, 0], :, places[:, 1], places[:, 2]], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name", "reader"),
    [
        ("yolov8n", "model.1", "model.2.cv1"),
        ("yolov8n", "model.16", "model.18.cv1"),
        ("yolov8n", "model.22.cv2.0.0", "model.22.cv2.0.1"),
        ("yolov8n-seg", "model.22.proto.cv1", "model.22.proto.upsample"),
        ("yolov8n-cls", "model.9.conv", "model.9.linear"),
    ],
)
def test_redundant_channels_can_be_removed_without_a_trace(
    images: torch.Tensor, family: str, name: str, reader: str
) -> None:
    """The second half of a layer repeats the first: the consumers can use the first for both, and refit finds it."""
    model = build(family)
    conv = model.get_submodule(name)
    half = conv.conv.out_channels // 2  # type: ignore[union-attr, operator]
    with torch.no_grad():
        conv.conv.weight[half:] = conv.conv.weight[:half]  # type: ignore[union-attr, index, operator]
        for tensor in (conv.bn.weight, conv.bn.bias, conv.bn.running_mean, conv.bn.running_var):  # type: ignore[union-attr]
            tensor[half:] = tensor[:half]  # type: ignore[index]
    table = build_layer_table(model)
    scores = np.zeros(table.class_count)
    scores[table.convs[f"{name}.conv"].outputs[:half]] = 1
    pruned, plan = prune(model, table, resolve(table, {name: 0.5}), scores)
    damaged = response_error(model, pruned, reader, images)
    refit(pruned, table, plan.kept, record_targets(model, table, images, TIGHT), TIGHT)
    assert response_error(model, pruned, reader, images) < min(0.05, damaged / 10)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("yolov8n", "model.2.m.0.cv1"),
        ("yolov8n with groups", "model.3"),
        ("yolov8n", "model.22.cv3.1.2"),
        ("yolo11n", "model.10.m.0.attn.qkv"),
        ("yolo11n", "model.10.m.0.attn.pe"),
        ("yolo11n", "model.10.m.0.attn.proj"),
        ("yolo11n", "model.23.cv3.0.0.0"),
        ("yolov8n-cls", "model.9.linear"),
    ],
)
def test_whatever_kind_of_layer_is_wrong_is_put_right(images: torch.Tensor, family: str, name: str) -> None:
    """Dense, grouped and depthwise convolutions, attention's projections, a head's outputs, a linear layer."""
    model: Any = build(family.removesuffix(" with groups"))
    if family.endswith("groups"):
        model.model[3].conv = nn.Conv2d(model.model[3].conv.in_channels, 64, 3, 2, 1, groups=4, bias=False)
    table = build_layer_table(model)
    twin = copy.deepcopy(model)
    wrong: Any = twin.get_submodule(name)
    wrong = getattr(wrong, "conv", wrong)
    with torch.no_grad():
        wrong.weight += wrong.weight.std() * torch.randn(wrong.weight.shape, generator=torch.Generator().manual_seed(3))
    damaged = response_error(model, twin, name, images)
    refit(twin, table, {}, record_targets(model, table, images, TIGHT), TIGHT)
    assert damaged > 0.1
    assert response_error(model, twin, name, images) < 0.01


def test_a_batch_norm_that_follows_in_a_plain_sequence_takes_up_the_intercept(images: torch.Tensor) -> None:
    """RT-DETR's projections into its decoder: convolutions without bias, and no wrapper that names their norm."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), nn.SiLU()).eval()
    table: Any = SimpleNamespace(convs={"0.0": None}, linears={}, features={})
    targets = record_targets(network, table, images, TIGHT)
    twin: Any = copy.deepcopy(network)
    with torch.no_grad():
        twin[0][0].weight.mul_(-2)
    assert response_error(network, twin, "0", images) > 0.1
    assert set(refit(twin, table, {}, targets, TIGHT)) == {"0.0"}
    assert response_error(network, twin, "0", images) < 0.01


def test_a_refit_is_the_least_squares_behind_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs cannot give all answers exactly: what is missed should lie where SiLU lets the least of it through.

    Beside the optimum that a general optimiser (L-BFGS) finds for the error behind the activation.
    """
    torch.manual_seed(2)
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(8, 6, 24, 24, generator=draw)
    wide, narrow = Conv(6, 12, 3).eval(), Conv(3, 12, 3).eval()  # the second sees half of the channels
    with torch.no_grad():
        wide.bn.running_mean.normal_(generator=draw)
        wide.bn.weight.uniform_(0.5, 3, generator=draw)
        narrow.bn.load_state_dict(wide.bn.state_dict())
        narrow.conv.weight.copy_(wide.conv.weight[:, :3])
    table: Any = SimpleNamespace(convs={"0.conv": None}, linears={}, features={})
    settings = RefitSettings(positions=576, ridge=1e-6)
    wanted = record_targets(nn.Sequential(wide).eval(), table, images, settings)
    goal = wide(images).detach()

    def error(rounds: int) -> float:
        twin = nn.Sequential(copy.deepcopy(narrow)).eval()
        monkeypatch.setattr(refit_module, "_ROUNDS", rounds)
        refit(twin, table, {}, Targets(images[:, :3], wanted.samples), settings)
        return (twin(images[:, :3]) - goal).square().mean().item()

    best = copy.deepcopy(narrow)
    bias = best.bn.bias.requires_grad_(True)
    optimiser = torch.optim.LBFGS([best.conv.weight.requires_grad_(True), bias], max_iter=200)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        found = (best(images[:, :3]) - goal).square().mean()
        found.backward()
        return found.detach()

    optimiser.step(loss)  # type: ignore[arg-type]
    optimum = loss().item()
    rounds = refit_module._ROUNDS
    before, after = error(0), error(rounds)
    assert before > 1.01 * optimum
    assert after == pytest.approx(optimum, rel=1e-3)


def test_an_unpruned_network_is_not_changed(model: nn.Module, table: LayerTable, images: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    missed = refit(twin, table, {}, record_targets(model, table, images, TIGHT), TIGHT)
    assert max(missed.values()) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov10n", "yolov9t"])
def test_a_refit_brings_the_responses_nearer(name: str, images: torch.Tensor) -> None:
    """On images it did not see, also with depthwise convolutions, attention and re-parametrised sums."""
    model = build(name)
    table = build_layer_table(model)
    scores = np.random.default_rng(0).random(table.class_count)
    settings = RefitSettings(positions=250, ridge=1e-2)
    plain, plan = prune(model, table, resolve(table, {"*": 0.25}), scores)
    better = copy.deepcopy(plain)
    missed = refit(better, table, plan.kept, record_targets(model, table, images, settings), settings)
    assert len(missed) > 40
    unseen = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    head = f"model.{len(model.model) - 1}"  # type: ignore[arg-type]

    def features(network: nn.Module) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = network.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        with torch.no_grad():
            network(unseen)
        handle.remove()
        return seen[0]

    kept = list(plan.kept.get(f"{_feeding(model)}", range(features(model).shape[1])))
    wanted = features(model)[:, kept]
    error = [float((features(n) - wanted).square().mean() / wanted.var()) for n in (plain, better)]
    assert error[1] < 0.7 * error[0]


def _feeding(model: nn.Module) -> str:
    """Name of the convolution whose output is the head's first input."""
    block = list(model.model)[-1].f[0]  # type: ignore[arg-type]
    last = [n for n, m in model.get_submodule(f"model.{block}").named_modules() if isinstance(m, nn.Conv2d)]
    name = "cv4.conv" if "cv4.conv" in last else ("cv2.conv" if "cv2.conv" in last else last[-1])
    return f"model.{block}.{name}"


def test_an_image_left_over_weighs_no_more_than_the_others_in_the_statistics() -> None:
    network: Any = nn.Sequential(nn.BatchNorm2d(1)).eval()
    images = torch.cat([torch.zeros(16, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    recalibrate_batch_norm(network, images, chunk=16)
    assert float(network[0].running_mean) == pytest.approx(1 / 17, rel=0.1)


def test_recalibrated_statistics_are_the_images_own(model: nn.Module, images: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    recalibrate_batch_norm(twin, images, chunk=len(images))
    with torch.no_grad():
        first = twin.model[0].conv(images)  # type: ignore[index, union-attr, operator]
    assert torch.allclose(twin.model[0].bn.running_mean, first.mean((0, 2, 3)), atol=1e-4)  # type: ignore[index, union-attr, arg-type]
    assert torch.allclose(twin.model[0].bn.running_var, first.var((0, 2, 3)), rtol=1e-3)  # type: ignore[index, union-attr, arg-type]
    assert twin.model[0].bn.momentum == model.model[0].bn.momentum  # type: ignore[index, union-attr]
    assert not any(m.training for m in twin.modules())


def test_recording_does_not_touch_the_baseline(
    model: nn.Module, table: LayerTable, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails on the way, what comes next finds it on the CPU, as it was."""
    bench = Workbench("unread.pt", device="meta")
    vars(bench).update(model=model, table=table, images=images, class_weights=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((RuntimeError, NotImplementedError)):  # what is on the meta device has no values
        _ = bench.targets
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


@pytest.fixture(scope="module")
def weighted(model: nn.Module, table: LayerTable, images: torch.Tensor) -> Targets:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("paretoprune.pruning.recovery.refit_targets._ENOUGH", 1)
        return record_targets(model, table, images, TIGHT)


def test_weighted_targets_are_the_unpruned_networks_answers_too(
    model: nn.Module, table: LayerTable, images: torch.Tensor, weighted: Targets
) -> None:
    plain = record_targets(model, table, images, TIGHT)
    assert plain.samples.keys() == weighted.samples.keys()
    for name, sample in weighted.samples.items():
        assert torch.equal(sample.places, plain.samples[name].places)
        assert torch.allclose(sample.answers, plain.samples[name].answers, atol=1e-4)
        assert plain.samples[name].weights is None
        assert sample.weights is not None
        assert sample.weights.shape == (len(sample.places),)
        assert 0.3 < float(sample.weights.mean()) < 1.5
    towers = [weighted.samples[f"model.22.{tower}.0.0.conv"].weights for tower in ("cv2", "cv3")]
    assert towers[0] is towers[1]  # they read one tensor, so they share its sums
    twin = copy.deepcopy(model)
    assert max(refit(twin, table, {}, weighted, TIGHT).values()) < 1e-5  # nothing is missing, however it is weighed


def test_a_position_counts_by_the_probes_slope_there(
    model: nn.Module, table: LayerTable, images: torch.Tensor, weighted: Targets
) -> None:
    from paretoprune.pruning.importance.gradients import loss_model
    from paretoprune.pruning.importance.output_fisher import output_probe

    name, probed = "model.5.conv", loss_model(model, "cpu")
    slopes: list[torch.Tensor] = []
    probed.get_submodule(name).register_forward_hook(lambda _, __, out: out.register_hook(slopes.append) and None)
    output_probe(probed, images, torch.Generator().manual_seed(0)).backward()
    image, row, column = weighted.samples[name].places.unbind(1)
    expected = slopes[0][image, :, row, column].norm(dim=1)
    found = weighted.samples[name].weights
    assert found is not None
    inner = (found > 0.021) & (found < 19.9)  # within the bounds
    ratio = found[inner] / expected[inner]
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)


def test_a_head_whose_outputs_are_unknown_is_refitted_without_weights(
    model: nn.Module, table: LayerTable, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paretoprune.pruning.recovery.refit_targets._ENOUGH", 1)
    own: Any = copy.deepcopy(model)
    own.model[-1].register_forward_hook(lambda _, __, output: (output[0], {"boxes": output[1]["boxes"]}))
    assert all(sample.weights is None for sample in record_targets(own, table, images, TIGHT).samples.values())


def test_a_weighted_solve_is_the_weighted_regression() -> None:
    random = np.random.default_rng(0)
    x, weights = random.normal(size=(500, 3)), random.uniform(0, 3, 500)
    y = x @ random.normal(size=(3, 2)) + 0.7 + random.normal(size=(500, 2)) * (x[:, :1] ** 2)
    tensors = [torch.from_numpy(a).float()[None] for a in (x, y)]
    moments = Moments.about(tensors[0][:, :50], tensors[1][:, :50])
    for start in range(0, 500, 50):
        part = slice(start, start + 50)
        moments.add(tensors[0][:, part], tensors[1][:, part], torch.from_numpy(weights[part]).float())
    solution = solve_ridge(moments, torch.zeros(1, 3, 2), torch.zeros(1, 1, 2), ridge=1e-12)
    root = np.sqrt(weights)[:, None]
    best = np.linalg.lstsq(root * np.c_[x, np.ones(500)], root * y, rcond=None)[0]
    assert np.allclose(solution.weights[0].numpy(), best[:3], atol=1e-4)
    assert np.allclose(solution.intercept[0].numpy(), best[3:], atol=1e-4)


def test_thinned_targets_are_those_of_fewer_images(table: LayerTable, weighted: Targets) -> None:
    thin = weighted.thinned(3)
    assert torch.equal(thin.images, weighted.images[[0, 4, 7]])
    for name in ("model.5.conv", "model.22.cv3.2.2"):
        whole, part = weighted.samples[name], thin.samples[name]
        known = {
            tuple(place): (answer, weight)
            for place, answer, weight in zip(whole.places.tolist(), whole.answers, whole.weights, strict=True)
        }
        assert set(part.places[:, 0].tolist()) == {0, 1, 2}
        for place, answer, weight in zip(part.places.tolist(), part.answers, part.weights, strict=True):
            known_answer, known_weight = known[([0, 4, 7][place[0]], place[1], place[2])]
            assert torch.equal(known_answer, answer)
            assert known_weight == weight
    assert thin.samples["model.22.cv2.0.0.conv"].places is thin.samples["model.22.cv3.0.0.conv"].places


def test_real_detector_without_a_gradient_step(assets: Path) -> None:
    """A fifth of the channels gone: plain removal loses most of 0.612, the refit brings most of it back."""
    from paretoprune.pruning.evaluation.evaluator import evaluate

    data = str(assets / "bccd" / "data.yaml")
    bench = Workbench(str(assets / "weights" / "bccd_yolov8n.pt"), data, imgsz=320, calibration_images=32)
    plain, plan = bench.prune({"*": 0.2})
    recovered = copy.deepcopy(plain)
    bench.recover(recovered, plan, "refit")
    before, after = (evaluate(m, data, 320, "cpu")["map50_95"] for m in (plain, recovered))
    assert before < 0.3
    assert after > 0.5


@pytest.mark.parametrize(("memory_gb", "count"), [(100.0, 8), (1e-9, 1), (0.004, None)])
def test_memory_bounds_the_images(model: nn.Module, images: torch.Tensor, memory_gb: float, count: int | None) -> None:
    kept = images_that_fit(model, images, memory_gb)
    assert len(kept) == count if count else 1 < len(kept) < 8
    assert torch.equal(kept[0], images[0])
    held = {number: sizes for number, sizes in block_sizes(model, images[:1]).items() if number in model.save}  # type: ignore[operator]
    assert len(kept) * sum(held.values()) <= max(memory_gb * 1e9, sum(held.values()))


def block_sizes(model: nn.Module, image: torch.Tensor) -> dict[int, int]:
    sizes: dict[int, int] = {}
    handles = [
        block.register_forward_hook(
            lambda _, __, out, n=n: sizes.update({n: out.nbytes} if hasattr(out, "nbytes") else {})
        )
        for n, block in enumerate(model.model)  # type: ignore[arg-type]
    ]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return sizes
