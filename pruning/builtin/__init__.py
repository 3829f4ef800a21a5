"""The built-in task: a detection dataset that builds itself in seconds, and a small detector trained on it.

Importing this package is free of heavy dependencies; `pruning.builtin.dataset` needs scikit-learn and OpenCV,
`pruning.builtin.train` needs Ultralytics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

BASELINE: Final[Path] = Path(__file__).with_name("baseline.pt")
"""The shipped detector (half precision, stock Ultralytics): 1.81 M parameters, mAP50-95 0.905 on the validation split.

`python -m paretoprune.pruning.builtin.train` trained it (60 epochs, 1,500 images) and writes it again."""

BASELINE_YAML: Final[Path] = Path(__file__).with_name("baseline.yaml")
"""The architecture of `BASELINE`: YOLOv8 with channel widths that are multiples of 8."""

IMGSZ: Final[int] = 160
"""Side of the built-in images in pixels; the size `BASELINE` was trained at."""
