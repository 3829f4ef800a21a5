"""OpenVINO on the CPU, tuned for latency; it reads the ONNX export."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import NeedsPackage, Network, SessionSpec, on_gpu, random_images
from paretoprune.pruning.latency.runtimes.exports import ExportCache

_NATIVE_HALF = {"FP16": "f16", "BF16": "bf16"}  # OpenVINO's word for what a device can -> for what is asked of it
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


class OpenVinoSession(NeedsPackage):
    """One stream with the latency hint, precision said explicitly.

    Left to itself OpenVINO computes in bf16 on CPUs that can, so a "float32" network would not be measured as one.
    """

    package = "openvino"
    remedy = "pip install 'paretoprune[openvino]'"

    def __init__(self, network: Network, spec: SessionSpec, exports: ExportCache) -> None:
        import openvino

        core = openvino_core()
        hint = half_type(core) if spec.half else "f32"
        assert hint is not None, "`check` was not asked"
        settings = openvino_settings(_PRECISIONS[hint], spec.threads)
        with exports.file(network, "onnx", spec, half=False) as path:
            compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(openvino.Tensor(random_images(network, spec).numpy()))
        self._output_port = compiled.output(0)
        self.version = f"openvino {openvino.__version__.partition('-')[0]} CPU"
        self.precision = _PRECISIONS[hint]
        self.threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """See `Session`."""
        if on_gpu(device):
            raise PruningError(f"openvino is measured on the CPU, but got '{device}'; use --device cpu, or tensorrt")
        cls.check_package()
        if half and half_type(openvino_core()) is None:
            raise PruningError(
                "half precision needs a CPU that computes in 16 bits natively, but OpenVINO says this one does not; "
                "measure without half precision"
            )

    def time_ms(self) -> float:
        """See `Session`."""
        start = time.perf_counter()
        self._request.infer()
        return (time.perf_counter() - start) * 1e3

    def output(self) -> npt.NDArray[np.float32]:
        """See `Session`."""
        self._request.infer()
        found: npt.NDArray[np.float32] = self._request.get_tensor(self._output_port).data.astype(np.float32)
        return found


def openvino_settings(precision: str, threads: int | None) -> dict[str, Any]:
    """One stream with the latency hint, computing in `precision`; what int8 leaves in floating point in fp32."""
    hints = {ours: theirs for theirs, ours in _PRECISIONS.items()}
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": hints.get(precision, "f32"),
        # Pinned, the two models of a measurement would sit on different cores, one perhaps the busier
        "ENABLE_CPU_PINNING": False,
    }
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": threads}


@cache
def openvino_core() -> Any:
    """The process's one `openvino.Core`, which lives until the process ends.

    On CPUs with AMX a core's CPU plugin gives the thread an alternate signal stack of its own, and the one from before
    back when it goes. Two cores that go in the order in which they came leave the thread on a stack that is freed, and
    the next signal with a handler ends the process: here a loading worker's end (SIGCHLD), by a segmentation fault
    (OpenVINO 2026.4, Python 3.11).
    """
    import openvino

    return openvino.Core()


def half_type(core: Any) -> str | None:
    """The 16-bit type that the CPU computes in natively, fp16 before bf16."""
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return next((ours for theirs, ours in _NATIVE_HALF.items() if theirs in capabilities), None)
