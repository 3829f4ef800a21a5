"""How a task in a worker ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paretoprune.base.errors import typed_line

LOOK_SECONDS = 1.0


def result_of(reference: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
    """Wait for a task's result; what it raised is raised here, with the worker's own line that says what to do.

    ``meanwhile`` is called once a second until it is there.
    """
    import ray

    while not ray.wait([reference], timeout=LOOK_SECONDS)[0]:
        meanwhile()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def failure_of(reference: Any) -> str:
    """Wait for a task; why it failed, as one line, or "" where it did not."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return typed_line(error.cause)
    except ray.exceptions.RayError as error:
        return typed_line(error)
    return ""
