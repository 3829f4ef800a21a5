"""Ultralytics' backend, which runs every format that it exports, with the settings that a fair comparison needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.base.image_size import ImageSize, height_width, size_text
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.onnx_session import session_options
from paretoprune.pruning.latency.runtimes.openvino_session import openvino_core, openvino_settings
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics


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


class Backend:
    """A network or an exported file as Ultralytics runs it: images in, decoded predictions out.

    Raises PruningError where the format's runtime is not installed or cannot load the file, and where it does not take
    images of `imgsz`. A checkpoint is loaded as `load_model` does.
    """

    def __init__(
        self,
        network: nn.Module | str | Path,
        imgsz: ImageSize,
        device: str = "cpu",
        trust: bool = False,
        precision: str = "fp32",
        batch: int = 1,
    ) -> None:
        """precision: what a file computes in; a network does in fp32. batch: of the images that `time_ms` is for."""
        from ultralytics import __version__
        from ultralytics.nn.autobackend import AutoBackend

        self._device = torch_device(device)
        self.version = f"ultralytics {__version__}"
        self.precision = precision
        self.threads = torch.get_num_threads() if self._device.type == "cpu" else None
        self._size = height_width(imgsz)
        if isinstance(network, (str, Path)) and Path(network).suffix == ".pt":
            network = load_model(network, trust)
        half = precision == "fp16" and self._device.type == "cuda" and not isinstance(network, nn.Module)
        given: Any = plain_copy(network) if isinstance(network, nn.Module) else str(network)
        file = given if isinstance(given, str) else ""
        with quiet_ultralytics(), tuned_backend(file, precision, torch.get_num_threads()):
            try:
                self._model = AutoBackend(given, device=self._device, fp16=half, verbose=False)
                self._model.eval()
                self._input = torch.zeros(batch, int(self._model.channels), *self._size, device=self._device)
                self(self._input)
            except ImportError as error:
                raise PruningError(f"'{network}' cannot be run here ({error}); install its runtime") from error
            except Exception as error:  # whatever a runtime raises
                line = one_line(error, 200)
                what = "the network" if isinstance(network, nn.Module) else f"'{network}'"
                raise PruningError(
                    f"{what} cannot be run here on images of {size_text(imgsz)} ({type(error).__name__}: {line}); "
                    "check that it is whole and that its runtime is installed"
                ) from error

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> list[npt.NDArray[np.float32]]:
        """(1, channels, height, width) in [0, 1] -> the outputs that are used, (1, values, boxes) for a detector.

        A checkpoint gives them together with what only its loss looks at.
        """
        answer = self._model(images.to(self._device))
        outputs = list(answer) if isinstance(answer, (list, tuple)) else [answer]
        if isinstance(outputs[0], (list, tuple)):
            outputs = list(outputs[0])
        used = [output for output in outputs if isinstance(output, (torch.Tensor, np.ndarray))]
        return [torch.as_tensor(output).float().cpu().numpy() for output in used]

    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        return self(self._input)[0]

    def time_ms(self) -> float:
        """One inference to its end: the answer is brought to the CPU."""
        start = time.perf_counter()
        self(self._input)
        return (time.perf_counter() - start) * 1e3
