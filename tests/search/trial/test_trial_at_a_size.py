"""A trial at a smaller input than the run's: everything of it happens at that size, and its checkpoint says so."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from paretoprune.base.image_size import ImageSize, height_width, larger_side, plain_size
from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.yolo.loading import load_model, model_stats
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.results.store.records import TrialState
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model
from tests.search.fakes import NoGate, make_config

RATIOS = {"model.0": 0.5, "model.1": 0.5}
Sizes = tuple[ImageSize, ImageSize]


@pytest.fixture(scope="module", params=[(96, 64), ((96, 160), (64, 96))], ids=["square", "rectangle"])
def sizes(request: pytest.FixtureRequest) -> Sizes:
    """The run's size and a smaller one."""
    found: Sizes = request.param
    return found


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, sizes: Sizes) -> Any:
    root = tmp_path_factory.mktemp("material")
    save_checkpoint(tiny_model(), root / "tiny.pt")
    settings = {"model.path": str(root / "tiny.pt"), "data.path": str(shapes_dataset(root / "shapes"))}
    settings |= {"model.imgsz": sizes[0], "trial.epochs": 1, "trial.batch": 4, "recover.calibration_images": 4}
    return make_tools(make_config(**settings, **{"space.round_to": 1, "latency.max_seconds": 0.05}), "cpu", NoGate())


def test_everything_of_a_trial_is_at_its_size(
    tools: Any, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, small = sizes
    trained = set()

    def predict(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            trained.add(tuple(images.shape[2:]))
        return stock(self, images, *args, **options)

    stock = DetectionModel.predict
    monkeypatch.setattr(DetectionModel, "predict", predict)
    request = TrialRequest(trial_id="t0001", ratios=RATIOS, imgsz=small, provenance="test")
    record = run_trial(request, TrialSettings(1, True, 2.0), tools, NoGate(), tmp_path)
    assert record.state is TrialState.COMPLETED, record.error
    assert (record.imgsz, record.epochs) == (small, 1)
    # Augmentation works on squares; importance was scored at the run's size
    assert trained - {height_width(own)} == {(larger_side(small), larger_side(small))}
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.imgsz, plan.hash) == (small, record.plan_hash)
    assert plan.hash != Plan(plan.ratios).hash

    sized = tools.at(small)
    assert sized._bench.targets.images.shape[2:] == height_width(small)
    assert sized._bench.model is tools.baseline
    assert "targets" not in vars(tools._bench) or tools._bench.targets.images.shape[2:] == height_width(own)
    assert record.metrics["latency_conditions"]["imgsz"] == plain_size(small)

    written = load_model(tmp_path / "pruned.pt")
    assert written.args["imgsz"] == plain_size(small)
    assert record.metrics["gflops"] == pytest.approx(model_stats(written, small).gflops)
    again = evaluate(written, tools._config.data.path, small, "cpu", tools._config.data.val_batch)
    assert record.metrics["map50_95"] == pytest.approx(again["map50_95"], abs=5e-3)  # it is stored in half precision
    events = torch.load(tmp_path / "pruned.pt", weights_only=False)
    assert events["train_args"]["imgsz"] == plain_size(small)


def test_channels_are_those_of_the_runs_size_and_one_other_size_is_kept(tools: Any, sizes: Sizes) -> None:
    own, less = sizes
    whole, small = tools.prune(Plan(RATIOS)), tools.at(less).prune(Plan(RATIOS, imgsz=less))
    assert small[1].kept == whole[1].kept
    assert (whole[1].imgsz, small[1].imgsz) == (None, less)
    assert tools.at(None) is tools.at(own) is tools.at(less).at(own) is tools
    first = tools.at(less)
    assert tools.at(less) is first
    assert tools.at(32) is tools._sized
    assert tools.at(less) is not first
    gone = weakref.ref(first)
    del first
    tools.release()
    assert gone() is None  # else a worker's memory grows with every change of size


def test_networks_of_several_sizes_are_compared_on_the_same_images(tools: Any, sizes: Sizes) -> None:
    own, less = sizes
    small, _ = tools.prune(Plan(RATIOS, imgsz=less))
    models, its = {"baseline": tools.baseline, "t0001": small}, {"t0001": less}
    found = tools.evaluate_together(models, its, print)
    data = tools._config.data
    for name, network in models.items():
        alone = evaluate(network, data.path, its.get(name, own), "cpu", data.val_batch)
        assert found[name]["map50_95"] == pytest.approx(alone["map50_95"])
    change = found["t0001"]["map50_95"] - found["baseline"]["map50_95"]
    assert found["t0001"]["map50_95_change"] == pytest.approx(change, abs=0.02)
    times = tools.measure_together(models, its)
    assert set(times["t0001"]["over"]) == {"baseline"}
