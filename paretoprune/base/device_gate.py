"""Shared and exclusive use of a device, whoever implements it; `cluster.device_lock.DeviceLock` does."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Gate(Protocol):
    """Something that lets many users work at once and can make them all wait between two batches."""

    def using(self) -> AbstractContextManager[None]:
        """Hold a shared use of the device; entering may wait, leaving never does. Entered once for each batch."""
        ...


class DeviceGate(Gate, Protocol):
    """A gate that one user can close behind it, to have the device alone."""

    def measuring(self) -> AbstractContextManager[None]:
        """Hold the device alone; entering waits until all shared uses have ended."""
        ...
