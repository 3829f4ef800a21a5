"""Errors for people: one line that says condition, what was got, and the remedy."""

from __future__ import annotations

from paretoprune.base.errors import UserError


class ClusterError(UserError):
    """A request that the machines at hand cannot meet. The text is one line and fit to be shown as it is."""


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


class AgentError(ClusterError):
    """A device's agent will not do what was asked: a wrong token, a runtime that it has not, a file it cannot run."""


class AgentAwayError(AgentError, ConnectionError):
    """A device's agent is not there, broke off or is full; it may be there later."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"an agent must answer at {address}, but {why}; start `paretoprune agent` or agent.py on the device, and "
            "the ssh tunnel to it"
        )
        self.address = address
