"""While Ray works for a command: what it prints goes to a log, and it is left before the command prints its data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

DRIVER_LOG = "driver.log"


@contextmanager
def quiet_ray(run: Path) -> Iterator[None]:
    """Send stdout to ``<run>/driver.log`` and end the connection to Ray that the body made; one from before stays.

    Stdout belongs to our data, but a thread of Ray's prints there about dead workers and nodes, often seconds later.
    """
    connected = _connected()
    with (run / DRIVER_LOG).open("a", encoding="utf-8", errors="surrogateescape") as log, redirect_stdout(log):
        try:
            yield
        finally:
            if _connected() and not connected:
                from paretoprune.cluster import ray_connection

                ray_connection.shutdown()


def _connected() -> bool:
    """Without an import that nobody needs: a finished run asks for nothing of Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
