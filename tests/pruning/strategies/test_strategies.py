"""The strategies' contract, one suite for all five, and that `structural` is the product."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.errors import PlanError, PruningError
from paretoprune.pruning.names import STRATEGY_NAMES
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.strategies import STRATEGIES, Outcome, get_strategy
from paretoprune.pruning.strategies.common import touched
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.loading import model_stats
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.conftest import StockPython
from tests.pruning.masking import relative_error
from tests.pruning.recovery_material import CountingGate, same_weights, weights
from tests.pruning.strategies_material import (
    IMGSZ,
    RATIOS,
    CountingTune,
    difference,
    make_bench,
    run,
    shapes_of,
)

pytestmark = pytest.mark.slow

_STOCK = """
import os, sys
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false")
import numpy as np
from ultralytics import YOLO
path, data, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = YOLO(path)
before = sum(p.numel() for p in model.model.parameters())
metrics = model.val(data=data, imgsz=size, batch=4, device="cpu", workers=0, plots=False, verbose=False)
assert 0 <= metrics.box.map <= 1
image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
assert len(YOLO(path).predict(image, imgsz=size, device="cpu", verbose=False)) == 1
fused = YOLO(path).model.fuse(verbose=False)
assert fused.is_fused()
print(before)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return make_bench(tmp_path_factory.mktemp("bench"))


