"""A trial that is judged as what ships: the file's accuracy and latency, the network's own beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.device import NullGate
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.export.exporter import export_model
from paretoprune.pruning.latency.runtimes.predict_session import PredictSession
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.results.store.records import TrialRecord, TrialState
from paretoprune.search.api.measuring import _judged_in
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.errors import ConfigError
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.preflight import check_deployment, check_runtime_here
from paretoprune.search.trial.operations import PruningOperations
from paretoprune.search.trial.trial import run_trial
from paretoprune.search.worker.worker import trial_settings
from tests.cluster.agents import TOKEN, agent_process


def config(data: str, **deploy: Any) -> RunConfig:
    return build_config(
        {
            "model": {"path": str(BASELINE), "imgsz": IMGSZ, "device": "cpu"},
            "data": {"path": data},
            "trial": {"epochs": 0},
            "recover": {"how": "none", "importance": "l2"},
            "latency": {"max_seconds": 0.2, "threads": 1},
            "deploy": deploy,
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_dataset(tmp_path_factory.mktemp("data") / "digits", train=4, val=4))


def int8_trial(wanted: RunConfig, folder: Path) -> TrialRecord:
    tools = PruningOperations(wanted, "cpu", NullGate())
    request = TrialRequest(trial_id="t0001", ratios={"model.4.m.0.cv1": 0.25}, provenance="test")
    record = run_trial(request, trial_settings(wanted, 10.0), tools, NullGate(), folder)
    assert record.state is TrialState.COMPLETED, record.error
    conditions = record.metrics["latency_conditions"]
    assert (conditions["runtime"], conditions["precision"]) == ("onnx", "int8")
    return record


def test_a_trial_is_judged_as_its_int8_file(tmp_path: Path, data: str) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed: nothing was exported")
    wanted = config(data, format="onnx", precision="int8", calibration_images=2)
    check_deployment(wanted)
    record = int8_trial(wanted, tmp_path / "t0001")
    assert record.metrics["latency_ms"] == pytest.approx(10.0 / record.metrics["speedup"])
    # The same by hand, from the checkpoint that the trial left
    pruned = tmp_path / "t0001" / "pruned.pt"
    network = load_model(pruned)
    images = load_calibration(data, network, IMGSZ, 2, wanted.search.seed)
    file = export_model(pruned, "onnx", IMGSZ, output=tmp_path, precision="int8", calibration=images)
    by_hand = Evaluator(data, IMGSZ, "cpu", 1, rect=False).run(network, file, "int8")
    assert record.metrics["map50_95"] == pytest.approx(by_hand["map50_95"])
    assert record.metrics["map50_95_fp32"] == pytest.approx(Evaluator(data, IMGSZ, "cpu").run(network)["map50_95"])
    assert record.metrics["map50_95_fp32"] == record.metrics["map50_95_refit"]


def test_a_trial_has_a_precision_of_its_own(tmp_path: Path, data: str) -> None:
    """Its file is in int8, that of the unpruned model beside which it is timed in the run's own precision."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed: nothing was exported")
    wanted = config(data, format="onnx", calibration_images=2)
    wanted = build_config({**wanted.model_dump(exclude_unset=True), "space": {"precision": ["fp32", "int8"]}})
    check_deployment(wanted)
    tools = PruningOperations(wanted, "cpu", NullGate())
    request = TrialRequest(
        trial_id="t0001", ratios={"model.4.m.0.cv1": 0.25}, provenance="test", imgsz=96, precision="int8"
    )
    record = run_trial(request, trial_settings(wanted, 10.0), tools, NullGate(), tmp_path / "t0001")
    assert record.state is TrialState.COMPLETED, record.error
    assert (record.precision, record.metrics["deploy_precision"]) == ("int8", "int8")
    conditions = record.metrics["latency_conditions"]
    assert (conditions["precision"], conditions["baseline_precision"]) == ("int8", "fp32")
    stored = json.loads((tmp_path / "t0001" / "plan.json").read_text())
    assert (stored["precision"], stored["made_with"]["deploy_precision"]) == ("int8", "int8")
    assert Plan.load(tmp_path / "t0001" / "plan.json").hash == record.plan_hash != Plan(record.ratios, imgsz=96).hash
    assert _judged_in(tmp_path / "t0001" / "pruned.pt") == "int8"  # in which `export` writes it
    assert _judged_in(tmp_path / "alone.pt") == "fp32"
    assert tools.at(None) is tools.at(None, "fp32") is tools.at(96, "int8").at(None)

    model = tools.load(tmp_path / "t0001" / "pruned.pt")
    models, variants = {"baseline": tools.baseline, "t0001": model}, {"t0001 in fp32": ("t0001", "fp32")}
    found = tools.evaluate_together(models, {"t0001": 96}, lambda line: None, {"t0001": "int8"}, variants)
    assert found["t0001"]["map50_95"] == pytest.approx(record.metrics["map50_95"], abs=5e-3)  # stored in half precision
    assert found["t0001"]["map50_95_fp32"] == found["t0001 in fp32"]["map50_95_fp32"]
    square = Evaluator(data, 96, "cpu", 1, rect=False).run(model)
    assert found["t0001 in fp32"]["map50_95"] == pytest.approx(square["map50_95"], abs=1e-3)  # the same arithmetic
    cost = found["t0001"]["precision_cost"]
    assert cost[0] == pytest.approx(found["t0001"]["map50_95"] - found["t0001 in fp32"]["map50_95"])
    assert cost[1] <= cost[0] <= cost[2]
    assert "precision_cost" not in found["t0001 in fp32"]
    times = tools.measure_together({**models, "t0001 in fp32": model}, {"t0001": 96, "t0001 in fp32": 96})
    assert set(times["t0001"]["over"]) == {"baseline", "t0001 in fp32"}


