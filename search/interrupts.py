"""Ctrl-C and SIGTERM while something else than a sweep is waited for: one line, and how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from search.errors import InterruptedRunError


@contextmanager
def interruptible(what: str, remedy: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM in the body into :class:`InterruptedRunError`: ``interrupted while {what}; {remedy}``.

    Otherwise SIGTERM would end the process without leaving Ray and the run folder's lock in order.
    """
    main = threading.current_thread() is threading.main_thread()  # signals belong to it
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted while {what}; {remedy}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
