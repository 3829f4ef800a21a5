"""Errors for people: one line that says condition, what was got, and the remedy."""

from __future__ import annotations


class ClusterError(ValueError):
    """A request that the machines at hand cannot meet. The text is one line and fit to be shown as it is."""

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes with its text and what it holds; a subclass's constructor takes other arguments."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[ClusterError], args: tuple[object, ...], state: dict[str, object]) -> ClusterError:
    base = OSError if issubclass(kind, OSError) else ValueError  # the one that lays the object out
    error: ClusterError = base.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


class RayUnreachableError(ClusterError, ConnectionError):
    """No Ray cluster answers at `address`, or a local one did not start."""

    def __init__(self, address: str, why: str, remedy: str) -> None:
        super().__init__(f"Ray must be reachable at {address}, but {why}; {remedy}")
        self.address = address


class NoRoomError(ClusterError):
    """No node of the cluster holds a single trial; another one may come. The message's two parts are kept apart."""

    def __init__(self, condition: str, remedy: str) -> None:
        super().__init__(f"{condition}; {remedy}")
        self.condition, self.remedy = condition, remedy


class LockDirectoryError(ClusterError, OSError):
    """The directory of the device locks cannot be used or cannot be trusted."""


class LockOrderError(ClusterError, RuntimeError):
    """A thread asked to measure while it was itself using the device: it would wait for itself for ever."""


class DeviceNotFoundError(ClusterError, LookupError):
    """A device string that names no device of this host."""


class NodeError(ClusterError):
    """A node of the cluster is not fit for trials; `node` is its name."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.node = node
