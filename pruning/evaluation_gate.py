"""The shared use of a device, one batch at a time.

Whoever measures a latency needs the device alone. Training and validation therefore ask for the device before each
batch (its loading included, since on a CPU that is work on the same device) and give it back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol

import torch

from pruning.errors import PruningError


class Gate(Protocol):
    """Something that lets many users work at once and can make them all wait between two batches."""

    def using(self) -> AbstractContextManager[None]:
        """Hold a shared use of the device; entering may wait, leaving never does. Entered once for each batch."""
        ...


class NullGate:
    """No locking: for a process that has its device for itself."""

    def using(self) -> AbstractContextManager[None]:
        return nullcontext()


class GatedLoader:
    """A data loader whose every batch, from its loading to the end of the caller's loop body, holds the gate.

    Everything else (length, dataset, sampler, `reset`, `close` ...) is the wrapped loader's. A loop that is left early
    (an exception, a `break`) keeps its generator alive in a frame, so `release` gives the gate back explicitly.
    """

    def __init__(self, loader: Any, gate: Gate, finish: Callable[[], None] | None = None) -> None:
        """`finish` is called before the gate is given back: to wait for a GPU that still computes the batch."""
        self._loader = loader
        self._gate = gate
        self._finish = finish
        self._held = ExitStack()

    def __iter__(self) -> Iterator[Any]:
        self.release()
        batches = iter(self._loader)
        for _ in range(len(self._loader)):
            self._held.enter_context(self._gate.using())
            self._held.callback(self._finish or _nothing)
            yield next(batches)
            self.release()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    @property
    def wrapped(self) -> Any:
        """The loader itself, for who sets something on it."""
        return self._loader

    def release(self) -> None:
        """Give the gate back if it is held; harmless otherwise."""
        self._held.close()


def _nothing() -> None:
    pass


def torch_device(device: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` or `1` (Ultralytics' short form) as a torch device; PruningError if it is not there."""
    name = f"cuda:{device}" if str(device).isdigit() else str(device)
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise PruningError(f"the device must be 'cpu' or 'cuda[:N]', but got '{device}'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PruningError(f"device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def device_finisher(device: torch.device) -> Callable[[], None] | None:
    """A function that waits until a CUDA device has done all queued work; None for a device that has no queue."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
