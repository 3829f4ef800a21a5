"""Trials on a large dataset: bounded steps on a sample of images, while finished networks are judged on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretoprune.pruning.evaluation.evaluator import evaluate
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.training.trainer import _InPlaceTraining
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.inputs import identity_of
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.errors import ConfigError
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.storage.sample import images_of_trials, keep_sample, sampled_data
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.trial import TrialSettings, run_trial
from paretoprune.search.worker.worker import _judged
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model
from tests.search.fakes import NoGate, make_config

RATIOS = {"model.0": 0.5, "model.1": 0.5}
TRAIN, VAL, SAMPLED_VAL = 30, 12, 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("material")
    save_checkpoint(tiny_model(), root / "tiny.pt")
    data = str(shapes_dataset(root / "shapes", train=TRAIN, val=VAL).rename(root / "shapes" / "all.yaml"))
    settings = {"model.path": str(root / "tiny.pt"), "data.path": data, "model.imgsz": 64, "space.round_to": 1}
    settings |= {"trial.epochs": 2, "trial.batch": 4, "trial.steps": 7, "trial.val_images": SAMPLED_VAL}
    settings |= {"recover.calibration_images": 4, "latency.max_seconds": 0.05, "finetune.epochs": 1}
    return make_config(**settings, **{"finetune.batch": 4})


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    keep_sample(folder, config, identity_of(config, "detect"))
    return folder


@pytest.fixture(scope="module")
def tools(config: RunConfig, run: RunFolder) -> Any:
    tools = make_tools(config, "cpu", NoGate())
    tools.use_sample(run.path)
    return tools


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each optimizer step: how many the training is to have."""
    stock, seen = _InPlaceTraining.optimizer_step, list[int]()

    def counted(self: Any) -> None:
        seen.append(self.total_steps)
        stock(self)

    monkeypatch.setattr(_InPlaceTraining, "optimizer_step", counted)
    return seen


def test_steps_bound_the_training_of_a_trial(tools: Any, tmp_path: Path, steps: list[int]) -> None:
    request = TrialRequest(trial_id="t0001", ratios=RATIOS, provenance="test")
    record = run_trial(request, TrialSettings(2, True, 2.0), tools, NoGate(), tmp_path)
    assert record.state is TrialState.COMPLETED, record.error
    assert steps == [6] * 6  # of at most 7, in two epochs of the same length, which the rate's schedule knows
    assert record.epochs == 2
    assert record.metrics["val_images"] == SAMPLED_VAL
    written = load_model(tmp_path / "pruned.pt")
    assert written.args["data"] == "all.yaml"  # not the sample's
    again = evaluate(written, tools._data, 64, "cpu")
    assert record.metrics["map50_95"] == pytest.approx(again["map50_95"], abs=5e-3)  # it is stored in half precision


def test_the_unpruned_model_is_judged_as_trials_and_on_all(tools: Any, config: RunConfig) -> None:
    metrics = _judged(tools, tools.baseline, config, lambda text: None)
    every = evaluate(tools.baseline, config.data.path, 64, "cpu")
    some = evaluate(tools.baseline, tools._data, 64, "cpu")
    assert (metrics["val_images"], metrics["val_images_all"]) == (SAMPLED_VAL, VAL)
    assert metrics["map50_95"] == pytest.approx(some["map50_95"])
    assert metrics["map50_95_all"] == pytest.approx(every["map50_95"])
    assert tools._noise(lambda text: None)["images"] == SAMPLED_VAL  # the bootstrap draws from what trials see


def test_picks_are_trained_and_judged_on_all_images(
    tools: Any, config: RunConfig, tmp_path: Path, steps: list[int]
) -> None:
    model, _ = tools.prune(Plan(RATIOS))
    tuned = tools.finetune_fully(model, tmp_path)
    assert len(steps) == -(-TRAIN // 4)
    every = evaluate(tuned.model, config.data.path, 64, "cpu")
    assert tuned.metrics["map50_95"] == pytest.approx(every["map50_95"])
    found = tools.evaluate_together({"baseline": tools.baseline, "t0001": tuned.model}, {}, print)
    assert [its["val_images"] for its in found.values()] == [VAL, VAL]
    assert found["t0001"]["map50_95"] == pytest.approx(every["map50_95"])


def test_a_run_draws_once(config: RunConfig, run: RunFolder) -> None:
    drawn, data = (run.path / "sample.json.gz").read_bytes(), sampled_data(run.path, config.data.path, "detect")
    assert images_of_trials(config) == {"train": 12, "val": 5}
    other = config.model_copy(update={"search": config.search.model_copy(update={"seed": 7})})
    keep_sample(run, other, identity_of(config, "detect"))
    assert (run.path / "sample.json.gz").read_bytes() == drawn
    assert sampled_data(run.path, config.data.path, "detect") == data


@pytest.mark.parametrize("change", [{"steps": 0, "val_images": 0}, {"steps": 16, "val_images": 12}])
def test_a_dataset_that_is_no_larger_is_used_whole(config: RunConfig, change: dict[str, int], tmp_path: Path) -> None:
    whole = config.model_copy(update={"trial": config.trial.model_copy(update=change)})
    keep_sample(RunFolder(tmp_path), whole, identity_of(whole, "detect"))
    assert list(tmp_path.iterdir()) == []
    assert sampled_data(tmp_path, config.data.path, "detect") == config.data.path


def test_each_epoch_needs_a_step() -> None:
    with pytest.raises(ConfigError, match="steps must be 0 or at least as many as epochs, got 2 and 3"):
        make_config(**{"trial.epochs": 3, "trial.steps": 2})
