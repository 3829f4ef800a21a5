"""A network as it will be deployed, made in memory."""

from __future__ import annotations

from torch import nn

from paretoprune.base.image_size import ImageSize
from paretoprune.pruning.data.calibration import Calibration
from paretoprune.pruning.export.exporter import write_export
from paretoprune.pruning.latency.runtimes import EngineFile, image_channels, read_engine
from paretoprune.pruning.latency.runtimes.base import engine_folder


def make_engine(
    network: nn.Module,
    target: str,
    imgsz: ImageSize,
    device: str = "cpu",
    precision: str = "fp32",
    calibration: Calibration | None = None,
    batch: int = 1,
) -> EngineFile:
    """Export `network`, which is left as it is, in the format `target`; see `pruning.export.exporter.write_export`."""
    with engine_folder() as folder:
        options = {"batch": batch}
        place = write_export(network, folder / "network.pt", target, imgsz, device, precision, calibration, options)
        return read_engine(place, precision, image_channels(network))
