"""What can be timed: one model, ready to run again and again on one fixed input, behind one small contract."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from pruning.checkpoints import plain_copy
from pruning.errors import PruningError
from pruning.evaluation_gate import torch_device
from pruning.quiet import quiet_ultralytics

RUNTIMES = ("torch",)


class Session(Protocol):
    """A model loaded into a runtime with its input in place."""

    def time_ms(self) -> float:
        """Run one inference to its end (a device's queue drained) and return how long it took, in milliseconds."""
        ...


def open_session(model: nn.Module, imgsz: int, device: str, batch: int, runtime: str = "torch") -> Session:
    """A session of `runtime` for a copy of `model` on a fixed random image of (batch, 3, imgsz, imgsz).

    Raises PruningError for a runtime or device that is not there.
    """
    if runtime not in RUNTIMES:
        raise PruningError(f"the runtime must be one of {', '.join(RUNTIMES)}, but got '{runtime}'")
    return TorchSession(model, imgsz, device, batch)


class TorchSession:
    """PyTorch in eager mode, float32: on a CUDA device timed by events, on the CPU by the monotonic clock.

    The model is a fused copy (convolution and batch norm in one, as Ultralytics deploys it). What is timed is the
    network up to the decoded boxes; non-maximum suppression, which depends on the image, is not part of it.
    """

    def __init__(
        self, model: nn.Module, imgsz: int, device: str, batch: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = torch_device(device)
        self._clock = clock
        copy: Any = plain_copy(model)
        with quiet_ultralytics():
            self._model = (copy.fuse(verbose=False) if hasattr(copy, "fuse") else copy).to(self._device).eval()
        self._model.requires_grad_(False)
        channels = getattr(model, "yaml", {}).get("channels", 3)
        generator = torch.Generator().manual_seed(0)
        self._input = torch.rand(batch, channels, imgsz, imgsz, generator=generator).to(self._device)

    @torch.inference_mode()
    def time_ms(self) -> float:
        if self._device.type != "cuda":
            start = self._clock()
            self._model(self._input)
            return (self._clock() - start) * 1e3
        # Synchronised for every inference: a queue filled ahead would hide what launching costs a single stream
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        self._model(self._input)
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event))
