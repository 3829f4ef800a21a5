"""Exporting a network to another runtime's format, through Ultralytics' exporter."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.image_size import check_image_size, stride_of, trained_size
from paretoprune.pruning.yolo.loading import load_model
from paretoprune.pruning.yolo.saving import plain_copy, task_of
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_METADATA = "metadata.yaml"  # in every folder that Ultralytics exports to
_QUANTIZE = {"fp32": None, "fp16": 16, "bf16": None, "int8": 8}  # Ultralytics' word for a precision
_OWN = {
    **dict.fromkeys(("quantize", "int8", "half"), "--precision"), "format": "--format", "imgsz": "--imgsz",
    "device": "--device", "model": "MODEL",
    **dict.fromkeys(("data", "split", "fraction"), "--data and --calibration-images"),
}  # fmt: skip


def export_model(
    path: str | Path,
    target: str,
    imgsz: ImageSize | None = None,
    device: str = "cpu",
    trust: bool = False,
    output: str | Path | None = None,
    precision: str = "fp32",
    calibration: Calibration | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint at `path` in the format `target` ("onnx", "openvino", "engine" ...); where it is.

    output: see `export_path`; what was there is replaced once the export is whole, and nothing else is written there.
    imgsz None: the size that the checkpoint was trained at. ``trust`` as in `load_model`. calibration: the images that
    int8 takes the ranges of activations from. options: see `check_options`. Raises PruningError for an unknown format,
    a size that the network does not take, and where the packages that the format needs are not installed (nothing is
    installed by itself).
    """
    place = export_path(path, target, output)
    network = load_model(path, trust)
    size = imgsz or trained_size(getattr(network, "args", None), stride_of(network))
    check_image_size(size, stride_of(network), str(path))
    with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as scratch:
        file = Path(scratch) / f"{Path(path).stem}.pt"
        return _moved(write_export(network, file, target, size, device, precision, calibration, options), place)


