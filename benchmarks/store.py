"""Cells of a long measurement, each written as soon as it is measured, so that a run can be cut off and taken up."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.surgery import commit
from paretoprune.base.atomic import write_json
from paretoprune.cluster.environment import describe_environment

Cell = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One piece of work: `make` gives the values of the cells that `names` identify, one by one.

    Attributes:
        names: what identifies each cell, in the order `make` gives their values.
    """

    names: tuple[dict[str, Any], ...]
    make: Callable[[], Iterable[dict[str, Any]]]


class Store:
    """The cells of `path` (JSON), read anew and rewritten whole for each new one: several runs may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": {}, "notes": [], "cells": []}
        self.load()

    def load(self) -> None:
        """Take in what the file holds by now."""
        if self.path.is_file():
            self.content |= json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def cells(self) -> list[Cell]:
        found: list[Cell] = self.content["cells"]
        return found

    def find(self, **wanted: Any) -> Iterator[Cell]:
        """Cells whose values equal all of `wanted`."""
        return (c for c in self.cells if all(c.get(k) == v for k, v in wanted.items()))

    def value(self, name: str, **wanted: Any) -> Any:
        """`name` of the first such cell, None where there is none."""
        return next((c.get(name) for c in self.find(**wanted)), None)

    def has(self, name: dict[str, Any]) -> bool:
        return next(self.find(**name), None) is not None

    def add(self, name: dict[str, Any], values: dict[str, Any], environment: dict[str, Any]) -> None:
        """Append the cell of that name, unless another run has by now, and write it; `environment`: of this run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.load()
            if self.has(name):
                return
            self.content["environment"] = environment
            made = {"date": date.today().isoformat(), "cpu": environment.get("cpu_model")}
            self.cells.append({**name, **values, **made})
            write_json(self.path, self.content)


def work(store: Store, tasks: Iterable[Task], minutes: float, say: Callable[[str], None] = print) -> bool:
    """Do the tasks whose cells are missing until the time is up; True when all are there.

    A task under way is finished: it is the unit of work, of minutes at most.
    """
    end = time.monotonic() + 60 * minutes
    environment, code = describe_environment(), commit()  # of the code that was loaded, whatever becomes of the files
    for task in tasks:
        store.load()
        if all(store.has(name) for name in task.names):
            continue
        if time.monotonic() > end:
            return False
        begin = time.monotonic()
        for name, values in zip(task.names, task.make(), strict=True):
            store.add(name, {**values, "commit": code}, environment)
            say(f"{time.monotonic() - begin:6.1f} s  {name} {values}")
    return True
