"""The two ways that do not look at the graph: removing naively and undoing, and writing zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from paretoprune.base.errors import first_line
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies import get_strategy
from paretoprune.pruning.strategies.mask import apply_mask
from paretoprune.pruning.strategies.skip import first_mismatch
from paretoprune.pruning.surgery.surgery import classes_from_kept
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import plain_copy
from tests.pruning.recovery_material import same_weights, weights
from tests.pruning.strategies_material import RATIOS, CountingTune, difference, make_bench, run, shapes_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("model.2.cv1", "model.2.m.0.cv1.conv: Given groups=1"),  # cut in two: no convolution reads all of it
        ("model.4.m.0.cv2", "model.4.m.0: The size of tensor a (16) must match"),  # added to what came before
        ("model.4.cv2", "model.15.cv1.conv: Given groups=1"),  # a second reader, behind a concatenation
        ("model.9.cv1", "model.9.cv2.conv: Given groups=1"),  # pooled and concatenated
        ("model.21.cv2", "model.22.cv3.2.0.conv: Given groups=1"),  # two branches of the head
    ],
)
def test_what_does_not_fit_is_undone_and_says_where(bench: Workbench, layer: str, words: str, tmp_path: Path) -> None:
    outcome = run("skip", bench, tmp_path, ratios={layer: 0.5})
    assert outcome.layers == ()
    assert outcome.plan == Plan({})
    ((skipped, reason),) = outcome.skipped
    assert skipped == layer
    assert reason.startswith(words)
    assert same_weights(weights(outcome.model), weights(bench.model))


@pytest.mark.parametrize("layer", ["model.0", "model.3", "model.4.m.1.cv1", "model.2.cv2", "model.22.cv2.0.1"])
def test_where_one_convolution_follows_another_it_is_structural_pruning(
    bench: Workbench, layer: str, tmp_path: Path
) -> None:
    naive, structural = (run(n, bench, tmp_path / n, ratios={layer: 0.5}) for n in ("skip", "structural"))
    assert naive.layers == (layer,)
    assert naive.skipped == ()
    assert naive.plan == structural.plan
    assert same_weights(weights(naive.model), weights(structural.model))


def test_it_goes_on_behind_a_skipped_layer(bench: Workbench, tmp_path: Path) -> None:
    outcome = run("skip", bench, tmp_path, ratios={"model.4.*": 0.5})
    assert set(outcome.layers) == {"model.4.m.0.cv1", "model.4.m.1.cv1"}
    assert {layer for layer, _ in outcome.skipped} == {
        "model.4.cv1",
        "model.4.cv2",
        "model.4.m.0.cv2",
        "model.4.m.1.cv2",
    }


def test_depthwise_neighbours_are_a_mismatch_too(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, "yolo11n", recoverable=False)
    ratios = {"model.23.cv3.0.0.0": 0.5, "model.23.cv3.0.0.1": 0.5}
    reasons = dict(run("skip", bench, tmp_path, ratios=ratios).skipped)
    assert "Given groups=64" in reasons["model.23.cv3.0.0.0"]
    assert "model.23.cv3.0.1.0.conv: Given groups=" in reasons["model.23.cv3.0.0.1"]


def test_a_probe_leaves_nothing_behind(bench: Workbench) -> None:
    model = plain_copy(bench.model)
    before = weights(model)
    assert first_mismatch(model) == ""
    assert same_weights(weights(model), before)
    assert not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_branch_that_only_training_takes_is_probed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.a(x)
            return self.b(y) if self.training else y

    assert first_mismatch(Branching()).startswith("b: Given groups=1")


def test_a_reason_is_one_line_of_bearable_length() -> None:
    assert first_line(RuntimeError("  shapes   differ\nmore of it")) == "shapes differ"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(RuntimeError("x" * 1000))) == 200


@pytest.mark.parametrize("recover", ["none", "bn", "refit"])
def test_masked_it_computes_what_the_pruned_network_computes(bench: Workbench, recover: str, tmp_path: Path) -> None:
    """The control starts where the product starts, also recovered: only the architecture differs."""
    masked, pruned = (run(n, bench, tmp_path / n, recover=recover) for n in ("mask", "structural"))
    assert difference(masked.model, pruned.model) < 1e-6
    assert masked.plan == pruned.plan
    assert shapes_of(masked.model) == shapes_of(bench.model)
    assert shapes_of(pruned.model) != shapes_of(bench.model)


@pytest.mark.parametrize("name", ["yolo11n", "yolov10n", "yolov9t"])
def test_other_families_are_masked_and_embedded_alike(name: str, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, name)
    masked, pruned = (run(n, bench, tmp_path / n, recover="refit", ratios={"*": 0.3}) for n in ("mask", "structural"))
    assert difference(masked.model, pruned.model) < 1e-6


def test_training_revives_what_was_zeroed_and_the_mask_is_applied_again(bench: Workbench, tmp_path: Path) -> None:
    """A gradient step moves the zeros of the network that is handed to the tuning; the result has them again."""

    def one_step(model: nn.Module, epochs: int, folder: Path) -> nn.Module:
        tuned = plain_copy(model)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        sum(t.square().mean() for t in tuned(images)[1].values() if isinstance(t, torch.Tensor)).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert _revived(tuned, bench, plan) > 0
        return tuned

    plan = bench.prune(RATIOS)[1]
    outcome = get_strategy("mask").run(bench, RATIOS, 1, tmp_path, one_step, "none")
    assert outcome.epochs == 1
    assert _revived(outcome.model, bench, plan) == 0
    assert not same_weights(weights(outcome.model), weights(bench.model))


def _revived(model: nn.Module, bench: Workbench, plan: Plan) -> int:
    """How many of the tensors that hold removed channels are not what the mask makes of them."""
    again = plain_copy(model)
    apply_mask(again, bench.table, classes_from_kept(bench.table, plan.kept))
    before, after = weights(model), weights(again)
    return sum(not torch.equal(before[name], after[name]) for name in before)


def test_a_mask_is_kept_through_a_counted_tuning(bench: Workbench, tmp_path: Path) -> None:
    tune = CountingTune()
    outcome = run("mask", bench, tmp_path, 2, tune)
    assert tune.shapes == [shapes_of(bench.model)]
    assert _revived(outcome.model, bench, outcome.plan) == 0
