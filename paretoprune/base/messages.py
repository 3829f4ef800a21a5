"""Lines for people, on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

SILENCE_S = 8.0  # nothing takes more than 10 s without a word


def note(text: str) -> None:
    """A line for people outside a sweep, with the time of day."""
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
