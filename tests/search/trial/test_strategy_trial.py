"""A search whose trials run another strategy than the structural one: real networks, all five ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from paretoprune.pruning.strategies import STRATEGIES
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import save_checkpoint
from paretoprune.results.store.records import TrialState
from paretoprune.results.store.run_folder import RunFolder
from paretoprune.search.config.run_config import RunConfig
from paretoprune.search.samplers.observations import ObservationBuilder
from paretoprune.search.samplers.study import SearchStudy
from paretoprune.search.space.latency_predictor import make_predictor
from paretoprune.search.space.prediction import NoPredictor
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.preflight import prepare
from paretoprune.search.sweep.state import SweepState
from paretoprune.search.trial.factory import make_tools
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.strategy_trial import STRATEGY_FOLDER
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.pruning.recovery_material import shapes_dataset, widths
from tests.pruning.tiny import tiny_model
from tests.search.fakes import NoGate, make_config

RATIOS = {"model.0": 0.5, "model.1": 0.5, "model.2.cv1": 0.5}
EPOCHS = 4


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("material")
    save_checkpoint(tiny_model(), root / "tiny.pt")
    return {"model.path": str(root / "tiny.pt"), "data.path": str(shapes_dataset(root / "shapes"))}


def config_of(material: Mapping[str, Any], strategy: str, **more: Any) -> RunConfig:
    settings = {"model.imgsz": 64, "trial.epochs": EPOCHS, "trial.batch": 4, "trial.strategy": strategy}
    settings |= {"recover.calibration_images": 4, "space.round_to": 1, "latency.max_seconds": 0.05}
    return make_config(**{**material, **settings, **more})


def tools_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch, heard: Callable[[Path], None] | None = None) -> Any:
    """The run's own tools, without the clock; `heard` is told of every fine-tuning's folder and may raise."""
    tools = make_tools(config, "cpu", NoGate())
    measured = {"median_ms": 1.0, "p90_ms": 1.0, "baseline_median_ms": 2.0, "speedup": 2.0, "speedup_ci95": [1.9, 2.1]}
    monkeypatch.setattr(tools, "_measured", lambda model: {**measured, "converged": True})
    stock = tools._tune

    def tune(network: Any, folder: Path, *rest: Any, **more: Any) -> Any:
        if heard is not None:
            heard(folder)
        return stock(network, folder, *rest, **more)

    monkeypatch.setattr(tools, "_tune", tune)
    return tools


def trial(tools: Any, folder: Path, epochs: int = EPOCHS) -> Any:
    request = TrialRequest(trial_id="t0001", ratios=dict(RATIOS), provenance="random")
    return run_trial(request, TrialSettings(epochs, True, 2.0), tools, NoGate(), folder)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_trial_runs_the_strategy(
    name: str, material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tools_of(config_of(material, name), monkeypatch)
    record = trial(tools, tmp_path)
    assert record.state is TrialState.COMPLETED, record.error
    assert record.metrics.get("strategy", "structural") == name
    assert record.epochs == EPOCHS
    assert record.metrics["map50_95"] >= record.metrics["map50_95_refit"]
    pruned = load_model(tmp_path / "pruned.pt")
    whole, now = widths(tools.baseline), widths(pruned)
    if name == "mask":
        assert now == whole
    elif name == "adapter":
        assert any(layer.endswith(".1") for layer in now) or now != whole
    else:
        cut = {layer for layer in whole if now[layer][0] < whole[layer][0]}
        assert cut
        for layer, ratio in record.ratios.items():
            conv = layer if layer in whole else f"{layer}.conv"
            assert now[conv][0] == round(whole[conv][0] * (1 - ratio))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["hash"] == record.plan_hash
    assert plan["ratios"] == record.ratios
    sessions = sorted(path.name for path in (tmp_path / STRATEGY_FOLDER).glob("session-*.pt"))
    assert sessions == (["session-1.pt", "session-2.pt", "session-3.pt"] if name == "sequential" else [])


@pytest.mark.parametrize("name", ["sequential", "adapter"])
def test_without_epochs_the_strategy_is_judged_as_recovered(
    name: str, material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(folder: Path) -> None:
        raise AssertionError

    tools = tools_of(config_of(material, name, **{"trial.epochs": 0}), monkeypatch, never)
    record = trial(tools, tmp_path, epochs=0)
    assert (record.state, record.fidelity) == (TrialState.COMPLETED, "refit"), record.error


def test_an_interrupted_sequence_goes_on_at_its_session(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, begun = config_of(material, "sequential"), []

    def dies_in_the_third(folder: Path) -> None:
        begun.append(folder.name)
        if len(begun) == 3:
            raise KeyboardInterrupt  # like a signal: not a fault of the trial

    with pytest.raises(KeyboardInterrupt):
        trial(tools_of(config, monkeypatch, dies_in_the_third), tmp_path / "once")
    assert begun == ["tune-1", "tune-2", "tune-3"]
    begun.clear()
    record = trial(tools_of(config, monkeypatch, lambda folder: begun.append(folder.name)), tmp_path / "once")
    assert begun == ["tune-3"]
    assert record.state is TrialState.COMPLETED
    assert record.epochs == EPOCHS
    whole = trial(tools_of(config, monkeypatch), tmp_path / "whole")
    assert record.metrics["map50_95"] == whole.metrics["map50_95"]
    assert record.plan_hash == whole.plan_hash


class Rungs:
    """Stops nobody and remembers who was asked about."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def stops(self, report: Any) -> bool:
        self.asked.append(report.epochs)
        return False


