"""The whole job from Python, on what the project brings along: search, full fine-tuning, tables, report, export.

Usage: python examples/python_api.py [FOLDER]

Everything is written below FOLDER (default: runs/example). Small on purpose, some two minutes on two CPU cores: for
figures worth reading give it your own model and data, a GPU, fifty trials and fifty epochs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import paretoprune as pp
from paretoprune.pruning.builtin import BASELINE, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset


def main(folder: Path) -> None:
    """The steps in order."""
    data = build_dataset(folder / "digits", train=48, val=24)
    # Other settings than the common ones go by their names in config.yaml; what is left out has its default.
    settings = {"recover.calibration_images": 16, "latency.max_seconds": 1.0}
    run = pp.search(BASELINE, data, run=folder / "run", imgsz=IMGSZ, trials=3, epochs=1, settings=settings)

    trials = run.trials()
    print(trials[["trial_id", "map50_95", "latency_ms", "speedup", "params_m", "on_front"]].to_string(index=False))
    print(run.front()[["trial_id", "map50_95", "latency_ms", "tied_with"]].to_string(index=False))

    finalists = run.finetune(pick="fastest", max_params_m=1.7, epochs=2)
    checkpoint = finalists["checkpoint"].iloc[0]
    exported = pp.export(checkpoint, "onnx", imgsz=IMGSZ, seconds=2.0)
    assert exported.check is not None
    print(f"{exported.path.name}: answers {exported.check['verdict']}, {exported.check['speedup']:.2f} times as fast")
    print("report:", run.report())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
