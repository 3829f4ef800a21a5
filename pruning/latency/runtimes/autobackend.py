"""Ultralytics' backend, which runs every format that it exports, with the settings that a fair comparison needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from paretoprune.pruning.latency.runtimes.onnx_session import session_options
from paretoprune.pruning.latency.runtimes.openvino_session import openvino_core, openvino_settings


@contextmanager
def tuned_backend(file: str | Path, precision: str = "fp32", threads: int | None = None) -> Iterator[None]:
    """Inside, Ultralytics' backend opens `file` computing in `precision` with so many CPU `threads` (None: its choice).

    By itself it leaves both to the runtime: OpenVINO takes a file in fp32 for leave to compute in bf16, and each
    network's idle threads spin while the other one of a pair is timed. Other formats than ONNX and OpenVINO have what
    they take from their file, and as many threads as their runtime likes.
    """
    with ExitStack() as stack:
        if str(file).endswith(".onnx"):
            import onnxruntime

            stock = onnxruntime.InferenceSession

            def opened(path: Any, options: Any = None, **named: Any) -> Any:
                return stock(path, options or session_options(threads), **named)

            stack.callback(setattr, onnxruntime, "InferenceSession", stock)
            onnxruntime.InferenceSession = opened
        elif str(file).rstrip("/").endswith("_openvino_model"):
            import openvino

            tuned = _TunedCore(openvino_core(), openvino_settings(precision, threads))
            stack.callback(setattr, openvino, "Core", openvino.Core)
            openvino.Core = lambda: tuned
        yield


class _TunedCore:
    """The process's one core (see `openvino_core`), which compiles with our settings."""

    def __init__(self, core: Any, settings: dict[str, Any]) -> None:
        self._core, self._settings = core, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, model: Any, device_name: str, config: dict[str, Any]) -> Any:
        return self._core.compile_model(model, device_name, {**config, **self._settings})