def write_export(
    network: nn.Module,
    file: Path,
    target: str,
    imgsz: ImageSize,
    device: str = "cpu",
    precision: str = "fp32",
    calibration: Calibration | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Export `network`, which is left as it is, beside `file`, whose name it takes; where Ultralytics put it.

    As `export_model` does, in a folder of the caller's.
    """
    copy: Any = plain_copy(network)
    copy.task, copy.args = task_of(network), getattr(network, "args", {})
    copy.pt_path = str(file)  # the exporter writes beside it
    settings = {
        "batch": 1, **(options or {}),
        "mode": "export", "task": task_of(network), "format": target, "imgsz": list(height_width(imgsz)),
        "device": device.removeprefix("cuda:"), "verbose": False, "quantize": _QUANTIZE[precision],
    }  # fmt: skip
    if precision == "int8":
        if calibration is None:
            raise PruningError("int8 takes the ranges of activations from images, but got none; give a dataset")
        if "data" in format_arguments(target):
            settings["data"] = "calibration"  # never read, see `_Exporter`; without one COCO8 would be downloaded
    onnx_int8 = _quantised_by_channel(copy) if (target, precision) == ("onnx", "int8") else contextlib.nullcontext()
    quiet_pnnx = _quiet_pnnx() if target == "ncnn" else contextlib.nullcontext()
    with quiet_ultralytics(), _quiet_quantisers(), onnx_int8, quiet_pnnx:
        try:
            return Path(str(_exporter(settings, calibration)(model=copy)))
        except Exception as error:  # missing packages, unsupported operators: whatever the target's tools raise
            line = one_line(error, 200)
            raise PruningError(
                f"'{file.name}' cannot be exported to {target} in {precision} ({type(error).__name__}: {line}); "
                "install what the format needs, then try again"
            ) from error


def _exporter(settings: Mapping[str, Any], calibration: Calibration | None) -> Any:
    """Ultralytics' exporter, which calibrates on our images: by itself it takes those that accuracy is judged on."""
    from torch.utils.data import DataLoader
    from ultralytics.engine.exporter import Exporter

    class CalibratedExporter(Exporter):
        def get_int8_calibration_dataloader(self, prefix: str = "") -> Any:
            assert calibration is not None
            images = [{"img": (image * 255).round().to(torch.uint8)} for image in calibration.images]
            return DataLoader(images, batch_size=min(self.args.batch, len(images)), drop_last=True)  # type: ignore[arg-type]

    return CalibratedExporter(overrides=dict(settings))


@contextlib.contextmanager
def _quantised_by_channel(network: Any) -> Iterator[None]:
    """ONNX Runtime's static quantisation with a scale for each channel of the weights, unsigned activations, and the
    head of a detector left in fp32, as Ultralytics leaves it for OpenVINO.

    Ultralytics takes the defaults. Of yolov8n on BCCD at 320 px these left 0.591 of an mAP of 0.604 and took 250 ms
    where fp32 took 151 (a busy AMD EPYC with VNNI, one thread); a scale for each channel left 0.597 in 203 ms, unsigned
    activations 0.596 in 84 ms, 1.4 to 3.1 times as fast as fp32; without the head 0.603 in 88 ms.
    """
    import onnx
    from onnxruntime import quantization
    from ultralytics.nn.modules import Detect, RTDETRDecoder

    stock, last = quantization.quantize_static, len(network.model) - 1
    place = f"/model.{last}/" if isinstance(network.model[-1], (Detect, RTDETRDecoder)) else None

    def quantise(source: Any, output: Any, reader: Any, nodes_to_exclude: list[str]) -> None:
        nodes = [node.name for node in onnx.load(source).graph.node] if place else []
        kept = [*nodes_to_exclude, *(name for name in nodes if place and place in name)]
        unsigned = quantization.QuantType.QUInt8
        stock(source, output, reader, nodes_to_exclude=kept, per_channel=True, activation_type=unsigned)

    quantization.quantize_static = quantise
    try:
        yield
    finally:
        quantization.quantize_static = stock


@contextlib.contextmanager
def _quiet_quantisers() -> Iterator[None]:
    """NNCF draws its progress on stdout, and ONNX Runtime gives advice on a step that changes nothing here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _quiet_pnnx() -> Iterator[None]:
    """PNNX runs its converter as a process that writes pages to stderr."""
    try:
        convert = importlib.import_module("pnnx.utils.convert")  # the module: a function has the name, too
    except ImportError:  # the exporter says what lacks
        yield
        return
    quiet = SimpleNamespace(run=partial(subprocess.run, stderr=subprocess.DEVNULL), PIPE=subprocess.PIPE)
    stock = vars(convert)["subprocess"]
    convert.subprocess = quiet  # type: ignore[attr-defined]
    try:
        yield
    finally:
        convert.subprocess = stock  # type: ignore[attr-defined]


def check_options(target: str, options: Mapping[str, Any]) -> None:
    """Raise PruningError where `target` does not take one of Ultralytics' export options, or another one sets it."""
    from ultralytics.engine.exporter import export_formats
    from ultralytics.utils import DEFAULT_CFG_DICT

    taken = format_arguments(target)
    for name, value in options.items():
        if name in _OWN:
            raise PruningError(f"{name} is not set that way, but by {_OWN[name]}")
        if name not in DEFAULT_CFG_DICT:
            near = get_close_matches(name, DEFAULT_CFG_DICT, 1)
            raise PruningError(f"Ultralytics has no option '{name}'{f'; do you mean {near[0]}?' if near else ''}")
        known = {each for arguments in export_formats()["Arguments"] for each in arguments}
        if name in known - set(taken) and value not in (None, False) and (name, value) != ("batch", 1):
            own = ", ".join(sorted(set(taken) - {"quantize", "data", "fraction"}))
            raise PruningError(f"{target} does not take {name}; it takes {own or 'no option'}")


def format_arguments(target: str) -> tuple[str, ...]:
    """Ultralytics' export options that a format takes."""
    from ultralytics.engine.exporter import export_formats

    formats = export_formats()
    return tuple(dict(zip(formats["Argument"], formats["Arguments"], strict=True))[target])


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


def size_mb(exported: Path) -> float:
    """Of the file, or of all in the folder; MB of 1e6 bytes."""
    files = [exported] if exported.is_file() else [path for path in exported.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / 1e6


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
