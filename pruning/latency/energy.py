"""Energy of an inference, by the GPU's own counter (NVML, millijoules since the driver was loaded)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.device_state import gpu_handle, nvml_library
from paretoprune.pruning.latency.runtimes import ExportCache, open_session
from paretoprune.pruning.latency.runtimes.base import SessionSpec

_WARMUP = 10  # inferences
_REMEDY = "take energy_j out of search.objectives"

Counter = Callable[[], float]
"""Joules so far."""


def energy_counter(device: torch.device) -> Counter:
    """The counter of ``device``. Raises PruningError where it has none: a CPU, an old GPU, a virtual one, no NVML."""
    if device.type != "cuda":
        raise PruningError(f"energy_j needs a GPU that counts its energy, but the device is {device.type}; {_REMEDY}")
    nvml = nvml_library()
    handle = None if nvml is None else gpu_handle(nvml, device)
    if handle is None:
        raise PruningError(f"energy_j needs NVML (the package nvidia-ml-py), but it does not answer; {_REMEDY}")

    def joules() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
        except nvml.NVMLError as error:
            name = torch.cuda.get_device_name(device)
            said = f"energy_j needs a GPU that counts its energy, but {name} says {error}; {_REMEDY}"
            raise PruningError(said) from None

    joules()
    return joules


def energy_per_inference(
    model: nn.Module,
    spec: SessionSpec,
    runtime: str,
    exports: ExportCache,
    seconds: float,
    counter: Counter | None = None,
) -> float:
    """Joules of one inference of a copy of `model`, back to back for `seconds`; what the GPU draws idle is in it.
    With `spec.stream` of a whole prediction.

    The counter moves some ten times a second: below 2 s the figure is coarse. Raises PruningError without a counter.
    """
    joules = counter or energy_counter(torch_device(spec.device))
    session: Any = open_session(model, spec, runtime, exports)
    for _ in range(_WARMUP):
        session.time_ms()
    count, before, end = 0, joules(), time.monotonic() + seconds
    while count == 0 or time.monotonic() < end:
        session.time_ms()
        count += 1
        if spec.stream is not None:
            spec.stream.advance(spec.batch)
    return (joules() - before) / count
