"""How rows reach a person or a program: an aligned table, JSON or CSV, always on stdout."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import click

from paretoprune.search.errors import ArgumentError

_DATA: list[IO[str]] = []  # where data goes while everything else that is printed goes to stderr, innermost last


@contextlib.contextmanager
def data_alone_on_stdout() -> Iterator[None]:
    """Inside, :func:`echo` alone reaches stdout; what anything else prints there goes to stderr.

    Ultralytics speaks on stdout while it is imported (a new user's settings, a HOME that cannot be written), Ray
    repeats its workers there, compilers of exports print in processes of their own: so the descriptor is turned, which
    they all inherit. Where stdout is no descriptor (a captured one), only ``sys.stdout`` can be.
    """
    try:
        descriptor, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        _DATA.append(sys.stdout)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            _DATA.pop()
        return
    sys.stdout.flush()
    kept = os.dup(descriptor)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, kept)
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        _DATA.append(stack.enter_context(open(kept, "w", encoding=encoding, errors=errors, closefd=False)))
        stack.callback(_DATA.pop)
        os.dup2(stderr, descriptor)
        stack.callback(os.dup2, kept, descriptor)
        stack.callback(sys.stdout.flush)
        yield


def with_data_alone_on_stdout(command: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a command, run in :func:`data_alone_on_stdout`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        with data_alone_on_stdout():
            return command(*args, **options)

    return wrapped


def with_arguments_as_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a command, in which wrong arguments of the Python API are wrong usage of the options."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except ArgumentError as error:
            raise click.UsageError(error.as_options()) from error

    return wrapped


def echo(text: str = "", newline: bool = True) -> None:
    """Print data: the only way to stdout that a command has."""
    click.echo(text, file=_DATA[-1] if _DATA else None, nl=newline)


def stdout_width() -> int | None:
    """Columns of the terminal that data goes to; None where it goes elsewhere."""
    stream = _DATA[-1] if _DATA else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None


def unbroken(text: str) -> str:
    """``text`` on one line. Blanks within a line stay as they are: they may be those of a path in a command."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def print_rows(
    rows: Sequence[Mapping[str, Any]], form: str, columns: Sequence[str] | None = None, empty: str = "(none)"
) -> None:
    """Print ``rows``; JSON and CSV hold every key, the table only ``columns`` (all where none are given).

    The table of a classifier's run has ``top1`` in place of ``map50_95``.
    """
    if form == "json":
        echo(json.dumps(list(rows), indent=2))
    elif form == "csv":
        echo(_as_csv(rows), newline=False)
    else:
        echo(as_table(rows, columns and [_of_the_task(name, rows) for name in columns], empty))


def print_row(row: Mapping[str, Any], form: str) -> None:
    """Print one thing: a JSON object, a CSV of one line, or a key and its value per line."""
    if form == "json":
        echo(json.dumps(dict(row), indent=2))
    elif form == "csv":
        echo(_as_csv([row]), newline=False)
    else:
        width = max((len(key) for key in row), default=0)
        for key, value in row.items():
            echo(f"{key:<{width}}  {_text(value)}")


def with_objectives(columns: Sequence[str], objectives: Sequence[str]) -> list[str]:
    """``columns`` with the run's other objectives (of masks, keypoints ...) behind the accuracy."""
    place = list(columns).index("map50_95") + 1
    own = [name for name in objectives if name not in (*columns, "top1")]
    return [*columns[:place], *own, *columns[place:]]


def _of_the_task(column: str, rows: Sequence[Mapping[str, Any]]) -> str:
    own = column.replace("map50_95", "top1")
    return (
        own
        if all(row.get(column) is None for row in rows) and any(row.get(own) is not None for row in rows)
        else column
    )


def as_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, empty: str = "(none)") -> str:
    """Aligned columns with a header; numbers to the right. ``empty``: in place of a table without rows."""
    if not rows:
        return empty
    names = list(columns or rows[0])
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(names[i]), *(len(line[i]) for line in cells)) for i in range(len(names))]
    right = [all(_is_number(row.get(name)) for row in rows) for name in names]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(texts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(names), *(line(texts) for texts in cells)])


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _csv_cell(value) for name, value in row.items()})
    return stream.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return _text(value)  # height and width
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        size = all(isinstance(item, int) for item in value)  # height and width, as the option takes them
        return (",".join if size else " .. ".join)(_text(item) for item in value)
    return str(value)
