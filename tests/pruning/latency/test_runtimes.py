"""One suite for every runtime: it computes what PyTorch computes, says what it is, and refuses in one line."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency import runtimes
from paretoprune.pruning.latency.pair import measure_pair
from paretoprune.pruning.latency.runtimes import (
    ExportCache,
    OnnxFile,
    Session,
    SessionSpec,
    check_runtime,
    open_session,
)
from paretoprune.pruning.latency.runtimes.torch_sessions import TorchSession
from paretoprune.pruning.names import RUNTIMES
from paretoprune.search.config.sections import LatencySection
from tests.conftest import ROOT
from tests.pruning.recovery_material import same_weights, weights
from tests.pruning.tiny import tiny_model

WAYS = [
    ("torch", "cpu", False), ("torch", "cpu", True), ("torch", "cuda:0", False), ("torch", "cuda:0", True),
    ("torch-cuda-graph", "cuda:0", False), ("torch-cuda-graph", "cuda:0", True),
    ("onnx", "cpu", False), ("onnx", "cuda:0", False), ("onnx", "cuda:0", True),
    ("openvino", "cpu", False), ("openvino", "cpu", True),
    ("tensorrt", "cuda:0", False), ("tensorrt", "cuda:0", True),
]  # fmt: skip
FROM_FILES = ("onnx", "openvino")
# Shares of the greatest value: float32 differs by the order of sums, 16 bits by their 8 to 11 digits in each layer.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def exports() -> ExportCache:
    return ExportCache()


Open = Callable[..., Session]


@pytest.fixture(params=WAYS, ids=["-".join((r, d, "half" if h else "full")) for r, d, h in WAYS])
def opened(request: pytest.FixtureRequest, model: nn.Module, exports: ExportCache) -> Open:
    """Opens the tiny model in one runtime, on one device, at one precision; skips with the runtime's own reason."""
    runtime, device, half = request.param
    try:
        check_runtime(runtime, device, half)
    except PruningError as error:
        if (runtime, device, half) in (("torch", "cpu", False), ("onnx", "cpu", False)):
            raise  # these two are there wherever the tests run
        pytest.skip(str(error))

    def open_one(batch: int = 1) -> Session:
        return open_session(model, SessionSpec(64, device, batch, half, threads=1), runtime, exports)

    return open_one


def reference(model: nn.Module, batch: int = 1) -> np.ndarray:
    return TorchSession(model, SessionSpec(64, "cpu", batch)).output()


class TestContract:
    def test_it_computes_what_pytorch_computes(self, opened: Open, model: nn.Module) -> None:
        session = opened()
        ours, theirs = session.output(), reference(model)
        assert ours.shape == theirs.shape
        assert ours.dtype == np.float32
        # Boxes in pixels and scores in [0, 1] lie side by side: each against its own scale
        scale = np.abs(theirs).max(axis=-1, keepdims=True)
        assert (np.abs(ours - theirs) / scale).max() < TOLERANCES[session.precision]

    def test_a_batch_is_computed_whole(self, opened: Open, model: nn.Module) -> None:
        session = opened(batch=3)
        ours = session.output()
        assert ours.shape == reference(model, batch=3).shape
        assert not np.allclose(ours[0], ours[1])

    def test_an_inference_takes_time(self, opened: Open) -> None:
        session = opened()
        assert all(0 < session.time_ms() < 60_000 for _ in range(3))

    def test_the_network_is_left_alone(self, opened: Open, model: nn.Module) -> None:
        before = weights(model)
        asked = [parameter.requires_grad for parameter in model.parameters()]
        opened().time_ms()
        assert same_weights(before, weights(model))
        assert not model.training
        assert [parameter.requires_grad for parameter in model.parameters()] == asked
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert "bn" in dict(model.model[0].named_children())  # type: ignore[index]  # fused was a copy

    def test_it_says_what_it_is(self, opened: Open, request: pytest.FixtureRequest) -> None:
        _, device, half = request.node.callspec.params["opened"]
        session = opened()
        assert session.precision in (("fp16", "bf16") if half else ("fp32",))
        assert session.threads == (1 if device == "cpu" else None)
        assert any(letter.isdigit() for letter in session.version)

    def test_a_pair_is_measured(self, opened: Open, model: nn.Module, request: pytest.FixtureRequest) -> None:
        runtime, device, half = request.node.callspec.params["opened"]
        result = measure_pair(model, model, 64, device, threads=1, max_seconds=0.3, runtime=runtime, half=half)
        content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert content["speedup_ci95"][0] <= content["speedup"] <= content["speedup_ci95"][1]
        assert (content["runtime"], content["imgsz"], content["batch"]) == (runtime, 64, 1)
        assert content["precision"] == opened().precision
        assert content["runtime_version"] == opened().version
        named = {"device_name", "driver", "clock_mhz_start", "clock_mhz_end", "throttled", "throttle_reasons", "host"}
        assert named <= set(content)


