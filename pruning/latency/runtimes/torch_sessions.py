"""PyTorch: eager on the CPU or a GPU, and replayed from a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import (
    Network,
    OnnxFile,
    SessionSpec,
    first_tensor,
    on_gpu,
    random_images,
)
from paretoprune.pruning.latency.runtimes.exports import ExportCache
from paretoprune.pruning.yolo.precision import half_of_cpu
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_CAPTURE_WARM_UPS = 3  # side stream runs before a capture, as PyTorch's notes on CUDA graphs ask for


class TorchSession:
    """Eager mode: on a CUDA device timed by events, on the CPU by the monotonic clock.

    The network is a fused copy (convolution and batch norm in one, as Ultralytics deploys it).
    """

    def __init__(
        self,
        network: Network,
        spec: SessionSpec,
        exports: ExportCache | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device = torch_device(spec.device)
        self._clock = clock
        gpu = self._device.type == "cuda"
        dtype = (torch.float16 if gpu else half_of_cpu()) if spec.half else torch.float32
        assert dtype is not None, "`check` was not asked"
        if isinstance(network, OnnxFile):
            raise PruningError("PyTorch runs a network in memory, but got an ONNX file; use the runtime onnx")
        copy: Any = plain_copy(network)
        with quiet_ultralytics():
            fused = copy.fuse(verbose=False) if hasattr(copy, "fuse") else copy
        self._model = fused.to(self._device, dtype).eval().requires_grad_(False)
        self._input = random_images(network, spec).to(self._device, dtype)
        self.version = _version(gpu)
        self.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        self.threads = None if gpu else torch.get_num_threads()

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """See `Session`."""
        if half and not on_gpu(device) and half_of_cpu() is None:
            raise PruningError(
                "half precision needs a CPU that computes in 16 bits natively, but PyTorch says this one does not; "
                "measure without half precision, or on a GPU"
            )
        torch_device(device)

    @torch.inference_mode()
    def time_ms(self) -> float:
        """See `Session`."""
        if self._device.type != "cuda":
            start = self._clock()
            self._model(self._input)
            return (self._clock() - start) * 1e3
        # Synchronised for every inference: a queue filled ahead would hide what launching costs a single stream
        with torch.cuda.device(self._device):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            self._launch()
            end_event.record()
            end_event.synchronize()
        return float(start_event.elapsed_time(end_event))

    @torch.inference_mode()
    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        found: npt.NDArray[np.float32] = first_tensor(self._model(self._input)).float().cpu().numpy()
        return found

    def _launch(self) -> None:
        self._model(self._input)


class CudaGraphSession(TorchSession):
    """The same network captured once as a CUDA graph and replayed: no launch of single kernels by the host."""

    def __init__(self, network: Network, spec: SessionSpec, exports: ExportCache | None = None) -> None:
        super().__init__(network, spec, exports)
        self.version += ", CUDA graph"
        self._graph = torch.cuda.CUDAGraph()
        try:
            self._result = self._captured()
        except RuntimeError as error:
            line = (str(error).strip().splitlines() or ["RuntimeError"])[0][:200]
            raise PruningError(
                f"the model cannot be captured as a CUDA graph ({line}); use the runtime torch"
            ) from error

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """See `Session`."""
        if not on_gpu(device):
            raise PruningError(f"torch-cuda-graph runs on a CUDA device, but got '{device}'; use the runtime torch")
        super().check(device, half)

    @torch.inference_mode()
    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        self.time_ms()
        found: npt.NDArray[np.float32] = self._result.float().cpu().numpy()
        return found

    def _launch(self) -> None:
        self._graph.replay()

    @torch.inference_mode()
    def _captured(self) -> torch.Tensor:
        """Capture one inference; the tensor that every replay writes its output to."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_CAPTURE_WARM_UPS):
                    self._model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                output = self._model(self._input)
        return first_tensor(output)


def _version(gpu: bool) -> str:
    version = f"torch {torch.__version__}"
    return f"{version}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if gpu else version
