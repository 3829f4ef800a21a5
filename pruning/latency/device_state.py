"""What a device was like while something was timed on it: its clock, power and throttling. What cannot be read is None.

Never a guess: a virtual machine shows no throttling, a container no counters, a machine without `nvidia-ml-py` no GPU
clocks, and then the record says null.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

# Bits of NVML's "clocks event reasons" (nvml.h); an idle GPU's low clock is no throttling and is not listed.
_REASONS = {
    0x02: "application clock setting",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clock setting",
}
_CHOSEN = {"application clock setting", "display clock setting"}  # somebody's setting: it does not come and go


@dataclass(frozen=True)
class Conditions:
    """A device while it was measured. `clock_mhz_*`: mean over the usable CPU cores, or the GPU's SM clock.

    `throttled`: whether the device lowered its clock by itself (heat, power) at any time it was looked at, or its
    counter says so; `throttle_reasons`: what was seen, chosen settings included. The last five are an agent's: its
    hottest sensor, the governor of its cores, a Jetson's power mode. None: cannot be read here.
    """

    device_name: str
    driver: str | None = None
    clock_mhz_start: float | None = None
    clock_mhz_end: float | None = None
    power_w_start: float | None = None
    power_w_end: float | None = None
    throttled: bool | None = None
    throttle_reasons: tuple[str, ...] | None = None
    temperature_c_start: float | None = None
    temperature_c_end: float | None = None
    governor: str | None = None
    power_mode: str | None = None
    memory_free_mb: int | None = None


class DeviceMonitor(Protocol):
    """Looks at one device: made at the start, `look` now and then, `finish` right after the last timed inference."""

    def look(self) -> None: ...
    def finish(self) -> Conditions: ...


def watch(device: torch.device) -> DeviceMonitor:
    """Begin to watch a device."""
    return GpuWatch(device, nvml_library()) if device.type == "cuda" else CpuWatch()


class CpuWatch:
    """The kernel's figures: frequency by psutil, throttling by the counters of each core where there are any."""

    def __init__(self, root: Path = Path("/sys/devices/system/cpu")) -> None:
        self._root = root
        self._events = self._throttle_events()
        self._clock = _cpu_clock_mhz()

    def look(self) -> None:
        """Nothing: the kernel counts by itself."""

    def finish(self) -> Conditions:
        """See `DeviceMonitor`."""
        clock, events = _cpu_clock_mhz(), self._throttle_events()
        known = events is not None and self._events is not None
        throttled = events > self._events if known else None  # type: ignore[operator]
        return Conditions(
            device_name=_cpu_name(),
            clock_mhz_start=self._clock,
            clock_mhz_end=clock,
            throttled=throttled,
            throttle_reasons=None if throttled is None else ("thermal",) * throttled,
        )

    def _throttle_events(self) -> int | None:
        """How often any core or package was throttled since the machine started."""
        counts = []
        for path in self._root.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
            with suppress(OSError, ValueError):
                counts.append(int(path.read_text(encoding="ascii")))
        return sum(counts) if counts else None


class GpuWatch:
    """NVML's figures of one CUDA device; all but the name None without it."""

    def __init__(self, device: torch.device, nvml: Any) -> None:
        self._nvml = nvml
        self._name = torch.cuda.get_device_name(device)
        self._handle = None if nvml is None else gpu_handle(nvml, device)
        self._bits: int | None = None
        self._start = self._figures()
        self.look()

    def look(self) -> None:
        """Take note of the reasons for which the clock is held down at this moment."""
        ask = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or getattr(
            self._nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None
        )  # the newer and the older name
        bits = self._read(lambda: int(ask(self._handle))) if ask is not None else None
        if bits is not None:
            self._bits = bits | (self._bits or 0)

    def finish(self) -> Conditions:
        """See `DeviceMonitor`."""
        self.look()
        clock, power = self._figures()
        reasons = None if self._bits is None else tuple(text for bit, text in _REASONS.items() if bit & self._bits)
        return Conditions(
            device_name=self._name,
            driver=self._read(lambda: _text(self._nvml.nvmlSystemGetDriverVersion())),
            clock_mhz_start=self._start[0],
            clock_mhz_end=clock,
            power_w_start=self._start[1],
            power_w_end=power,
            throttled=None if reasons is None else bool(set(reasons) - _CHOSEN),
            throttle_reasons=reasons,
        )

    def _figures(self) -> tuple[float | None, float | None]:
        """SM clock (MHz) and power (W)."""
        clock = self._read(lambda: float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)))
        power = self._read(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)
        return clock, power

    def _read(self, ask: Any) -> Any:
        """One figure; None where this GPU, driver or virtual machine does not tell it."""
        if self._handle is None:
            return None
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


def nvml_library() -> Any:
    """NVIDIA's library, ready to be asked; None where its package or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def gpu_handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of a torch device, found by its UUID: the two count devices differently. None if it has none."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    for prefix in ("GPU", "MIG"):
        with suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(f"{prefix}-{uuid}")
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu_name() -> str:
    with quiet_ultralytics():
        from ultralytics.utils.cpu import CPUInfo

        return str(CPUInfo.name())


def _cpu_clock_mhz() -> float | None:
    """Mean over the cores, as the kernel says (a virtual machine: often the nominal clock); None if it does not."""
    import psutil

    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        return None
    return float(frequency.current) if frequency is not None and frequency.current > 0 else None
