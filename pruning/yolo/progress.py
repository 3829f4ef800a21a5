"""How far Ultralytics' long loops over images are, told to whoever wants to know, in place of its progress bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY_S = 5.0  # nothing longer than 10 s passes in silence

_HEARING: list[Callable[[str], None]] = []  # the innermost last


@contextmanager
def progress_told(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` is told every few seconds how far a loop is: "reading labels, 12,000 of 100,000 images"."""
    _HEARING.append(say)
    try:
        yield
    finally:
        _HEARING.pop()


def loop_teller(doing: str, of: str) -> Callable[..., Any]:
    """What stands for Ultralytics' TQDM: loops of `doing` over items that are called `of`."""

    class Loop:
        def __init__(
            self, items: Iterable[Any] | None = None, desc: str = "", total: int | None = None, **_: Any
        ) -> None:
            self.desc, self._items, self._total = desc, items, total

        def __iter__(self) -> Iterator[Any]:
            said = time.monotonic()
            for number, item in enumerate(self._items or ()):
                if _HEARING and time.monotonic() - said > EVERY_S:
                    said = time.monotonic()
                    _HEARING[-1](f"{doing}, {number:,} of {self._total or 0:,} {of}")
                yield item

        def close(self) -> None:
            """Nothing was drawn."""

    return Loop
