"""TensorRT, through Ultralytics' exporter and its backend, which know the versions of TensorRT's interface."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import (
    NeedsPackage,
    Network,
    SessionSpec,
    first_tensor,
    on_gpu,
    random_images,
)
from paretoprune.pruning.latency.runtimes.exports import ExportCache
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics


class TensorRtSession(NeedsPackage):
    """An engine built on the device that it is timed on; input and output stay there."""

    package = "tensorrt"
    remedy = "install TensorRT (pip install tensorrt), or use the runtime torch-cuda-graph"

    def __init__(self, network: Network, spec: SessionSpec, exports: ExportCache) -> None:
        import tensorrt
        from ultralytics.nn.autobackend import AutoBackend

        self._device = torch_device(spec.device)
        with quiet_ultralytics(), exports.file(network, "engine", spec, spec.half) as engine:
            self._backend: Any = AutoBackend(str(engine), device=self._device, fp16=spec.half)
        # With Ultralytics' `quantize=16` an engine may still take and give float32: the backend knows which
        dtype = torch.float16 if getattr(self._backend, "fp16", False) else torch.float32
        self._input = random_images(network, spec).to(self._device, dtype)
        self.version = f"tensorrt {tensorrt.__version__}, CUDA {torch.version.cuda}"
        self.precision = "fp16" if spec.half else "fp32"
        self.threads = None

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """See `Session`."""
        if not on_gpu(device):
            raise PruningError(f"tensorrt runs on a CUDA device, but got '{device}'; use openvino or onnx on a CPU")
        cls.check_package()

    @torch.inference_mode()
    def time_ms(self) -> float:
        """See `Session`. By the clock: the engine may run on a stream of its own, which events would not see."""
        start = time.perf_counter()
        self._backend(self._input)
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) * 1e3

    @torch.inference_mode()
    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        found: npt.NDArray[np.float32] = first_tensor(self._backend(self._input)).float().cpu().numpy()
        return found
