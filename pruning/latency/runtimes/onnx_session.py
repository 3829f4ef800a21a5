"""ONNX Runtime: its CPU provider, and its CUDA provider where the installed build has it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import (
    NeedsPackage,
    Network,
    SessionSpec,
    gpu_index,
    on_gpu,
    random_images,
)
from paretoprune.pruning.latency.runtimes.exports import ExportCache

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxSession(NeedsPackage):
    """One provider, all operators on it, input and output bound on its device; timed until ONNX Runtime returns."""

    package = "onnxruntime"
    remedy = "pip install 'paretoprune[onnx]' (onnxruntime-gpu for a GPU)"

    def __init__(self, network: Network, spec: SessionSpec, exports: ExportCache) -> None:
        import onnxruntime

        gpu = on_gpu(spec.device)
        half = spec.half and gpu
        options = session_options(spec.threads)
        device = ("cuda", gpu_index(spec.device)) if gpu else ("cpu", 0)
        provider = (_CUDA, {"device_id": device[1]}) if gpu else _CPU
        with exports.file(network, "onnx", spec, half) as path:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        used = self._session.get_providers()[0]
        if gpu and used != _CUDA:  # it falls back by itself where CUDA's libraries do not load
            raise PruningError(
                f"ONNX Runtime must run on {spec.device}, but fell back to {used}; check its CUDA libraries"
            )
        self._output_name = self._session.get_outputs()[0].name
        self._binding = self._bound(random_images(network, spec).numpy(), half, device)
        self.version = f"onnxruntime {onnxruntime.__version__} {used}"
        self.precision = "fp16" if half else "fp32"
        self.threads = None if gpu else spec.threads

    def _bound(self, images: npt.NDArray[np.float32], half: bool, device: tuple[str, int]) -> Any:
        import onnxruntime

        given = images.astype(np.float16) if half else images
        self._images = onnxruntime.OrtValue.ortvalue_from_numpy(given, *device)  # kept: the binding does not own it
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._session.get_inputs()[0].name, self._images)
        for output in self._session.get_outputs():
            binding.bind_output(output.name, *device)
        return binding

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """See `Session`."""
        gpu = on_gpu(device)
        cls.check_package()
        if half and not gpu:
            raise PruningError(
                "half precision is not computed natively by ONNX Runtime on a CPU (it converts to fp32 and back); "
                "measure without half precision, or with openvino"
            )
        import onnxruntime

        if gpu and _CUDA not in onnxruntime.get_available_providers():
            raise PruningError(
                f"ONNX Runtime needs its CUDA provider to measure on '{device}', but this build has "
                f"{', '.join(onnxruntime.get_available_providers())}; install onnxruntime-gpu, or measure on the CPU"
            )

    def time_ms(self) -> float:
        """See `Session`. A run returns when the device has finished: ONNX Runtime synchronises at its end."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - start) * 1e3

    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        self._session.run_with_iobinding(self._binding)
        first: npt.NDArray[Any] = self._binding.copy_outputs_to_cpu()[0]
        return first.astype(np.float32)


def session_options(threads: int | None) -> Any:
    """Only errors are logged, so many CPU threads (None: ONNX Runtime's choice), none of which spins after a run.

    Threads of a model that has just run spin for the next call: they would do so while the other model is timed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
