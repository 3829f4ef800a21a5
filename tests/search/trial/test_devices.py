"""Several kinds of devices: each times every trial, and its latency is an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretoprune.cluster.errors import AgentAwayError
from paretoprune.results.store.objectives import title
from paretoprune.search.config.run_config import RunConfig, build_config
from paretoprune.search.errors import ConfigError
from paretoprune.search.storage.request import TrialRequest
from paretoprune.search.sweep.preflight import objectives_of
from paretoprune.search.trial.context import Measured
from paretoprune.search.trial.trial import TrialSettings, run_trial
from tests.search.fakes import FakeTools, NoGate

REQUEST = TrialRequest(trial_id="t0001", ratios={"model.0.c0": 0.5}, provenance="ladder")
SETTINGS = TrialSettings(epochs=1, recover=True, baseline_latency_ms=10.0, devices_ms={"pi": 200.0, "jetson": 8.0})
FACTORS = {"": 1.0, "pi": 1.5, "jetson": 0.5}


class Devices(FakeTools):
    """Devices on which a cut brings more, or less, than here. ``away``: one that does not answer."""

    def __init__(self, away: str | None = None) -> None:
        super().__init__()
        self.away = away

    def start_measure(
        self, model: Any, keep: Callable[[Mapping[str, Any]], None] | None = None, device: str = ""
    ) -> Measured:
        if device == self.away:
            raise AgentAwayError(f"http://{device}:8765", "it is off")
        values = self.measure(model)
        values = {**values, "speedup": FACTORS[device] * values["speedup"], "host": device}
        if keep is not None:
            keep(values)
        return Measured(values)


def test_a_record_has_the_latency_of_each(tmp_path: Path) -> None:
    metrics = run_trial(REQUEST, SETTINGS, Devices(), NoGate(), tmp_path / "t0001").metrics
    assert metrics["latency_ms_pi"] == pytest.approx(200 / (1.5 * metrics["speedup"]))
    assert metrics["latency_ms_jetson"] == pytest.approx(8 / (0.5 * metrics["speedup"]))
    assert metrics["speedup_jetson"] == pytest.approx(0.5 * metrics["speedup"])
    assert metrics["latency_conditions_pi"]["host"] == "pi"


def test_what_one_device_measured_is_not_measured_again_because_another_was_away(tmp_path: Path) -> None:
    record = run_trial(REQUEST, SETTINGS, Devices(away="jetson"), NoGate(), tmp_path / "t0001")
    assert "an agent must answer at http://jetson:8765" in str(record.error)
    again = Devices()
    record = run_trial(REQUEST, SETTINGS, again, NoGate(), tmp_path / "t0001")
    assert again.calls.count("measure") == 1
    whole = run_trial(REQUEST, SETTINGS, Devices(), NoGate(), tmp_path / "t0002").metrics
    assert {name: record.metrics[name] for name in whole if "latency" in name or "speedup" in name} == {
        name: value for name, value in whole.items() if "latency" in name or "speedup" in name
    }


def test_nothing_is_predicted_of_a_further_device(tmp_path: Path) -> None:
    settings = replace(SETTINGS, predicts_if_away=True)
    foretold = REQUEST.changed(foretold={"ratio": 0.5, "low": 0.4, "high": 0.8})
    assert run_trial(foretold, settings, Devices(away="pi"), NoGate(), tmp_path / "t0001").error is not None


def config(**more: Any) -> RunConfig:
    targets = {"pi": "http://pi:8765", "jetson": {"target": "http://orin:8765", "runtime": "tensorrt", "half": True}}
    base = {"model": {"path": "m.pt"}, "data": {"path": "d.yaml"}, "latency": {"runtime": "onnx", "targets": targets}}
    return build_config({**base, **more})


def test_settings_of_each_kind() -> None:
    latency = config().latency
    assert (latency.on("pi").runtime, latency.on("pi").half, latency.on("pi").targets) == ("onnx", False, {})
    assert (latency.on("jetson").runtime, latency.on("jetson").half) == ("tensorrt", True)
    assert list(latency.everywhere()) == ["", "pi", "jetson"]
    ships = config(deploy={"format": "openvino"}, latency={"targets": {"pi": "http://pi:8765"}})
    assert ships.timed_by(ships.latency.on("pi")) == "openvino"


def test_their_latencies_are_objectives() -> None:
    assert objectives_of(config(), ["map50_95"]) == ["map50_95", "latency_ms_pi", "latency_ms_jetson"]
    main = {"target": "http://nano:8765", "runtime": "onnx"}
    one = config(latency={**main, "targets": {"pi": "http://pi:8765"}})
    assert objectives_of(one, ["map50_95"]) == ["map50_95", "latency_ms", "latency_ms_pi"]
    chosen = ["map50_95", "latency_ms_pi", "latency_ms_jetson"]
    assert objectives_of(config(search={"objectives": chosen}), ["map50_95"]) == chosen
    two = {"pi": "http://pi:8765", "box": "http://box:8765"}
    with pytest.raises(ConfigError, match=r"at most three objectives, but there would be .*latency_ms_box"):
        objectives_of(config(latency={**main, "targets": two}), ["map50_95"])
    assert title("latency_ms_pi") == "latency on pi, ms"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search": {"objectives": ["map50_95", "latency_ms_nano"]}}, r"needs `latency.targets.nano`.*: pi, jetson"),
        ({"latency": {"targets": {"pi": "cpu:4"}}}, "a further kind of device needs an agent"),
        ({"latency": {"targets": {"Pi 5": "http://pi:8765"}}}, "targets"),
        ({"latency": {"targets": {"pi": "http://pi:8765"}}}, "an agent's device runs exported files: .* got 'torch'"),
        ({"deploy": {"format": "torchscript"}, "latency": {"target": "http://pi:8765"}}, "runs onnx, openvino, ncnn"),
        (
            {"deploy": {"format": "openvino"}, "latency": {"target": "http://pi:8765", "runtime": "onnx"}},
            "openvino runs by openvino, got `latency.runtime` onnx",
        ),
        ({"deploy": {"format": "onnx"}, "latency": {"target": "cpu:2"}}, "leave `latency.runtime`, `latency.half` and"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)
