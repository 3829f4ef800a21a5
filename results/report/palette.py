"""Colours of all figures: Okabe and Ito's palette, which the colour-blind can tell apart, and a few greys.

Every kind of point also has its own marker, so nothing depends on colour alone.
"""

from __future__ import annotations

FRONT = "#0072B2"
PICK = "#D55E00"
KNEE = "#E69F00"
BASELINE = "#1F2933"
DOMINATED = "#9AA5B1"
APART = "#B8A9C9"
NATIVE = "#009E73"
FREE_MOVE = "#CC79A7"
OTHER_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1F2933")
"""One a run, where several are laid over each other; each also has its own marker."""
GRID = "#E6E9ED"
AXIS = "#9AA5B1"
TEXT = "#323F4B"
MUTED = "#616E7C"
BEFORE = "#DCE3EA"
"""Light fill of what was there before pruning."""
