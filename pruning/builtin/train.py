"""Trains the detector that the project ships: `python -m paretoprune.pruning.builtin.train [--epochs N] [--out PATH]`.

From scratch, on the built-in dataset, on the CPU or the first GPU. Ultralytics and everything that it writes stay in a
temporary folder; only the finished checkpoint is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from paretoprune.base.atomic import whole_file
from paretoprune.pruning.builtin import BASELINE, BASELINE_YAML, IMGSZ
from paretoprune.pruning.builtin.dataset import build_dataset

TRAIN_IMAGES: Final = 1500
"""More than the 600 of the demo's split, which are the first of these; the validation split is the same."""
EPOCHS: Final = 60
PATH_ARGUMENTS: Final = ("data", "model", "project", "name", "save_dir", "cfg", "pretrained", "resume", "tracker")
"""Training arguments that Ultralytics stores and that name files of the machine it ran on."""


def main(argv: list[str] | None = None) -> int:
    """Trains, exports and prints the accuracy of the exported file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m paretoprune.pruning.builtin.train", description="Train the built-in baseline."
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="training epochs (default: %(default)s)")
    parser.add_argument("--images", type=int, default=TRAIN_IMAGES, help="training images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=BASELINE, help="checkpoint to write (default: the shipped one)")
    parser.add_argument("--device", default="cpu", help="device as Ultralytics names it (default: %(default)s)")
    options = parser.parse_args(argv)
    # Before the first import of Ultralytics, which otherwise sets one thread, installs packages and looks for updates.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    with tempfile.TemporaryDirectory(prefix="paretoprune-baseline-") as folder:
        data = build_dataset(Path(folder) / "digits", train=options.images)
        best = train_baseline(data, Path(folder) / "train", options.epochs, options.device)
        export_baseline(best, options.out)
        accuracy = validate_baseline(options.out, data, options.device)
    size_mb = options.out.stat().st_size / 1e6
    print(f"{options.out}: mAP50-95 {accuracy['map50_95']:.4f}, mAP50 {accuracy['map50']:.4f}, {size_mb:.2f} MB")
    return 0


def train_baseline(data: Path, save_dir: Path, epochs: int, device: str) -> Path:
    """Trains `BASELINE_YAML` from scratch and returns the path of the best checkpoint."""
    from ultralytics.models import YOLO

    model = YOLO(str(BASELINE_YAML), task="detect")
    model.train(
        data=str(data),
        imgsz=IMGSZ,
        epochs=epochs,
        device=device,
        batch=16,
        optimizer="AdamW",
        lr0=0.0015,
        lrf=0.01,
        cos_lr=True,
        warmup_epochs=2.0,
        weight_decay=0.0005,
        # A mirrored digit is no digit. Mosaic widens the variety of scenes but cuts digits at its seams, so the last
        # third of the training sees whole scenes only.
        fliplr=0.0,
        flipud=0.0,
        close_mosaic=epochs // 3,
        scale=0.3,
        cache="ram",
        workers=1,
        amp=False,
        plots=False,
        seed=0,
        patience=epochs,
        project=str(save_dir.parent),
        name=save_dir.name,
        exist_ok=True,
    )
    return save_dir / "weights" / "best.pt"


def export_baseline(trained: Path, out: Path) -> None:
    """Writes a trained Ultralytics checkpoint to out: half precision, no optimiser, and no path of this machine."""
    import torch
    from ultralytics import __version__
    from ultralytics.utils.torch_utils import strip_optimizer

    stripped = strip_optimizer(trained)
    model = stripped["model"]
    arguments = portable_arguments(stripped["train_args"])
    model.args = arguments
    model.yaml = {**model.yaml, "yaml_file": BASELINE_YAML.name}
    if hasattr(model, "pt_path"):
        del model.pt_path
    checkpoint = {
        "model": model,
        "train_args": arguments,
        "epoch": -1,
        "version": __version__,
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
    }
    with whole_file(out) as file:
        torch.save(checkpoint, file)


def portable_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The training arguments without `PATH_ARGUMENTS`, and without any other absolute path."""
    return {
        key: value
        for key, value in arguments.items()
        if key not in PATH_ARGUMENTS and not (isinstance(value, (str, Path)) and Path(value).is_absolute())
    }


def validate_baseline(checkpoint: Path, data: Path, device: str = "cpu") -> dict[str, float]:
    """map50_95 and map50 (0 to 1) of a checkpoint on the validation split of data, by stock Ultralytics in float32."""
    from ultralytics.models import YOLO

    with tempfile.TemporaryDirectory(prefix="paretoprune-val-") as folder:
        metrics = YOLO(str(checkpoint)).val(
            data=str(data), imgsz=IMGSZ, device=device, workers=0, plots=False, verbose=False, project=folder
        )
    return {"map50_95": float(metrics.box.map), "map50": float(metrics.box.map50)}


if __name__ == "__main__":
    sys.exit(main())
