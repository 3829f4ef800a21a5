"""Ctrl-C, SIGTERM and the death of Ray's own processes: one line, and how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import click

from paretoprune.search.errors import InterruptedRunError

# What is being done in the main thread, the innermost last.
_BODIES: list[str] = []


@contextmanager
def interruptible(what: str, remedy: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM in the body into :class:`InterruptedRunError`: ``interrupted while {what}; {remedy}``.

    Otherwise SIGTERM would end the process without leaving Ray and the run folder's lock in order. Where Ray's raylet
    or GCS dies, its watch sends SIGTERM, too; whatever the body raises then, that is the reason which is reported.
    """
    _BODIES.append(f"while {what}; {remedy}")
    main = threading.current_thread() is threading.main_thread()  # signals belong to it
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except InterruptedRunError:
        raise  # of a body inside this one
    except KeyboardInterrupt:
        raise InterruptedRunError(f"{_why()} {_BODIES[-1]}") from None
    except Exception as error:
        if died():
            raise InterruptedRunError(f"{_why()} {_BODIES[-1]}") from error
        raise
    finally:
        _BODIES.pop()
        if main:
            signal.signal(signal.SIGTERM, before)


def died() -> str:
    """Which part of Ray died, so that the run cannot continue; "" if none did, or Ray was not started."""
    start = sys.modules.get("paretoprune.cluster.ray_connection")  # without an import that nobody needs
    return start.what_died() if start else ""


def end_where_stuck(what: str) -> None:
    """Ray is dead, and the main thread has not left the body yet: it waits for Ray and cannot be interrupted
    otherwise."""
    if _BODIES:
        click.echo(f"error: Ray ended ({what}) {_BODIES[-1]}", err=True)
        os._exit(1)


def leave(code: int) -> NoReturn:
    """End this process; without what Ray's core does at an orderly exit where Ray is dead."""
    if not died():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _why() -> str:
    what = died()
    return f"Ray ended ({what})" if what else "interrupted"