@pytest.mark.parametrize("ships", ["torch", "torchscript"])
def test_whole_predictions_are_timed_in_trials_and_of_finalists(ships: str, tmp_path: Path, data: str) -> None:
    values = config(data, format=ships).model_dump(exclude_unset=True)
    wanted = build_config({**values, "latency": {**values["latency"], "span": "predict"}})
    tools = PruningOperations(wanted, "cpu", NullGate())
    request = TrialRequest(trial_id="t0001", ratios={"model.4.m.0.cv1": 0.25}, provenance="test", imgsz=96)
    record = run_trial(request, trial_settings(wanted, 10.0), tools, NullGate(), tmp_path / "t0001")
    assert record.state is TrialState.COMPLETED, record.error
    conditions = record.metrics["latency_conditions"]
    assert (conditions["runtime"], conditions["span"]) == (ships, "predict")
    assert conditions["images"] == f"4 validation images of {data}"
    assert record.metrics["latency_ms"] == pytest.approx(10.0 / record.metrics["speedup"])
    models = {"baseline": tools.baseline, "t0001": tools.load(tmp_path / "t0001" / "pruned.pt")}
    tools.evaluate_together(models, {"t0001": 96}, lambda line: None)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        stock = PredictSession.predict
        patch.setattr(PredictSession, "predict", lambda self, images: seen.append(self) or stock(self, images))
        assert set(tools.measure_together(models, {"t0001": 96})["t0001"]["over"]) == {"baseline"}
    assert len(set(map(id, seen))) == 2


def test_finalists_are_evaluated_together_as_files(data: str) -> None:
    tools = PruningOperations(config(data, format="torchscript", when="picks"), "cpu", NullGate())
    assert tools.deployed(tools.baseline, {"map50_95": 0.5}) == {"map50_95": 0.5}  # no trial is a file
    models = {"baseline": tools.baseline, "t0001": tools.prune(Plan({"model.4.m.0.cv1": 0.25}))[0]}
    found = tools.evaluate_together(models, {}, lambda line: None)
    square = Evaluator(data, IMGSZ, "cpu", 1, rect=False).run(models["t0001"])
    assert found["t0001"]["map50_95"] == pytest.approx(square["map50_95"], abs=1e-3)  # the same arithmetic
    assert found["t0001"]["map50_95_change"] == found["t0001"]["map50_95"] - found["baseline"]["map50_95"]
    assert set(tools.measure_together(models, {})["t0001"]["over"]) == {"baseline"}
    assert "map50_95_fp32" in found["baseline"]


