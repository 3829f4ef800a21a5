"""Which physical device a device string means, the same for every process of the host."""

from __future__ import annotations

import ctypes
import re
from typing import Protocol

from paretoprune.cluster.errors import DeviceNotFoundError

_CUDA_DEVICE = re.compile(r"(?:cuda(?::(\d+))?|(\d+))")
_CUDA_SUCCESS = 0


class GpuDirectory(Protocol):
    """The GPUs that this process sees, in the order in which it counts them."""

    def uuid(self, index: int) -> str | None:
        """The hardware's own name of GPU `index`; None where there is no such GPU."""


class CudaDriver:
    """Asks the CUDA driver itself, without loading torch and without a context on any device.

    The driver knows CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER and MIG instances exactly as torch in the same process
    does; nvidia-smi's numbering knows none of them.
    """

    def uuid(self, index: int) -> str | None:
        """See GpuDirectory."""
        driver = self._driver()
        device = ctypes.c_int()
        if driver is None or driver.cuDeviceGet(ctypes.byref(device), index) != _CUDA_SUCCESS:
            return None
        raw = (ctypes.c_ubyte * 16)()
        # The _v2 call tells MIG instances of one board apart; drivers before 11.4 have only the first one.
        get_uuid = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
        if get_uuid(ctypes.byref(raw), device) != _CUDA_SUCCESS:
            return None
        return f"GPU-{bytes(raw).hex()}"

    def _driver(self) -> ctypes.CDLL | None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        return driver if driver.cuInit(0) == _CUDA_SUCCESS else None


def default_device(gpus: GpuDirectory | None = None) -> str:
    """The first GPU that this process sees, else the CPU. Costs no import of torch."""
    return "cpu" if (gpus or CudaDriver()).uuid(0) is None else "cuda:0"


def device_key(device: str, gpus: GpuDirectory | None = None) -> str:
    """A name of the physical device that all processes of this host agree on: "cpu", "mps" or "GPU-" and a UUID in hex.

    `device` is what torch or Ultralytics accepts for one device: "cpu", "mps", "cuda", "cuda:1", "1".
    Raises DeviceNotFoundError for anything else, for several devices, and for a GPU this process does not see.
    """
    text = str(device).strip().lower()
    if text in ("cpu", "mps"):
        return text
    match = _CUDA_DEVICE.fullmatch(text)
    if match is None:
        raise DeviceNotFoundError(
            f"a device must be one of cpu, mps, cuda, cuda:N or N, but got {device!r}; name a single device"
        )
    index = int(match.group(1) or match.group(2) or 0)
    uuid = (gpus or CudaDriver()).uuid(index)
    if uuid is None:
        raise DeviceNotFoundError(
            f"device {device!r} must exist, but this process sees no GPU number {index}; "
            "use device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return uuid