class StrategyContract:
    """What every strategy owes; a subclass names one and says how its widths are told."""

    name: str

    def check_widths(self, outcome: Outcome, bench: Workbench) -> None:
        """Every convolution of the plan has the outputs that the plan says, all others have theirs."""
        for conv in bench.table.convs:
            expected = outcome.plan.kept.get(conv, range(bench.model.get_submodule(conv).out_channels))
            assert outcome.model.get_submodule(conv).out_channels == len(expected), conv

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
        """Nothing recovered, nothing tuned."""
        return run(cls.name, bench, tmp_path_factory.mktemp(cls.name))

    def test_widths_or_masks_as_planned(self, plain: Outcome, bench: Workbench) -> None:
        assert plain.strategy == self.name
        assert plain.layers
        assert set(plain.layers) == set(plain.plan.ratios)
        convs = {conv for conv, layer in bench.table.layer_of.items() if layer in plain.layers}
        assert set(plain.plan.kept) == convs
        for conv, kept in plain.plan.kept.items():
            width = bench.model.get_submodule(conv).out_channels
            asked = plain.plan.ratios[bench.table.layer_of[conv]]
            assert len(kept) == pytest.approx(width * (1 - asked))  # type: ignore[operator]
        self.check_widths(plain, bench)

    def test_without_recovery_it_is_the_masked_baseline(self, plain: Outcome, bench: Workbench) -> None:
        """The oracle of all surgery: zeros where channels are gone, whatever took their place in the architecture."""
        models = [deepcopy(m).double() for m in (bench.model, plain.model)]  # so that rounding hides nothing
        images = torch.rand(2, 3, IMGSZ, IMGSZ).double()
        assert relative_error(*models, plain.plan.kept, images) < 1e-9

    def test_stock_ultralytics_takes_it(
        self, plain: Outcome, bench: Workbench, stock_python: StockPython, tmp_path: Path
    ) -> None:
        save_checkpoint(plain.model, tmp_path / "out.pt")
        done = stock_python(_STOCK, tmp_path / "out.pt", bench.data, IMGSZ)
        assert int(done.stdout.splitlines()[-1]) == sum(p.numel() for p in plain.model.parameters())

    @pytest.mark.parametrize("recover", ["bn", "refit+bn"])
    def test_recovered_and_tuned_it_is_finite_and_stock(self, recover: str, bench: Workbench, tmp_path: Path) -> None:
        before = weights(bench.model)
        outcome = run(self.name, bench, tmp_path, epochs=1, recover=recover)
        assert same_weights(weights(bench.model), before)
        self.check_widths(outcome, bench)
        assert not outcome.model.training
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in outcome.model.parameters())
        assert all(type(m).__module__.startswith(("torch.", "ultralytics.")) for m in outcome.model.modules())
        assert np.isfinite(difference(outcome.model, bench.model))

    def test_a_refit_brings_it_nearer_to_the_baseline(self, bench: Workbench, plain: Outcome, tmp_path: Path) -> None:
        refitted = run(self.name, bench, tmp_path, recover="refit")
        assert shapes_of(refitted.model) == shapes_of(plain.model)
        assert all(type(m).__module__.startswith(("torch.", "ultralytics.")) for m in refitted.model.modules())
        errors = [_feature_error(o.model, bench) for o in (plain, refitted)]
        assert errors[1] < 0.8 * errors[0]

    def test_it_keeps_to_the_memory_and_to_the_gate(self, bench: Workbench, tmp_path: Path) -> None:
        """Images that do not fit are as if they had not been given; who computes shares the device."""
        gate, inside, while_tuning = CountingGate(), set[int](), set[int]()
        scarce, alone = again(bench, memory_gb=0.0015, gate=gate), again(bench)
        alone.calibration, alone.images = Calibration({"img": scarce.images}), scarce.images
        assert 1 < len(scarce.images) < len(scarce.calibration.images)

        def tune(model: nn.Module, epochs: int, folder: Path) -> nn.Module:
            while_tuning.add(gate.inside)
            return model

        def recovered(bench: Workbench, name: str) -> dict[str, torch.Tensor]:
            return weights(get_strategy(self.name).run(bench, TWO, 2, tmp_path / name, tune, "refit+bn").model)

        hook = register_module_forward_pre_hook(lambda *_: inside.add(gate.inside))
        try:
            found = recovered(scarce, "scarce")
        finally:
            hook.remove()
        assert inside == {1}  # no layer of any network computes outside
        assert while_tuning == {0}  # a tuning takes the device by itself
        assert gate.entered > 10  # a measurement is let in between the parts
        assert gate.inside == 0
        assert same_weights(found, recovered(alone, "alone"))

    @pytest.mark.parametrize("epochs", [3, 7])
    def test_the_budget_is_spent_and_no_more(
        self, epochs: int, plain: Outcome, bench: Workbench, tmp_path: Path
    ) -> None:
        assert plain.epochs == 0
        tune = CountingTune()
        outcome = run(self.name, bench, tmp_path, epochs, tune)
        assert tune.epochs == outcome.epochs == epochs
        assert all(spent > 0 and tmp_path in folder.parents for spent, folder in tune.calls)
        assert len({folder for _, folder in tune.calls}) == len(tune.calls)

    def test_what_is_touched_is_cut_or_carries_a_reason(self, bench: Workbench, tmp_path: Path) -> None:
        ratios = {"*": 0.3, "model.0": 0.1}  # 0.1 of 8 channels is none; the head's last layers cannot lose any
        outcome = run(self.name, bench, tmp_path, ratios=ratios)
        skipped = dict(outcome.skipped)
        assert len(skipped) == len(outcome.skipped)
        assert set(skipped).isdisjoint(outcome.layers)
        assert set(skipped) | set(outcome.layers) == {layer.name for layer in bench.table.layers}
        assert all(reason and "\n" not in reason for reason in skipped.values())
        assert "fixed meaning for the Detect head" in skipped["model.22.cv2.0.2"]
        assert "the whole one (8) is nearest" in skipped["model.0"]

    @pytest.mark.parametrize("ratios", [{"model.1": 1.0}, {"model.99": 0.5}, {"model.22.cv2.0.2": 0.5}])
    def test_ratios_that_do_not_fit_are_refused(
        self, ratios: dict[str, float], bench: Workbench, tmp_path: Path
    ) -> None:
        tune = CountingTune()
        with pytest.raises(PlanError):
            run(self.name, bench, tmp_path, 5, tune, ratios=ratios)
        assert tune.calls == []

    def test_an_unknown_recovery_is_refused(self, bench: Workbench, tmp_path: Path) -> None:
        with pytest.raises(
            PruningError, match=r"must be one of none, bn, refit, refit\+bn, refit\+distill, but got 'x'"
        ):
            run(self.name, bench, tmp_path, recover="x")


class TestStructural(StrategyContract):
    name = "structural"

    def test_it_is_the_workbench_bit_for_bit(self, bench: Workbench, tmp_path: Path) -> None:
        expected, plan = bench.prune(RATIOS)
        bench.recover(expected, plan, "refit")
        outcome = run(self.name, bench, tmp_path, recover="refit")
        assert outcome.plan == plan
        assert same_weights(weights(outcome.model), weights(expected))


class TestSequential(StrategyContract):
    name = "sequential"