def test_files_are_made_and_judged_at_height_and_width(data: str) -> None:
    wide = (96, IMGSZ)
    tools = PruningOperations(config(data, format="torchscript"), "cpu", NullGate()).at(wide)
    model = tools.prune(Plan({"model.4.m.0.cv1": 0.25}, imgsz=wide))[0]
    found = tools.deployed(model, tools.evaluate(model))
    assert found["map50_95"] == pytest.approx(found["map50_95_fp32"], abs=1e-3)  # the same arithmetic, the same images
    assert found["map50_95_fp32"] != pytest.approx(Evaluator(data, IMGSZ, "cpu").run(model)["map50_95"], abs=1e-3)
    assert tools.start_measure(model).result()["imgsz"] == list(wide)


def test_picks_alone_may_be_files() -> None:
    assert not config("data.yaml", format="onnx", when="picks").deploy.in_trials
    assert not config("data.yaml").deploy.in_trials


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"deploy": {"precision": "int8"}}, "precision int8 needs a format to export to"),
        ({"deploy": {"format": "onnx"}, "latency": {"runtime": "openvino"}}, "leave `latency.runtime`"),
        ({"deploy": {"format": "onnx"}, "latency": {"target": "node:edge"}}, "leave `latency.runtime`"),
        (
            {"space": {"precision": ["fp32", "int8"]}},
            "needs trials that are judged as files, but got deploy.format=torch",
        ),
        (
            {"space": {"precision": ["fp32", "int8"]}, "deploy": {"format": "onnx", "when": "picks"}},
            "deploy.when=picks",
        ),
        ({"space": {"precision": ["int8", "int8"]}, "deploy": {"format": "onnx"}}, "each once, got int8, int8"),
        ({"space": {"precision": ["int8"]}}, "`space.precision` int8 needs trials that are judged as files"),
        ({"space": {"precision": []}}, "one precision or more, each once, got none"),
        (
            {"space": {"precision": ["fp32", "int8"]}, "deploy": {"format": "onnx", "precision": "int8"}},
            "`deploy.precision` int8, but got fp32, int8: put it first",
        ),
        (
            {
                "space": {"precision": ["fp32", "bf16"]},
                "deploy": {"format": "openvino"},
                "latency": {"target": "http://edge:8765"},
            },
            "in 16 bits or neither with openvino, but `space.precision` has fp32, bf16: leave out",
        ),
    ],
)
def test_what_says_two_things_is_refused(changes: dict[str, Any], line: str) -> None:
    values = {"model": {"path": "m.pt", "imgsz": 64}, "data": {"path": "d.yaml"}, **changes}
    with pytest.raises(ConfigError, match=line):
        build_config(values)


def test_what_cannot_be_made_here_is_refused_before_the_start() -> None:
    with pytest.raises(PruningError, match="onnx does not compute in fp16 on cpu; possible here: "):
        check_deployment(config("data.yaml", format="onnx", precision="fp16"))
    values = {
        **config("data.yaml", format="onnx").model_dump(exclude_unset=True),
        "space": {"precision": ["fp32", "fp16"]},
    }
    with pytest.raises(PruningError, match="onnx does not compute in fp16 on cpu; possible here: "):
        check_deployment(build_config(values))


def test_what_ships_goes_to_the_agent(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's int8 file is what the device was sent and timed, beside that of the unpruned network."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed: nothing was exported")
    monkeypatch.setenv("PARETOPRUNE_AGENT_TOKEN", TOKEN)
    with agent_process(tmp_path) as device:
        deploy = {"format": "onnx", "precision": "int8", "calibration_images": 2}
        latency = {"max_seconds": 0.2, "threads": 1, "target": device.address}
        wanted = build_config({**config(data).model_dump(), "deploy": deploy, "latency": latency})
        check_runtime_here(wanted)
        record = int8_trial(wanted, tmp_path / "t0001")
        assert record.metrics["latency_conditions"]["runtime_version"].startswith("onnxruntime ")
        sent = [path.read_bytes() for path in device.store.iterdir() if path.is_file() and len(path.name) == 64]
        assert len(sent) == 2
        assert all(b"QuantizeLinear" in content for content in sent)
    assert "map50_95_fp32" in record.metrics
