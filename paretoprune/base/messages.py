"""Lines for people: on stderr, or to whoever asked for them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SILENCE_S = 8.0  # nothing takes more than 10 s without a word


Listener = Callable[[str], None]

_LISTENERS: list[Listener] = []  # the innermost last


@contextlib.contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Inside, ``listener`` is called with every line in place of stderr; None changes nothing."""
    if listener is None:
        yield
        return
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def listener() -> Listener | None:
    """Whoever hears the lines now; None: they go to stderr."""
    return _LISTENERS[-1] if _LISTENERS else None


def note(text: str) -> None:
    """A line for people outside a sweep; on stderr with the time of day."""
    if (hearing := listener()) is not None:
        hearing(text)
    else:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def speaking(every_s: float = SILENCE_S) -> Iterator[Callable[[str], None]]:
    """Gives a `note` whose last line is said again, with the seconds since, while nothing new is said."""
    last: list[tuple[str, float]] = []
    spoken, done = threading.Event(), threading.Event()

    def say(text: str) -> None:
        last.append((text, time.monotonic()))
        spoken.set()
        note(text)

    def repeat() -> None:
        while not done.is_set():
            if spoken.wait(every_s):
                spoken.clear()
            elif last:
                text, since = last[-1]
                note(f"{text}: {time.monotonic() - since:.0f} s so far")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield say
    finally:
        done.set()
        spoken.set()
        thread.join()
