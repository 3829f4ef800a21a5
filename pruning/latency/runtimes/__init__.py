"""What can be timed: one network, ready to run again and again on one fixed input, behind one small contract.

base              the contract and what all runtimes share
torch_sessions    PyTorch in eager mode, and as a CUDA graph
onnx_session      ONNX Runtime, on the CPU or through its CUDA provider
openvino_session  OpenVINO on the CPU
tensorrt_session  TensorRT
autobackend       Ultralytics' backend, for the formats that have no session of ours
predict_session   Ultralytics' whole prediction, on images
exports           the exported files that ONNX Runtime, OpenVINO and TensorRT read, each made once
"""

from __future__ import annotations

import importlib
from typing import Any

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import (
    EngineFile,
    Network,
    OnnxFile,
    Session,
    SessionSpec,
    Timeable,
    image_channels,
    read_engine,
)
from paretoprune.pruning.latency.runtimes.exports import ExportCache
from paretoprune.pruning.names import RUNTIMES, SpanName

__all__ = [
    "EngineFile", "ExportCache", "Network", "OnnxFile", "Session", "SessionSpec", "Timeable", "check_runtime",
    "image_channels", "open_session", "read_engine",
]  # fmt: skip

# Runtime -> the module and class of its session. Loaded when asked for: most are optional packages.
_SESSIONS: dict[str, tuple[str, str]] = {
    "torch": ("torch_sessions", "TorchSession"),
    "torch-cuda-graph": ("torch_sessions", "CudaGraphSession"),
    "onnx": ("onnx_session", "OnnxSession"),
    "openvino": ("openvino_session", "OpenVinoSession"),
    "tensorrt": ("tensorrt_session", "TensorRtSession"),
}


def check_runtime(runtime: str, device: str, half: bool = False, span: SpanName = "network") -> None:
    """Raise PruningError where `runtime` cannot run on `device` at this precision; one line with the remedy.

    Costs an import of the runtime, no model. The reason may be: no such runtime, its package is not installed, the
    device is not there or not one of the runtime's, the device does not compute in half precision natively.
    """
    session = _session_class(runtime)
    if span == "predict":
        from paretoprune.pruning.latency.runtimes.predict_session import check_predict

        check_predict(runtime, device, half)
    session.check(device, half)


def open_session(network: Timeable, spec: SessionSpec, runtime: str, exports: ExportCache) -> Session:
    """A session of `runtime` for a copy of `network`, ready to run. Raises PruningError as `check_runtime` does.

    A file that the runtime needs is taken from `exports`, or made there. What is deployed runs in its own runtime.
    Whole predictions (`spec.stream`) are those of a network in PyTorch, or of what is deployed.
    """
    if spec.stream is not None:
        from paretoprune.pruning.latency.runtimes.predict_session import PredictSession, check_predict

        predicting: Any
        if isinstance(network, EngineFile):
            with network.written() as path:
                predicting = PredictSession(path, spec, network.precision)
                return predicting
        check_predict(runtime, spec.device, spec.half)
        if isinstance(network, OnnxFile) or runtime != "torch":
            raise PruningError(
                f"Ultralytics' predict runs a network in PyTorch, or what it was exported to, but got {runtime}; use "
                "the runtime torch"
            )
        predicting = PredictSession(network, spec)
        return predicting
    if isinstance(network, EngineFile):
        from paretoprune.pruning.latency.runtimes.autobackend import Backend

        with network.written() as path:
            engine: Any = Backend(path, spec.imgsz, spec.device, precision=network.precision, batch=spec.batch)
            return engine
    session = _session_class(runtime)
    session.check(spec.device, spec.half)
    opened: Session = session(network, spec, exports)
    return opened


def _session_class(runtime: str) -> type[Session]:
    if runtime not in _SESSIONS:
        raise PruningError(f"the runtime must be one of {', '.join(RUNTIMES)}, but got '{runtime}'")
    module, name = _SESSIONS[runtime]
    found: type[Session] = getattr(importlib.import_module(f"paretoprune.pruning.latency.runtimes.{module}"), name)
    return found
