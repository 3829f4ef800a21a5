"""Notices that Ray's own processes died, before Ray's core ends this one without a word, or leaves it waiting for ever.

Ray 2.60: after a raylet's death a driver waits on, or its core exits some seconds later at the next task; after the
GCS's death it exits after 60 s. Neither is an exception.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

LOOK_SECONDS = 1.0
GCS_SECONDS = 40.0
"""A head node elsewhere may be away for a moment; Ray gives it up after 60 s."""
STUCK_SECONDS = 8.0
"""A call of Ray's core to what is dead answers to no signal."""


class RayWatch:
    """Looks at the raylet of this node and at the cluster's GCS until it is closed.

    raylet: path of its socket. gcs: host and port. local: both are this process's own, so a refusal is a death.
    When one is dead, SIGTERM is sent to the main thread if there is a handler for it, which finds the reason in `died`;
    some seconds later `stuck` is called with it, in the watch's own thread.
    """

    def __init__(
        self, raylet: str, gcs: tuple[str, int], local: bool, stuck: Callable[[str], None] | None = None
    ) -> None:
        self._stuck = stuck
        self._gcs = gcs
        self._patience = 2 * LOOK_SECONDS if local else GCS_SECONDS
        self._raylet = socket.socket(socket.AF_UNIX)
        self._raylet.connect(raylet.removeprefix("unix://"))
        self._closed = threading.Event()
        self._answered = time.monotonic()
        self.died = ""
        threading.Thread(target=self._run, daemon=True, name="ray-watch").start()

    def look(self) -> str:
        """What died, "" where all is well."""
        if not self.died and not self._closed.is_set():
            if self._is_raylet_gone(0.0):
                self.died = "its raylet on this machine died"
            elif not self._does_gcs_answer() and time.monotonic() - self._answered >= self._patience:
                self.died = "its control process (GCS) died or is out of reach"
        return self.died

    def close(self) -> None:
        """Stop looking: what ends from now on was meant to."""
        self._closed.set()
        with suppress(OSError):
            self._raylet.close()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            if self.look():
                if callable(signal.getsignal(signal.SIGTERM)):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                time.sleep(STUCK_SECONDS)
                if self._stuck:
                    self._stuck(self.died)
                return

    def _is_raylet_gone(self, seconds: float) -> bool:
        """It never says anything on this connection: all that can be read is the end."""
        try:
            readable, _, _ = select.select([self._raylet], [], [], seconds)
            return bool(readable) and not self._raylet.recv(1)
        except OSError:
            return True
        except ValueError:  # closed by another thread
            return False

    def _does_gcs_answer(self) -> bool:
        try:
            socket.create_connection(self._gcs, timeout=5.0).close()
        except OSError:
            return False
        self._answered = time.monotonic()
        return True
