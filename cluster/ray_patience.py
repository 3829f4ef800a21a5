"""A Ray of this process's own is given minutes to start on a busy machine, but none once a process of it has died.

Ray 2.60 waits for its GCS's port and for its raylet's registration in calls that last as long as it may take and that
neither look at the process nor let a signal through. So both waits are made of short pieces here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import psutil

PIECE_SECONDS = 0.5
START_SECONDS = 300
# How long Ray waits for its own processes: 30 s as it comes, which a busy machine exceeds (a raylet that was held up
# for 45 s was given up after 33 s; with these it came up).
PATIENCE = {
    "RAY_gcs_server_port_wait_time_s": str(START_SECONDS),
    "RAY_raylet_start_wait_time_s": str(START_SECONDS),
    "RAY_agent_register_timeout_ms": str(1000 * START_SECONDS),
}


class RayProcessError(Exception):
    """A process of Ray's ended while it was waited for; no RuntimeError, after which Ray would look again for 30 s."""


@contextmanager
def noticing_deaths() -> Iterator[None]:
    """While the body calls `ray.init` for a local Ray: RayProcessError as soon as its GCS or raylet has ended."""
    import ray._private.node
    import ray._private.state

    node: Any = ray._private.node
    services: Any = ray._private.services
    places = ((node, "wait_for_persisted_port"), (services, "get_node"), (node, "GcsClient"))
    whole: list[Any] = [getattr(place, name, None) for place, name in places]
    whole_port, whole_node, whole_client = whole
    started: list[str] = []

    def port(folder: str, node_id: str, name: str, timeout_ms: int = 1000 * START_SECONDS) -> Any:
        def look() -> Any:
            try:
                return whole_port(folder, node_id, name, int(1000 * PIECE_SECONDS))
            except RuntimeError:  # not yet
                return None

        started.append("gcs_server")
        return _in_pieces(look, started, timeout_ms / 1000)

    def client(*arguments: Any, **options: Any) -> Any:
        _check_alive(started)
        return whole_client(*arguments, **options)

    def registered(gcs_address: str, node_id: str) -> Any:
        state: Any = ray._private.state.GlobalState()
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))

        def look() -> Any:
            if any(entry["NodeID"] == node_id for entry in state.node_table()):
                return whole_node(gcs_address, node_id)
            time.sleep(PIECE_SECONDS)
            return None

        started.append("raylet")
        return _in_pieces(look, started, START_SECONDS)

    with ExitStack() as stack:
        for (place, name), mine in zip(places, (port, registered, client), strict=True):
            if hasattr(place, name):  # another Ray waits in its own way
                stack.enter_context(patch.object(place, name, mine))
        try:
            yield
        except Exception:
            _check_alive(started)  # Ray makes other errors of it
            raise


def _in_pieces(look: Callable[[], Any], processes: Sequence[str], seconds: float) -> Any:
    """What `look` returns once it is not None; RayProcessError where one of our `processes` is not alive any more."""
    end = time.monotonic() + seconds
    while (found := look()) is None:
        _check_alive(processes)
        if time.monotonic() > end:
            raise RayProcessError(f"it did not start within {seconds:g} s")
    return found


def _check_alive(processes: Sequence[str]) -> None:
    for name in processes:
        if not _lives(name):
            raise RayProcessError(f"its process {name} ended while it started (see its log below Ray's folder)")


def _lives(name: str) -> bool:
    """Whether a child of ours has this name; it has it from its start on, since Popen returns after the exec."""
    for child in psutil.Process().children():
        try:
            if child.name() == name and child.status() != psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            continue
    return False
