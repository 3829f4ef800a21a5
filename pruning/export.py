"""Exporting a network to another runtime's format, through Ultralytics' exporter."""

from __future__ import annotations

from pathlib import Path

from pruning.errors import PruningError
from pruning.models import checked_file, load_model
from pruning.quiet import quiet_ultralytics


def export_model(
    path: str | Path, target: str, imgsz: int | None = None, device: str = "cpu", trust: bool = False
) -> Path:
    """Write the checkpoint at `path` in the format `target` ("onnx", "openvino", "engine" ...) beside it.

    imgsz None: the size that the checkpoint was trained at. ``trust`` as in `load_model`. Raises PruningError for an
    unknown format, and where the packages that the format needs are not installed (nothing is installed by itself).
    """
    from ultralytics import YOLO
    from ultralytics.engine.exporter import export_formats

    known = [name for name in export_formats()["Argument"] if name != "-"]
    if target not in known:
        raise PruningError(f"the format must be one of {', '.join(known)}, but got '{target}'")
    found = checked_file(path, trust)
    with quiet_ultralytics():
        try:
            written = YOLO(str(found)).export(
                format=target, imgsz=imgsz or trained_size(found, trust), device=device, verbose=False
            )
        except Exception as error:  # missing packages, unsupported operators: whatever the target's tools raise
            line = " ".join(str(error).split())[:200]
            raise PruningError(
                f"'{path}' cannot be exported to {target} ({type(error).__name__}: {line}); "
                "install what the format needs, then try again"
            ) from error
    return Path(str(written))


def trained_size(path: str | Path, trust: bool = False) -> int:
    """The side of the images, pixels, that a checkpoint was trained at; 640 where it does not say."""
    args = getattr(load_model(path, trust), "args", None) or {}
    size = args.get("imgsz") if isinstance(args, dict) else getattr(args, "imgsz", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return int(size) if size else 640
