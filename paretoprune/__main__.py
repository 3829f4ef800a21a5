"""``python -m paretoprune`` is the command ``paretoprune``."""

from __future__ import annotations

from paretoprune.search.cli import main

if __name__ == "__main__":
    main()
