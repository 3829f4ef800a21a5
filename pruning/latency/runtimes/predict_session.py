"""A whole prediction as Ultralytics makes it: pre-processing, the network and post-processing, image after image."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from paretoprune.base.errors import typed_line
from paretoprune.base.image_size import plain_size, size_text
from paretoprune.pruning.device import device_synchronizer, torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.autobackend import tuned_backend
from paretoprune.pruning.latency.runtimes.base import SessionSpec, on_gpu
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.tasks import predictor_of
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "engine": "tensorrt", "ncnn": "ncnn"}
"""Format of a file -> the package that runs it."""


def check_predict(runtime: str, device: str, half: bool) -> None:
    """Raise PruningError where Ultralytics' predict does not run so."""
    if runtime == "torch-cuda-graph":
        raise PruningError(
            "Ultralytics' predict takes images of any shape, so it is not replayed from a CUDA graph; use the runtime "
            "torch, or the span network"
        )
    if runtime == "torch" and half and not on_gpu(device):
        raise PruningError(
            "Ultralytics' predict computes in fp32 in PyTorch on a CPU; measure it without half precision, as a file "
            "of openvino, or with the span network"
        )


class PredictSession:
    """Ultralytics' own predictor of the task with its defaults, as `YOLO(...).predict` has it.

    A network in memory sees rectangles, an exported file images of exactly its size, as there. Timed are the three
    steps that Ultralytics' own line `Speed:` is of; images are decoded before.
    """

    def __init__(self, network: nn.Module | Path, spec: SessionSpec, precision: str = "fp32") -> None:
        """precision: what a file computes in; a network does in fp32, with `spec.half` in fp16."""
        from ultralytics import __version__

        assert spec.stream is not None
        device = torch_device(spec.device)
        self._stream, self._batch = spec.stream, spec.batch
        self._finish = device_synchronizer(device)
        is_file = isinstance(network, Path)
        half = spec.half if not is_file else precision == "fp16" and self._finish is not None
        named = {"task": _task(spec.stream.kind), "mode": "predict", "conf": 0.25, "rect": True, "save": False}
        settings = {**named, "imgsz": plain_size(spec.imgsz), "batch": spec.batch, "device": spec.device}
        settings |= {"verbose": False, "quantize": 16 if half else None}
        with (
            quiet_ultralytics(),
            tuned_backend(network if isinstance(network, Path) else "", precision, torch.get_num_threads()),
        ):
            try:
                self._predictor: Any = predictor_of(spec.stream.kind)(overrides=settings)
                given = str(network) if is_file else plain_copy(network)  # type: ignore[arg-type]
                self._predictor.setup_model(given, verbose=False)
                shapes = {image.shape: image for image in spec.stream.images}
                for image in shapes.values():  # a runtime prepares itself for each: no inference's own time
                    self._predictor([image] * spec.batch)
            except Exception as error:  # whatever a runtime raises
                what = f"'{network.name}'" if isinstance(network, Path) else "the network"
                raise PruningError(
                    f"{what} cannot predict here on images of {size_text(spec.imgsz)} ({typed_line(error, 200)}); "
                    "check that its runtime is installed, or time the network alone (span network)"
                ) from error
        package = _PACKAGES.get(self._predictor.model.format, "torch")
        its = str(getattr(importlib.import_module(package), "__version__", "")).partition("-")[0]
        self.version = f"ultralytics {__version__} predict, {package} {its}"
        self.precision = precision if is_file else "fp16" if half else "fp32"
        self.threads = torch.get_num_threads() if device.type == "cpu" else None

    def predict(self, images: list[npt.NDArray[np.uint8]]) -> list[Any]:
        """Ultralytics' results of these images."""
        predictor = self._predictor
        with torch.inference_mode():
            predictor.batch = ["image"] * len(images), images, [""] * len(images)
            tensor = predictor.preprocess(images)
            results: list[Any] = predictor.postprocess(predictor.inference(tensor), tensor, images)
        return results

    def time_ms(self) -> float:
        """See `Session`."""
        images = self._stream.take(self._batch)
        start = time.perf_counter()
        self.predict(images)
        if self._finish is not None:
            self._finish()
        return (time.perf_counter() - start) * 1e3

    def output(self) -> npt.NDArray[np.float32]:
        """What is found on the first of the present images: boxes with scores and classes, or probabilities."""
        found = self.predict(self._stream.take(self._batch))[0]
        kept = found.probs if found.probs is not None else found.obb if found.obb is not None else found.boxes
        data: npt.NDArray[np.float32] = kept.data.float().cpu().numpy()
        return data


def _task(kind: str) -> str:
    return "detect" if kind == "rtdetr" else kind
