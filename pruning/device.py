"""The shared use of a device, one batch at a time.

Whoever measures a latency needs the device alone. Training and validation therefore ask for the device before each
batch (its loading included, since on a CPU that is work on the same device) and give it back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import new_class
from typing import Any

import torch

from paretoprune.base.device_gate import Gate
from paretoprune.pruning.errors import PruningError


class NullGate:
    """No locking: for a process that has its device for itself."""

    def using(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measuring(self) -> AbstractContextManager[None]:
        return nullcontext()


class DeviceSlot:
    """A use of the device for long work, given up between the work's parts: who measures need not wait for its end.

    May be entered within itself. A part that is asked to `pause` outside of it does nothing.
    """

    def __init__(self, gate: Gate, finish: Callable[[], None] | None = None) -> None:
        """`finish` is called before the gate is given back: to wait for a GPU that still computes."""
        self._gate, self._finish = gate, finish or nothing
        self._held = ExitStack()
        self._depth = 0

    def __enter__(self) -> DeviceSlot:
        if not self._depth:
            self._take()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._held.close()

    def pause(self) -> None:
        """Let in who waits, and go on afterwards."""
        with self.left():
            pass

    @contextmanager
    def left(self) -> Iterator[None]:
        """Give the device up for work that takes it by itself, a batch at a time (a fine-tuning)."""
        depth, self._depth = self._depth, 0
        self._held.close()
        try:
            yield
        finally:
            self._depth = depth
            if depth:
                self._take()

    def _take(self) -> None:
        self._held.enter_context(self._gate.using())
        self._held.callback(self._finish)


def gated_dataset(dataset: Any, gate: Gate) -> Any:
    """`dataset` itself, whose items are made under `gate` from now on: loading workers, too, pause for a measurement.

    In the process that iterates a `GatedLoader` without workers the batch holds the gate anyway.
    """
    stock = type(dataset)

    def make_item(self: Any, index: Any) -> Any:
        with gate.using():
            return stock.__getitem__(self, index)

    def travel(self: Any) -> tuple[Any, ...]:
        # To a worker that was not forked: the class made here exists in this process only
        return _gated_copy, (stock, dict(vars(self)), gate)

    names = {"__getitem__": make_item, "__reduce__": travel, "__module__": stock.__module__, "gate": gate}
    # No slots: an object only changes to a class of its own layout
    body = {**names, "__slots__": ()}
    dataset.__class__ = new_class(stock.__name__, (stock,), exec_body=lambda space: space.update(body))
    return dataset


def _gated_copy(stock: type[Any], state: dict[str, Any], gate: Gate) -> Any:
    dataset = object.__new__(stock)
    vars(dataset).update(state)
    return gated_dataset(dataset, gate)


class GatedLoader:
    """A data loader whose every batch, from its loading to the end of the caller's loop body, holds the gate.

    Where worker processes load, a batch is waited for outside: they enter the gate themselves, item by item (see
    `gated_dataset`), and a measurer that waits would keep them out for ever while this process holds it.

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
        elsewhere = getattr(self._loader, "num_workers", 0) > 0
        for _ in range(len(self._loader)):
            ready = [next(batches)] if elsewhere else []
            self._held.enter_context(self._gate.using())
            self._held.callback(self._finish or nothing)
            yield ready.pop() if ready else next(batches)
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


def nothing() -> None:
    """What is called where nobody waits for anything."""


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


def device_synchronizer(device: torch.device) -> Callable[[], None] | None:
    """A function that waits until a CUDA device has done all queued work; None for a device that has no queue."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