class TestAdapter(StrategyContract):
    name = "adapter"

    def check_widths(self, outcome: Outcome, bench: Workbench) -> None:
        """A cut convolution may have moved into a pair with its mapping; what the pair gives is the old width."""
        modules = dict(outcome.model.named_modules())
        for conv, layer in bench.table.layer_of.items():
            whole = bench.model.get_submodule(conv).out_channels
            paired = f"{layer}.0{conv[len(layer) :]}"
            kept = outcome.plan.kept.get(conv, range(whole))  # type: ignore[arg-type]
            assert (modules[paired] if paired in modules else modules[conv]).out_channels == len(kept)
            if paired in modules:
                mapping = modules[f"{layer}.1"]
                assert isinstance(mapping, nn.Conv2d)
                assert (mapping.in_channels, mapping.out_channels) == (len(kept), whole)


class TestSkip(StrategyContract):
    name = "skip"


class TestMask(StrategyContract):
    name = "mask"

    def check_widths(self, outcome: Outcome, bench: Workbench) -> None:
        assert shapes_of(outcome.model) == shapes_of(bench.model)
        assert model_stats(outcome.model, IMGSZ) == model_stats(bench.model, IMGSZ)
        for conv, kept in outcome.plan.kept.items():
            weight = outcome.model.get_submodule(conv).weight
            alive = weight.flatten(1).abs().sum(1) > 0  # type: ignore[union-attr, operator]
            assert np.flatnonzero(alive.numpy()).tolist() == list(kept)


TWO = {"model.3": 0.5, "model.4.cv1": 0.5}  # blocks; one of them with a mapping that stays


def again(bench: Workbench, memory_gb: float = 4.0, gate: CountingGate | None = None) -> Workbench:
    """A bench on the same files that has kept nothing yet."""
    settings = replace(bench.refit_settings, memory_gb=memory_gb)
    kind, count = bench.importance, bench.calibration_images
    path, data = bench.model_path, bench.data
    return Workbench(path, data, IMGSZ, "cpu", count, kind, bench.round_to, refit_settings=settings, gate=gate)


def _feature_error(model: nn.Module, bench: Workbench) -> float:
    """How far what enters the head is from the baseline's, relative to its variance, on images of no calibration."""
    images = torch.rand(4, 3, IMGSZ, IMGSZ, generator=torch.Generator().manual_seed(9))

    def features(network: nn.Module) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook: Callable[..., None] = lambda _, inputs: seen.append(inputs[0][0])  # noqa: E731
        handle = network.model[-1].register_forward_pre_hook(hook)  # type: ignore[index, union-attr]
        with torch.no_grad():
            network(images)
        handle.remove()
        return seen[0]

    wanted, got = features(bench.model), features(model)
    return float((wanted - got).square().mean() / wanted.var())


def test_a_strategy_is_found_by_its_name() -> None:
    assert tuple(STRATEGIES) == STRATEGY_NAMES
    assert all(get_strategy(name).name == name for name in STRATEGIES)
    with pytest.raises(PruningError, match="one of structural, sequential, adapter, skip, mask, but got 'x'"):
        get_strategy("x")


def test_touched_layers_are_those_that_the_surgery_would_take(bench: Workbench) -> None:
    ratios = {"model.3": 0.25, "model.*": 0.5, "model.5": 0.0, "model.[27]*": 0.0, "model.22.cv?.0.*": 0.25}
    found = touched(bench.table, ratios)
    assert "model.3" in found
    assert not {"model.5", "model.7", "model.2.cv1", "model.22.cv2.1.0"} & set(found)
    assert {"model.22.cv2.0.0", "model.22.cv2.0.2", "model.8.cv1"} <= set(found)
    assert list(found) == [layer.name for layer in bench.table.layers if layer.name in found]


@pytest.mark.parametrize("name", ["structural", "sequential", "adapter"])
def test_a_real_epoch(name: str, bench: Workbench, tmp_path: Path) -> None:
    """Fine-tuning takes what the strategies make, and the result keeps its architecture."""

    def tune(model: nn.Module, epochs: int, folder: Path) -> nn.Module:
        settings = FinetuneSettings(epochs=epochs, imgsz=IMGSZ, batch=4, workers=0)
        return finetune(model, str(bench.data), settings, folder).model

    outcome = get_strategy(name).run(bench, TWO, 1, tmp_path / "tuned", tune, "refit")
    plain = run(name, bench, tmp_path / "plain", recover="refit", ratios=TWO)
    assert outcome.epochs == 1
    assert shapes_of(outcome.model) == shapes_of(plain.model)
    assert outcome.plan == plain.plan == Plan(plain.plan.ratios, plain.plan.kept)
    save_checkpoint(outcome.model, tmp_path / "out.pt")
