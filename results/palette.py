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
GRID = "#E6E9ED"
AXIS = "#9AA5B1"
TEXT = "#323F4B"
MUTED = "#616E7C"
BEFORE = "#DCE3EA"
"""Light fill of what was there before pruning."""
