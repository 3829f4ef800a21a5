"""Lines for people: on stderr, or to whoever asked for them. On a terminal, what goes on now stands below them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SILENCE_S = 8.0  # nothing takes more than 10 s without a word
BAR_WIDTH = 20

Listener = Callable[[str], None]
Lines = Callable[[], Sequence[str]]
"""What goes on now, the first line in short; called often, from another thread, and not to raise."""

_LISTENERS: list[Listener] = []  # the innermost last
_SHOWN: list[tuple[Lines, Callable[[], float] | None]] = []  # the outermost first, as they stand on the terminal
_display: Any = None  # rich's Live while something is shown on a terminal
_last_line = 0.0  # when a line was printed last


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


def is_live() -> bool:
    """Whether lines go to a terminal on which what stands there can be written anew."""
    return listener() is None and can_rewrite(sys.stderr)


def can_rewrite(stream: Any) -> bool:
    """Whether ``stream`` is a terminal that moves its cursor."""
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb").lower() not in ("", "dumb", "unknown")


def note(text: str) -> None:
    """A line for people outside a sweep; on stderr with the time of day."""
    line(text if listener() is not None else f"{time.strftime('%H:%M:%S')} {text}")


def line(text: str) -> None:
    """A line for people as it is; above what stands on the terminal."""
    global _last_line
    _last_line = time.monotonic()
    if (hearing := listener()) is not None:
        hearing(text)
    elif _display is not None:
        _display.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing(lines: Lines, every_s: float = SILENCE_S, share: Callable[[], float] | None = None) -> Iterator[None]:
    """While the body runs, say what goes on: nothing is printed of an empty ``lines()``.

    On a terminal it stands below everything that is printed, made anew each second, with a bar before its first line
    where the ``share`` that is done, in [0, 1], is known; at the end it goes. Elsewhere it is one line, wherever
    nothing was printed for ``every_s``.
    """
    entry = (lines, share)
    if not is_live():
        done = threading.Event()
        thread = threading.Thread(target=_repeat, args=(lines, every_s, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        return
    _SHOWN.append(entry)
    with contextlib.ExitStack() as stack:
        stack.callback(_SHOWN.remove, entry)
        if _display is None:
            stack.enter_context(_on_terminal())
        _display.refresh()
        yield


@contextlib.contextmanager
def speaking(every_s: float = SILENCE_S, at_once: bool = True) -> Iterator[Callable[[str], None]]:
    """Gives a function to say what is done now; it is said with the seconds since then, while nothing new is said.

    On a terminal that is one line, which the next one replaces; what is to stay is a `note`. Not ``at_once``: elsewhere
    only what takes longer than ``every_s`` is said.
    """
    last: list[tuple[str, float]] = []

    def say(text: str) -> None:
        if not last or text != last[-1][0]:
            last.append((text, time.monotonic()))
            if _display is not None and is_live():
                _display.refresh()
            elif at_once:
                note(text)

    def lines() -> list[str]:
        return [f"{text}: {time.monotonic() - since:.0f} s so far" for text, since in last[-1:]]

    with showing(lines, every_s):
        yield say


def _repeat(lines: Lines, every_s: float, done: threading.Event) -> None:
    """Say what goes on wherever nothing was said for ``every_s``, until ``done``."""
    begin = time.monotonic()
    while not done.wait(max(0.01, max(begin, _last_line) + every_s - time.monotonic())):
        if time.monotonic() - max(begin, _last_line) >= every_s:
            begin = time.monotonic()
            if now := lines():
                note("; ".join(now))


@contextlib.contextmanager
def _on_terminal() -> Iterator[None]:
    """Show what is in `_SHOWN` by rich, on a descriptor of its own: Ray and Ultralytics turn the others."""
    global _display
    from rich.console import Console
    from rich.live import Live

    sys.stderr.flush()
    encoding = sys.stderr.encoding or "utf-8"
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=encoding, errors="surrogateescape")
    console = Console(file=terminal, force_terminal=True, highlight=False)
    # Stays visible: whoever is killed could not bring it back.
    console.show_cursor = lambda show=True: False  # type: ignore[method-assign]
    # What others print there goes above; what goes to a file or a pipe goes on there.
    live = Live(
        get_renderable=_rendered,
        console=console,
        refresh_per_second=1,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with terminal, live:
        _display = live
        try:
            yield
        finally:
            _display = None


def _rendered() -> Any:
    """All that is shown, a line each; what is too long for the terminal is cut."""
    from rich.text import Text

    texts = []
    for lines, share in _SHOWN:
        for number, text in enumerate(lines()):
            bar = f"{_bar(share())} " if share is not None and not number else ""
            texts.append(bar + text)
    return Text("\n".join(texts), no_wrap=True, overflow="ellipsis")


def _bar(share: float) -> str:
    """``━━━━━━──────``, or of signs that every terminal has where this one knows no others."""
    done = round(BAR_WIDTH * min(1.0, max(0.0, share)))
    full, empty = ("━", "─") if _display is not None and _display.console.encoding.startswith("utf") else ("#", "-")
    return full * done + empty * (BAR_WIDTH - done)
