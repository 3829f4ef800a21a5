"""Exporting a network to another runtime's format, through Ultralytics' exporter."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from paretoprune.base.errors import one_line
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.image_size import ImageSize, check_image_size, height_width, stride_of, trained_size
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import plain_copy, task_of
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_METADATA = "metadata.yaml"  # in every folder that Ultralytics exports to


def export_model(
    path: str | Path,
    target: str,
    imgsz: ImageSize | None = None,
    device: str = "cpu",
    trust: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Write the checkpoint at `path` in the format `target` ("onnx", "openvino", "engine" ...); where it is.

    output: see `export_path`; what was there is replaced once the export is whole, and nothing else is written there.
    imgsz None: the size that the checkpoint was trained at. ``trust`` as in `load_model`. Raises PruningError for an
    unknown format, a size that the network does not take, and where the packages that the format needs are not
    installed (nothing is installed by itself).
    """
    from ultralytics.engine.exporter import Exporter

    place = export_path(path, target, output)
    network: Any = load_model(path, trust)
    size = imgsz or trained_size(getattr(network, "args", None), stride_of(network))
    check_image_size(size, stride_of(network), str(path))
    settings = {
        "mode": "export", "task": task_of(network), "format": target, "imgsz": list(height_width(size)), "batch": 1,
        "device": device, "verbose": False,
    }  # fmt: skip
    with quiet_ultralytics(), tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        copy: Any = plain_copy(network)
        copy.task, copy.args = task_of(network), getattr(network, "args", {})
        copy.pt_path = str(Path(scratch) / f"{Path(path).stem}.pt")  # the exporter writes beside it
        try:
            written = Path(str(Exporter(overrides=settings)(model=copy)))
        except Exception as error:  # missing packages, unsupported operators: whatever the target's tools raise
            line = one_line(error, 200)
            raise PruningError(
                f"'{path}' cannot be exported to {target} ({type(error).__name__}: {line}); "
                "install what the format needs, then try again"
            ) from error
        return _moved(written, place)


def export_path(model: str | Path, target: str, output: str | Path | None = None) -> Path:
    """Where the export of `model` goes: beside it under Ultralytics' name, else to `output`, a name or a folder.

    A name ends as the format's names do (``.onnx``, ``_openvino_model``): by that every runtime knows it. Raises
    PruningError for another one, an unknown format, a folder in the place that is no export, and a place that cannot
    be written.
    """
    from ultralytics.engine.exporter import export_formats

    formats = export_formats()
    suffixes = {name: end for name, end in zip(formats["Argument"], formats["Suffix"], strict=True) if name != "-"}
    if target not in suffixes:
        raise PruningError(f"the format must be one of {', '.join(suffixes)}, but got '{target}'")
    suffix = suffixes[target]
    name = Path(model).stem + suffix
    place = Path(model).parent / name
    if output is not None:
        place = Path(output)
        if not place.name.endswith(suffix):
            if place.suffix and not place.is_dir():
                raise PruningError(
                    f"the output for {target} must end in {suffix}, or be a folder, but got '{output}'; rename it"
                )
            place = place / name
    if place.is_dir() and not (place / _METADATA).is_file():
        raise PruningError(f"'{place}' is a folder that holds no export, so it is not replaced; give another output")
    above = next(folder for folder in place.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise PruningError(f"the export goes to '{place}', but '{above}' cannot be written; give another output")
    return place


def _moved(written: Path, place: Path) -> Path:
    """Put a whole export in its place in one step, over what was there; the last copy is made beside it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as beside:
        fresh = Path(beside) / place.name
        shutil.move(written, fresh)
        if place.is_dir():
            place.replace(Path(beside) / "before")
        fresh.replace(place)
    return place
