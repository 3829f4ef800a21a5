"""Latency on an agent's device: a real agent, real exports, the usual statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paretoprune.cluster.agent.client import AgentPool
from paretoprune.cluster.errors import AgentAwayError, AgentError
from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.export.engine import make_engine
from paretoprune.pruning.latency.runtimes import EngineFile, ExportCache, OnnxFile
from paretoprune.pruning.latency.statistics import Quad, speedup, with_session_variance
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.results.store.records import FORETOLD, SOURCE
from paretoprune.search.cli import run
from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.config.run_config import build_config
from paretoprune.search.errors import ConfigError
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.preflight import check_runtime_here
from paretoprune.search.trial import agent_latency
from paretoprune.search.trial.agent_latency import AgentJob, AgentMeasurer, SentModel, check_agents, measure_on_agents
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.cluster.agents import TOKEN, RunningAgent, agent_process, tiny_onnx
from tests.search.fakes import FakeTools, NoGate

SETTINGS = TrialSettings(epochs=1, recover=True, baseline_latency_ms=10.0)
REQUEST = TrialRequest(trial_id="t0001", ratios={"model.0.c0": 0.5}, provenance="ladder")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with agent_process(tmp_path_factory.mktemp("device")) as found:
        yield found


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOPRUNE_AGENT_TOKEN", TOKEN)


def test_a_network_is_compared_with_the_baseline_on_the_device(device: RunningAgent) -> None:
    job = AgentJob("onnx", 32, threads=1, max_seconds=0.5)
    small, large = (OnnxFile(tiny_onnx(channels)) for channels in (4, 48))
    result = measure_on_agents(AgentPool([device.address], TOKEN), small, large, job, ExportCache()).to_dict()
    assert result["speedup"] > 1  # 90 times the work
    assert result["speedup_ci95"][0] < result["speedup"] < result["speedup_ci95"][1]
    assert (result["device"], result["runtime"], result["threads"], result["imgsz"]) == ("cpu", "onnx", 1, 32)
    assert result["runtime_version"].startswith("onnxruntime ")
    assert result["memory_free_mb"] > 0
    assert json.loads(json.dumps(result)) == result


def test_a_folder_of_openvino_runs_in_what_it_was_quantised_to(device: RunningAgent) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed: nothing was exported")
    network = load_model(BASELINE)
    images = Calibration({"img": torch.rand(2, 3, 64, 64)})
    whole, quantised = (make_engine(network, "openvino", 64, "cpu", kind, images) for kind in ("fp32", "int8"))
    job = AgentJob("openvino", 64, threads=1, max_seconds=0.3)
    unsaid = EngineFile(quantised.name, quantised.files, "")  # as a file that was made elsewhere
    result = measure_on_agents(AgentPool([device.address], TOKEN), unsaid, whole, job, ExportCache())
    assert (result.precision, result.runtime_version.split()[0]) == ("int8", "openvino")


MODELS = SentModel({"model": b"a"}, [1, 3, 32, 32]), SentModel({"model": b"b"}, [1, 3, 64, 64])


class Samples:
    """An agent that answers with given rounds."""

    address = "http://127.0.0.1:9"

    def __init__(self, rounds: list[Any]) -> None:
        self.rounds, self.asked = rounds, 0

    def send(self, content: bytes) -> str:
        return content.decode()

    def measure(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        facts = {"host": "pi", "model": "Raspberry Pi", "system": "Linux"}
        state = dict.fromkeys(
            ("clock_mhz", "temperature_c", "governor", "power_mode", "memory_free_mb", "throttled_now")
        )
        yield {"event": "started", "id": "1", "facts": facts}
        yield {"event": "state", **state, "throttle_count": 3}
        yield {"event": "prepared", "version": "v", "precision": "fp32", "threads": 1, "device": "cpu"}
        yield {"event": "warm", "iterations": 7}
        for each in self.rounds:
            self.asked += 1
            yield {"event": "rounds", "rounds": [each]}
        yield {"event": "end", "rounds": len(self.rounds), "reason": "time", "state": {**state, "throttle_count": 5}}

    def enough(self, name: str) -> None:
        pass


def test_the_statistics_are_those_of_a_local_measurement() -> None:
    """Oracle: the same quads given to `speedup` and `with_session_variance`, as `measure_pair` does."""
    rounds = [([[1.0 + k / 50], [1.1]], [[2.0], [2.2 + k / 70]]) for k in range(9)]
    job = AgentJob("onnx", 32, max_seconds=100.0)
    result = agent_latency._measured(Samples(rounds), MODELS, job)  # type: ignore[arg-type]
    quads = [Quad(tuple(map(tuple, ours)), tuple(map(tuple, theirs))) for ours, theirs in rounds]  # type: ignore[arg-type]
    expected = with_session_variance(speedup(quads))
    assert (result.speedup, *result.speedup_ci95) == (expected.value, expected.low, expected.high)
    assert (result.blocks, result.iterations, result.warmup_iterations) == (36, 18, 7)
    assert (result.host, result.conditions.device_name, result.conditions.throttled) == ("pi", "Raspberry Pi", True)


def test_enough_is_said_once_the_speed_up_is_known() -> None:
    device = Samples([([[1.0], [1.0]], [[2.0], [2.0]])] * 90)
    job = AgentJob("onnx", 32, max_seconds=100.0)
    result = agent_latency._measured(device, MODELS, job)  # type: ignore[arg-type]
    assert result.converged
    assert result.blocks == 4 * 24  # no more are waited for; what comes after does not count


def test_another_input_size_than_the_baseline_s(device: RunningAgent) -> None:
    """One network at half the side of its baseline: each file has its own shape."""
    job = AgentJob("onnx", 32, 64, threads=1, max_seconds=0.5)
    small, large = OnnxFile(tiny_onnx(8, 32)), OnnxFile(tiny_onnx(8, 64))
    result = measure_on_agents(AgentPool([device.address], TOKEN), small, large, job, ExportCache())
    assert (result.imgsz, result.speedup > 1) == (32, True)


def config(address: str, **latency: Any) -> Any:
    settings = {"max_seconds": 0.3, "target": address, "runtime": "onnx", "threads": 1, "wait_minutes": 0, **latency}
    model = {"path": str(BASELINE), "imgsz": 64}
    return build_config({"model": model, "data": {"path": "d.yaml"}, "latency": settings})


def test_a_trial_goes_on_while_it_is_measured(device: RunningAgent) -> None:
    """The unpruned network against itself: one file, sent once, whatever the date of its export."""
    baseline, kept = load_model(BASELINE), []
    measurer = AgentMeasurer(config(device.address).latency, "onnx", LatencyTarget(agents=(device.address,)), 64)
    before = {path.name for path in device.store.iterdir()}
    pending = measurer.start(load_model(BASELINE), baseline, 64, kept.append)
    result = pending.result()
    assert pending.known() == result == kept[0]
    assert len({path.name for path in device.store.iterdir()} - before) == 1
    assert result["speedup_ci95"][0] <= result["speedup"] <= result["speedup_ci95"][1]


def test_what_the_device_has_not_is_said_before_any_work(device: RunningAgent) -> None:
    check_runtime_here(config(device.address))
    pool = AgentPool([device.address], TOKEN)
    with pytest.raises(ConfigError, match=r"must have the runtime command:bench, but it has onnx"):
        check_agents(pool, "command:bench")
    with pytest.raises(AgentError, match="must be sent the right token"):
        check_agents(AgentPool([device.address], "wrong"), "onnx")
    with pytest.raises(AgentAwayError, match=r"must answer at http://127\.0\.0\.1:9"):
        check_agents(AgentPool(["http://127.0.0.1:9"], TOKEN), "onnx")


class Away(FakeTools):
    """Tools whose device stays away."""

    def start_measure(self, model: Any, keep: Any = None, device: str = "") -> Any:
        class Pending:
            def known(self) -> None:
                return None

            def result(self) -> dict[str, Any]:
                raise AgentAwayError("http://pi:8765", "it is off")

        return Pending()


def test_a_trial_keeps_its_predicted_latency_where_that_is_set(tmp_path: Path) -> None:
    request = REQUEST.changed(foretold={"ratio": 0.5, "low": 0.4, "high": 0.8})
    settings = replace(SETTINGS, predicts_if_away=True)
    record = run_trial(request, settings, Away(), NoGate(), tmp_path / "t0001")
    assert record.error is None
    assert (record.metrics["latency_ms"], record.metrics[SOURCE]) == (5.0, FORETOLD)
    assert record.metrics["speedup_pi95"] == pytest.approx([1.25, 2.5])
    for other, changed in ((request, SETTINGS), (REQUEST, settings)):  # not set, or nothing predicted
        record = run_trial(other, changed, Away(), NoGate(), tmp_path / "t0002")
        assert "must answer at http://pi:8765" in str(record.error)


def test_a_trial_that_is_begun_again_is_not_measured_again(tmp_path: Path) -> None:
    class Killed(FakeTools):
        def evaluate(self, model: Any) -> Any:
            raise KeyboardInterrupt  # as a worker that dies: nothing is recorded

    first, second = Killed(), FakeTools()
    with pytest.raises(KeyboardInterrupt):
        run_trial(REQUEST, SETTINGS, first, NoGate(), tmp_path / "t0001")
    record = run_trial(REQUEST, SETTINGS, second, NoGate(), tmp_path / "t0001")
    assert ("measure" in first.calls, "measure" in second.calls) == (True, False)
    assert (
        record.metrics["latency_ms"]
        == run_trial(REQUEST, SETTINGS, FakeTools(), NoGate(), tmp_path / "t0002").metrics["latency_ms"]
    )
    other = REQUEST.changed(ratios={"model.0.c0": 0.25})  # another plan in the same folder
    third = FakeTools()
    run_trial(other, SETTINGS, third, NoGate(), tmp_path / "t0001")
    assert "measure" in third.calls


def test_the_command(device: RunningAgent, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runtime", "onnx", "--imgsz", "64", "--threads", "1", "--max-seconds", "1", "--format", "json"]
    assert run(["latency", str(BASELINE), *options, "--latency-target", device.address]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["runtime_version"].startswith("onnxruntime ")
    assert result["speedup_ci95"][0] <= result["speedup"] <= result["speedup_ci95"][1]


def test_the_command_times_files_that_were_made_for_the_device(
    device: RunningAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, channels in (("small.onnx", 4), ("large.onnx", 48)):
        (tmp_path / name).write_bytes(tiny_onnx(channels))
    models = [str(tmp_path / "small.onnx"), "--against", str(tmp_path / "large.onnx")]
    options = ["--imgsz", "32", "--threads", "1", "--max-seconds", "0.5", "--format", "json"]
    assert run(["latency", *models, *options, "--latency-target", device.address]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["runtime"], result["precision"], result["speedup"] > 1) == ("onnx", "fp32", True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--latency-target", "node:edge"], "this command measures here, or on agents"),
        (["--latency-target", "http://127.0.0.1:9", "--runtime", "torch"], "the runtime must be onnx, openvino, "),
        (["--latency-target", "http://127.0.0.1:9"], "an agent must answer at http://127.0.0.1:9"),
        (["--latency-target", "http://127.0.0.1:9", "--against", "no.rknn"], "no.rknn runs by rknn, got"),
        (["--latency-target", "http://127.0.0.1:9", "--against", "a.onnx", "--runtime", "ncnn"], "a.onnx runs by onnx"),
        (["--latency-target", "http://127.0.0.1:9", "--runtime", "onnx", "--device", "cuda:0"], "auto, cpu or gpu"),
    ],
)
def test_wrong_use_of_the_command(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["latency", str(BASELINE), *options]) == 1
    assert said in capsys.readouterr().err