_A_CHILD_ENDS = """
import faulthandler, gc, signal, subprocess, time
import torch
from paretoprune.pruning.latency.pair import measure_pair
from tests.pruning.tiny import tiny_model

ended = []
signal.signal(signal.SIGCHLD, lambda *_: ended.append(1))  # as PyTorch's loading workers have it
faulthandler.enable()  # its alternate signal stack is what Python's handlers run on
for _ in range(2):
    measure_pair(tiny_model(), tiny_model(), 64, "cpu", threads=1, max_seconds=0.1, runtime="openvino")
    gc.collect()
ended.clear()
subprocess.Popen(["true"])
end = time.monotonic() + 20
while not ended and time.monotonic() < end:
    time.sleep(0.05)
print("seen", ended)
"""


def test_signals_are_survived_after_openvino_has_gone() -> None:
    """Where the CPU has AMX, two OpenVINO cores that go in the order of their coming leave a freed signal stack."""
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", _A_CHILD_ENDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "seen [1]\n"), done.stderr


@pytest.mark.parametrize("runtime", FROM_FILES)
def test_an_exported_file_will_do(runtime: str, model: nn.Module, exports: ExportCache) -> None:
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    spec = SessionSpec(64, "cpu", threads=1)
    file = OnnxFile(exports.content(model, "onnx", spec, half=False))
    session = open_session(file, spec, runtime, ExportCache())
    np.testing.assert_allclose(session.output(), reference(model), rtol=1e-3, atol=1e-3)


def test_a_runtime_that_reads_no_onnx_says_so() -> None:
    with pytest.raises(PruningError, match="PyTorch runs a network in memory, but got an ONNX file"):
        open_session(OnnxFile(b""), SessionSpec(64, "cpu"), "torch", ExportCache())


def test_the_baseline_is_exported_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    export = ExportCache._export

    def noting(self: ExportCache, network: nn.Module, *rest: object) -> bytes:
        made.append(network)
        return export(self, network, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportCache, "_export", noting)
    kept, others = ExportCache(), [tiny_model() for _ in range(2)]
    for other in others:
        measure_pair(other, model, 64, max_seconds=0.1, runtime="onnx", exports=kept)
    assert Counter(map(id, made)) == Counter(map(id, (model, *others)))


def test_a_candidates_export_goes_with_it(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept, candidate = ExportCache(), tiny_model()
    measure_pair(candidate, model, 64, max_seconds=0.1, runtime="onnx", exports=kept)
    assert list(tmp_path.iterdir()) == []
    del candidate
    gc.collect()
    assert list(kept._made) == [model]


@pytest.mark.parametrize(
    ("runtime", "device", "half", "message"),
    [
        ("abacus", "cpu", False, "the runtime must be one of torch, torch-cuda-graph, onnx, openvino, tensorrt"),
        ("torch", "cuda:99", False, "device 'cuda:99' is not there"),
        ("torch-cuda-graph", "cpu", False, "torch-cuda-graph runs on a CUDA device, but got 'cpu'"),
        ("tensorrt", "cpu", False, "tensorrt runs on a CUDA device, but got 'cpu'; use openvino or onnx on a CPU"),
        ("onnx", "cpu", True, "half precision is not computed natively by ONNX Runtime on a CPU"),
    ],
)
def test_what_cannot_be_is_one_line(runtime: str, device: str, half: bool, message: str) -> None:
    with pytest.raises(PruningError) as caught:
        check_runtime(runtime, device, half)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("runtime", "package", "remedy"),
    [
        ("onnx", "onnxruntime", "pip install 'paretoprune[onnx]'"),
        ("openvino", "openvino", "pip install 'paretoprune[openvino]'"),
        ("tensorrt", "tensorrt", "install TensorRT (pip install tensorrt)"),
    ],
)
def test_a_missing_package_is_one_line(
    runtime: str, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    if runtime == "tensorrt":  # which asks for a GPU first
        monkeypatch.setattr("paretoprune.pruning.latency.runtimes.tensorrt_session.on_gpu", lambda device: True)
    with pytest.raises(PruningError, match=f"needs the package {package}, but") as caught:
        check_runtime(runtime, "cpu")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_precision_needs_a_cpu_that_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    with pytest.raises(PruningError, match="half precision needs a CPU that computes in 16 bits natively"):
        check_runtime("torch", "cpu", half=True)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    check_runtime("torch", "cpu", half=True)


def test_the_settings_know_the_same_runtimes() -> None:
    field = LatencySection.model_json_schema()["properties"]["runtime"]
    named, *_ = field["anyOf"]  # the others are an agent's own
    assert tuple(named["enum"]) == RUNTIMES == tuple(runtimes._SESSIONS)


def test_threads_of_torch_are_put_back(model: nn.Module) -> None:
    before = torch.get_num_threads()
    measure_pair(model, model, 64, threads=before + 1, max_seconds=0.1, runtime="onnx")
    assert torch.get_num_threads() == before