def test_only_a_sequences_last_session_is_judged(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it the network still has channels that the plan takes away: comparing it would favour the sequence."""
    rungs, request = Rungs(), TrialRequest(trial_id="t0001", ratios=dict(RATIOS), provenance="random")
    settings = TrialSettings(EPOCHS, True, 2.0, rungs=range(EPOCHS + 1))
    tools = tools_of(config_of(material, "sequential"), monkeypatch)
    record = run_trial(request, settings, tools, NoGate(), tmp_path, rungs)
    assert rungs.asked == [0, 3, 4]  # shares of 1, 1 and 2 epochs
    assert [row["epochs"] for row in record.history] == [0, 3, 4]


def test_a_sequence_searches_first_layers_only(material: dict[str, Any], tmp_path: Path) -> None:
    spaces = {n: prepare(config_of(material, n), tmp_path / n).space for n in ("structural", "sequential")}
    blocks = [axis.groups[0].block for axis in spaces["sequential"].axes]
    assert blocks == sorted(set(blocks))
    assert len(spaces["sequential"].axes) < len(spaces["structural"].axes)
    assert set(spaces["sequential"].left_out.values()) == {"strategy sequential cuts the first layer of a block only"}
    tools = make_tools(config_of(material, "sequential"), "cpu", NoGate())
    levels = spaces["sequential"].uniform(0.5)
    asked = spaces["sequential"].plan(levels)
    _, plan = tools.prune(asked)
    assert plan.ratios == asked.ratios  # no dead axis: what is asked is what is cut


def test_a_trial_that_left_layers_whole_is_replayed_as_it_was_asked(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a resumed search would ask the same plan again: skip realises fewer cuts than it was asked for."""
    config = config_of(material, "skip", **{"trial.epochs": 0})
    space, folder = prepare(config, tmp_path / "run").space, RunFolder(tmp_path / "run")
    levels = space.uniform(0.5)
    request = TrialRequest(trial_id="t0000", ratios=space.plan(levels).ratios, provenance="ladder")
    request.save(folder)
    tools = tools_of(config, monkeypatch)
    record = run_trial(request, TrialSettings(0, True, 2.0), tools, NoGate(), folder.trial_dir("t0000"))
    assert record.ratios != request.ratios
    study = SearchStudy(space, {"map50_95": "max", "latency_ms": "min"}, "random")
    SweepState(folder, space, study, [record], 2, ObservationBuilder(["map50_95", "latency_ms"]))
    assert study._seen == {levels}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_latency_is_foretold_only_where_widths_follow_from_ratios(name: str, material: dict[str, Any]) -> None:
    tools = make_tools(config_of(material, name), "cpu", NoGate())
    described = {**tools.describe(print), "metrics": {"latency_ms": 1.0}}
    foretold = not isinstance(make_predictor(described), NoPredictor)
    assert foretold == (name in ("structural", "sequential"))


def test_the_structural_way_has_the_tools_it_always_had(material: dict[str, Any]) -> None:
    assert type(make_tools(config_of(material, "structural"), "cpu", NoGate())) is PruningOperations
