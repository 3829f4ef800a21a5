"""The contract of a runtime's session, and what all runtimes share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.device import torch_device
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.latency.images import ImageStream
from paretoprune.pruning.yolo.loading import input_channels


@dataclass(frozen=True)
class OnnxFile:
    """A network that was exported elsewhere: what its file holds, and how many channels its images have."""

    content: bytes
    channels: int = 3


_engine_folder: Path | None = None


def keep_engines_in(folder: Path) -> None:
    """Let this process's files of engines lie below ``folder`` from now on, not below the temporary directory: one that
    goes with the process, where this may be killed."""
    global _engine_folder
    _engine_folder = folder


@contextmanager
def engine_folder() -> Iterator[Path]:
    """A folder for the files of an engine, gone when the context ends."""
    with tempfile.TemporaryDirectory(prefix="paretoprune-engine-", dir=_engine_folder) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class EngineFile:
    """A network as it is deployed: the files of an export, which Ultralytics' backend runs in `precision`.

    In memory until they are used, so that a worker that is killed leaves none behind. `name`: of the file or folder;
    `files`: path below the folder ("" for a file) -> content. `channels`: of its images.
    """

    name: str
    files: Mapping[str, bytes]
    precision: str
    channels: int = 3

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Where it lies, there until the context ends."""
        with engine_folder() as folder:
            place = folder / self.name
            for below, content in self.files.items():
                path = place / below if below else place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield place


def read_engine(path: str | Path, precision: str = "", channels: int = 3) -> EngineFile:
    """A file, or an export's folder, that was made elsewhere; `precision` "": as its runtime says."""
    place = Path(path)
    paths = [place] if place.is_file() else [each for each in place.rglob("*") if each.is_file()]
    files = {"" if place.is_file() else str(each.relative_to(place)): each.read_bytes() for each in paths}
    return EngineFile(place.name, files, precision, channels)


Network = nn.Module | OnnxFile
"""A network in memory, or for the runtimes that read ONNX its export."""
Timeable = Network | EngineFile
"""What a session is opened for: a network, or the file that ships."""


def image_channels(network: Timeable) -> int:
    """Channels of the images that a network takes."""
    if isinstance(network, (OnnxFile, EngineFile)):
        return network.channels
    return input_channels(network)


@dataclass(frozen=True)
class SessionSpec:
    """What is run: `batch` images of `imgsz` (a square's side, or height and width) on `device`.

    `half`: 16 bits where the device computes in them natively (see `Session.precision` for which). `threads`: on the
    CPU; None: the runtime's own choice. `stream`: what Ultralytics' predict is timed on; None: the network alone is, on
    `random_images`. Both models of a measurement get equal specs.
    """

    imgsz: ImageSize
    device: str
    batch: int = 1
    half: bool = False
    threads: int | None = None
    stream: ImageStream | None = None


class Session(Protocol):
    """A network loaded into a runtime with its input in place.

    Every implementation is held to `tests/pruning/latency/test_runtimes.py`: it computes what PyTorch computes, its
    time is that of one whole inference (a device's queue drained), it leaves the given network as it was, and what it
    cannot do it says in one line before any work. What is timed is the network up to the decoded boxes; non-maximum
    suppression, which depends on the image, is part of a `PredictSession` alone.
    """

    version: str
    """The runtime with its version, and the provider where it has several."""
    precision: str
    """What the convolutions compute in: "fp32", "fp16" or "bf16"."""
    threads: int | None
    """CPU threads of an inference; None on a GPU."""

    def __init__(self, network: Network, spec: SessionSpec, exports: Any) -> None: ...

    @classmethod
    def check(cls, device: str, half: bool) -> None:
        """Raise PruningError where this runtime cannot run here."""
        ...

    def time_ms(self) -> float:
        """Run one inference to its end and return how long it took, in milliseconds."""
        ...

    def output(self) -> npt.NDArray[np.float32]:
        """The first output of one inference, on the host: (batch, values, anchors) for a detector."""
        ...


class NeedsPackage:
    """Mixed into the sessions of optional packages."""

    package: ClassVar[str]
    remedy: ClassVar[str]

    @classmethod
    def check_package(cls) -> None:
        """Raise PruningError where the package is not installed, or cannot be loaded."""
        import importlib

        try:
            importlib.import_module(cls.package)
        except ImportError as error:
            line = one_line(error, 120)
            raise PruningError(f"this runtime needs the package {cls.package}, but {line}; {cls.remedy}") from error


def on_gpu(device: str) -> bool:
    """Whether a device string means a CUDA device; PruningError where there is no such device."""
    return torch_device(device).type == "cuda"


def gpu_index(device: str) -> int:
    """The number of a CUDA device as this process counts them."""
    return torch_device(device).index or 0


def random_images(network: Network, spec: SessionSpec) -> torch.Tensor:
    """The fixed input: (batch, channels, height, width) float32 in [0, 1), on the CPU; the same for the same spec."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(spec.batch, image_channels(network), *height_width(spec.imgsz), generator=generator)


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a network's output, which for the heads of Ultralytics is the decoded one."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output
