"""Errors that a person can cause: one line with the condition, what was got, and the remedy."""

from __future__ import annotations

import re

from paretoprune.base.errors import UserError


class SearchError(UserError):
    """Base of this room's errors; the command line prints its text as one line and exits with 1."""


class ArgumentError(SearchError):
    """Arguments contradict each other, one is missing or out of range; names of arguments stand in backticks.

    On the command line it is wrong usage (exit code 2), and the names are those of its options.
    """

    def as_options(self) -> str:
        """The text with ``--keep-macs`` in place of ```keep_macs```."""
        return re.sub(r"`(\w+)`", lambda found: _option(found.group(1)), str(self))


def _option(argument: str) -> str:
    return "-o" if argument == "output" else f"--{argument.replace('_', '-')}"


class ConfigError(SearchError):
    """A setting is unknown, has a wrong value, or contradicts another one."""


class SpaceError(SearchError):
    """The search space cannot be built: a pattern or block matches nothing, or nothing is left to prune."""


class RunFolderError(SearchError):
    """A run folder cannot be used: missing, unwritable, of another configuration, or in use.

    ``host`` and ``pid`` name the driver that holds the folder, where that is the reason.
    """

    def __init__(self, message: str, host: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.host = host
        self.pid = pid


class TrialError(SearchError):
    """A trial's result cannot be used (a figure is not finite, a phase did not deliver)."""


class InterruptedRunError(SearchError):
    """Ctrl-C, SIGTERM or Ray's death ended it; what was finished is kept, and the text says how to go on."""
