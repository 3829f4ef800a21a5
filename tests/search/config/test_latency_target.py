"""Where latency is measured: the setting, what it decides, what is said where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from paretoprune.search.config.latency_target import LatencyTarget
from paretoprune.search.config.run_config import build_config, differing_keys
from paretoprune.search.errors import ConfigError
from paretoprune.search.samplers.initial_plans import same_settings
from paretoprune.search.sweep.preflight import check_runtime_here

BASE = {"model": {"path": "m.pt"}, "data": {"path": "d.yaml"}}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("own", LatencyTarget()),
        ("cpu:4", LatencyTarget(threads=4)),
        ("node:edge", LatencyTarget(resource="edge")),
        ("node:jetson-orin.2", LatencyTarget(resource="jetson-orin.2")),
        ("http://pi:8765", LatencyTarget(agents=("http://pi:8765",))),
        ("http://10.0.0.7:8765/,https://[::1]", LatencyTarget(agents=("http://10.0.0.7:8765", "https://[::1]"))),
    ],
)
def test_targets(text: str, target: LatencyTarget) -> None:
    assert LatencyTarget.parse(text) == target
    assert build_config({**BASE, "latency": {"target": text, "runtime": "onnx"}}).latency.target == text


def test_a_target_has_its_runtimes() -> None:
    for runtime in ("openvino", "command:bench"):
        build_config({**BASE, "latency": {"target": "http://pi:8765", "runtime": runtime}})
    with pytest.raises(ConfigError, match=r"an agent's device runs exported files: .* got 'torch'"):
        build_config({**BASE, "latency": {"target": "http://pi:8765"}})
    with pytest.raises(ConfigError, match="the runtime 'command:bench' is an agent's"):
        build_config({**BASE, "latency": {"runtime": "command:bench"}})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"latency": {"target": "http://pi:8765", "runtime": "onnx"}},
            r"not on an agent's device: set it to network, or leave out `latency.target` http://pi:8765",
        ),
        ({"latency": {"targets": {"pi": "http://pi:8765"}}}, r"leave out `latency.targets.pi.target` http://pi:8765"),
        ({"latency": {"runtime": "openvino"}}, r"got `latency.runtime` openvino: leave it .* set `deploy.format`"),
        ({"latency": {"runtime": "torch-cuda-graph"}}, "got `latency.runtime` torch-cuda-graph"),
        (
            {"latency": {"runtime": "onnx"}, "deploy": {"format": "onnx", "when": "picks"}},
            "got `latency.runtime` onnx",
        ),
        ({"latency": {"span": "all"}}, "'network' or 'predict'"),
    ],
)
def test_predict_is_timed_where_ultralytics_runs(settings: dict[str, Any], line: str) -> None:
    latency = {"span": "predict", **settings["latency"]}
    with pytest.raises(ConfigError, match=line) as caught:
        build_config({**BASE, **settings, "latency": latency})
    assert "\n" not in str(caught.value)


def test_predict_works_with_files_and_nodes_and_is_decisive() -> None:
    for more in ({"deploy": {"format": "openvino"}}, {"deploy": {"format": "onnx", "when": "picks"}}, {}):
        build_config({**BASE, **more, "latency": {"span": "predict"}})
    for target in ("cpu:2", "node:edge"):
        build_config({**BASE, "latency": {"span": "predict", "target": target}})
    old, new = build_config(BASE), build_config({**BASE, "latency": {"span": "predict"}})
    assert old.latency.span == "network"  # of an older run, too, whose file does not say
    assert differing_keys(old, new) == ["latency.span"]
    assert not same_settings(old, new)


@pytest.mark.parametrize(
    "text",
    ["", "gpu", "cpu", "cpu:0", "cpu:two", "node:", "node:a b", "own:1", "http://", "http://pi:8765/x", "ftp://pi"],
)
def test_what_is_none_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`latency.target`: a latency target must be own .* cpu:N .*") as caught:
        build_config({**BASE, "latency": {"target": text}})
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_numbers_of_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="`target` asks for 4 threads and `threads` for 2"):
        build_config({**BASE, "latency": {"target": "cpu:4", "threads": 2}})
    build_config({**BASE, "latency": {"target": "cpu:4", "threads": 4}})


@pytest.mark.parametrize(
    ("text", "device", "here", "both"),
    [
        ("own", "cpu", True, False),
        ("own", "cuda:0", True, False),
        ("cpu:2", "cpu", True, False),
        ("cpu:2", "cuda:0", False, True),
        ("node:edge", "cpu", False, False),
        ("node:edge", "cuda:0", False, False),
        ("http://pi:8765", "cpu", False, False),
    ],
)
def test_what_a_target_means_for_a_trial(text: str, device: str, here: bool, both: bool) -> None:
    target = LatencyTarget.parse(text)
    assert target.is_device(device) is here
    assert target.shares_cpu_with(device) is both


def test_a_runtime_that_cannot_is_said_before_a_run() -> None:
    def config(**latency: object) -> object:
        return build_config({**BASE, "latency": latency})

    with pytest.raises(ValueError, match="tensorrt runs on a CUDA device"):
        check_runtime_here(config(runtime="tensorrt", target="cpu:1"))  # type: ignore[arg-type]
    check_runtime_here(config(runtime="tensorrt", target="node:edge"))  # type: ignore[arg-type]  # it may have one
    with pytest.raises(ValueError, match="predict computes in fp32 in PyTorch on a CPU"):
        check_runtime_here(config(span="predict", half=True, target="cpu:1"))  # type: ignore[arg-type]
