"""Exports of networks in the formats of other runtimes, made once and kept as long as they are needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.runtimes.base import Network, OnnxFile, SessionSpec, on_gpu
from paretoprune.pruning.yolo.saving import plain_copy, task_of
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_Key = tuple[str, ImageSize, int, bool, bool]


class ExportCache:
    """Exports networks, and keeps what was written in memory: a worker that is killed leaves no files behind.

    A network in memory is exported once for a format, shape and precision, and forgotten when it goes; it must not
    change meanwhile. A worker keeps one for the unpruned model, which it would otherwise export again for every trial.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[nn.Module, dict[_Key, bytes]] = WeakKeyDictionary()

    @contextmanager
    def file(self, network: Network, target: str, spec: SessionSpec, half: bool) -> Iterator[Path]:
        """The file of `network` in the format `target` ("onnx", "engine"), there until the context ends.

        `half`: the file itself is in fp16. Raises PruningError where the network cannot be exported.
        """
        with tempfile.TemporaryDirectory(prefix="paretoprune-export-") as folder:
            path = Path(folder) / f"network.{target}"
            path.write_bytes(self.content(network, target, spec, half))
            yield path

    def content(self, network: Network, target: str, spec: SessionSpec, half: bool) -> bytes:
        """What `file` holds."""
        if isinstance(network, OnnxFile):
            if target == "onnx":
                return network.content
            raise PruningError(f"the format {target} is made from the network itself, but got its ONNX file")
        made = self._made.setdefault(network, {})
        key = (target, spec.imgsz, spec.batch, half, on_gpu(spec.device))
        if key not in made:
            made[key] = self._export(network, target, spec, half)
        return made[key]

    def _export(self, network: nn.Module, target: str, spec: SessionSpec, half: bool) -> bytes:
        """By Ultralytics' exporter, so that the file is what `paretoprune export` gives a person to deploy."""
        with quiet_ultralytics(), tempfile.TemporaryDirectory(prefix="paretoprune-export-") as folder:
            from ultralytics.engine.exporter import Exporter

            copy: Any = plain_copy(network)
            copy.task = task_of(network)
            copy.pt_path = str(Path(folder) / "network.pt")  # the exporter writes beside it
            settings = {
                "format": target,
                "imgsz": list(height_width(spec.imgsz)),
                "batch": spec.batch,
                "quantize": 16 if half else None,
                # A GPU that only runs a float32 file need not be used to write it
                "device": spec.device.removeprefix("cuda:") if half or target == "engine" else "cpu",
                # Heads without non-maximum suppression keep it that way: what is timed is what PyTorch runs
                "nms": False if getattr(network, "end2end", False) else None,
                "verbose": False,
            }
            try:
                written = Path(str(Exporter(overrides=settings)(model=copy)))
                return _without_metadata(written) if target == "onnx" else written.read_bytes()
            except Exception as error:  # missing packages, unsupported operators: whatever the target's tools raise
                line = one_line(error, 200)
                raise PruningError(
                    f"the model cannot be exported to {target} for timing ({type(error).__name__}: {line}); "
                    "use another runtime, or install what the format needs"
                ) from error


def _without_metadata(path: Path) -> bytes:
    """An ONNX file without Ultralytics' notes, the date among them: equal networks are equal files, sent once."""
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    return model.SerializeToString()
