"""A trial at a smaller input than the run's: everything of it happens at that size, and its checkpoint says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
OWN, SMALL = 96, 64


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("material")
    save_checkpoint(tiny_model(), root / "tiny.pt")
    settings = {"model.path": str(root / "tiny.pt"), "data.path": str(shapes_dataset(root / "shapes"))}
    settings |= {"model.imgsz": OWN, "trial.epochs": 1, "trial.batch": 4, "recover.calibration_images": 4}
    return make_tools(make_config(**settings, **{"space.round_to": 1, "latency.max_seconds": 0.05}), "cpu", NoGate())


def test_everything_of_a_trial_is_at_its_size(tools: Any, tmp_path: Path) -> None:
    request = TrialRequest(trial_id="t0001", ratios=RATIOS, imgsz=SMALL, provenance="test")
    record = run_trial(request, TrialSettings(1, True, 2.0), tools, NoGate(), tmp_path)
    assert record.state is TrialState.COMPLETED, record.error
    assert (record.imgsz, record.epochs) == (SMALL, 1)
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.imgsz, plan.hash) == (SMALL, record.plan_hash)
    assert plan.hash != Plan(plan.ratios).hash

    sized = tools.at(SMALL)
    assert sized._bench.targets.images.shape[2:] == (SMALL, SMALL)
    assert sized._bench.model is tools.baseline
    assert "targets" not in vars(tools._bench) or tools._bench.targets.images.shape[2:] == (OWN, OWN)
    assert record.metrics["latency_conditions"]["imgsz"] == SMALL

    written = load_model(tmp_path / "pruned.pt")
    assert written.args["imgsz"] == SMALL
    assert record.metrics["gflops"] == pytest.approx(model_stats(written, SMALL).gflops)
    again = evaluate(written, tools._config.data.path, SMALL, "cpu", tools._config.data.val_batch)
    assert record.metrics["map50_95"] == pytest.approx(again["map50_95"], abs=5e-3)  # it is stored in half precision
    events = torch.load(tmp_path / "pruned.pt", weights_only=False)
    assert events["train_args"]["imgsz"] == SMALL


def test_channels_are_those_of_the_runs_size_and_one_other_size_is_kept(tools: Any) -> None:
    whole, small = tools.prune(Plan(RATIOS)), tools.at(SMALL).prune(Plan(RATIOS, imgsz=SMALL))
    assert small[1].kept == whole[1].kept
    assert (whole[1].imgsz, small[1].imgsz) == (None, SMALL)
    assert tools.at(None) is tools.at(OWN) is tools.at(SMALL).at(OWN) is tools
    first = tools.at(SMALL)
    assert tools.at(SMALL) is first
    assert tools.at(32) is tools._sized
    assert tools.at(SMALL) is not first


def test_networks_of_several_sizes_are_compared_on_the_same_images(tools: Any) -> None:
    small, _ = tools.prune(Plan(RATIOS, imgsz=SMALL))
    models, sizes = {"baseline": tools.baseline, "t0001": small}, {"t0001": SMALL}
    found = tools.evaluate_together(models, sizes, print)
    data = tools._config.data
    for name, network in models.items():
        alone = evaluate(network, data.path, sizes.get(name, OWN), "cpu", data.val_batch)
        assert found[name]["map50_95"] == pytest.approx(alone["map50_95"])
    change = found["t0001"]["map50_95"] - found["baseline"]["map50_95"]
    assert found["t0001"]["map50_95_change"] == pytest.approx(change, abs=0.02)
    times = tools.measure_together(models, sizes)
    assert set(times["t0001"]["over"]) == {"baseline"}
