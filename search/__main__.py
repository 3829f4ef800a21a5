"""``python -m search`` is the command ``paretoprune``."""

from __future__ import annotations

from search.cli import main

if __name__ == "__main__":
    main()
