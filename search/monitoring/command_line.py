"""Command lines that a message gives to a person."""

from __future__ import annotations

import shlex
from pathlib import Path

from paretoprune.search.storage.object_store import address_of


def command_line(*words: object) -> str:
    """``paretoprune WORDS`` to be printed: pasted into a shell, it is these words whatever signs a path holds."""
    return shlex.join(["paretoprune", *(address_of(word) if isinstance(word, Path) else str(word) for word in words)])
