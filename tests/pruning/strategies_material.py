"""What the strategies' tests share: a baseline with images, and a tuning that only counts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from paretoprune.pruning.recovery.refit import RefitSettings
from paretoprune.pruning.strategies import Outcome, get_strategy
from paretoprune.pruning.workbench import Workbench
from paretoprune.pruning.yolo.saving import plain_copy, save_checkpoint
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics
from tests.pruning.masking import build, raw_outputs
from tests.pruning.recovery_material import shapes_dataset

IMGSZ = 96
# Five blocks; of the C2f more than one layer, so that a strategy of first layers has something to leave.
RATIOS = {"model.1": 0.25, "model.2.*": 0.5, "model.4.*": 0.5, "model.5": 0.5, "model.22.cv2.0.?": 0.25}


class Killed(Exception):
    """Stands for whatever ends a process in the middle of a tuning."""


@dataclass
class CountingTune:
    """Adds a mark to every bias of the batch norms, as a training would, and counts; dies at call number `dies_at`."""

    dies_at: int = 0
    calls: list[tuple[int, Path]] = field(default_factory=list)
    shapes: list[dict[str, tuple[int, ...]]] = field(default_factory=list)

    def __call__(self, model: nn.Module, epochs: int, folder: Path) -> nn.Module:
        if len(self.calls) + 1 == self.dies_at:
            raise Killed
        self.calls.append((epochs, folder))
        self.shapes.append(shapes_of(model))
        tuned = plain_copy(model)
        with torch.no_grad():
            for module in tuned.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight += 0.01
                    module.bias += 0.01
        return tuned

    @property
    def epochs(self) -> int:
        return sum(epochs for epochs, _ in self.calls)


def make_bench(root: Path, name: str = "yolov8n", recoverable: bool = True) -> Workbench:
    """A bench on an untrained network of three classes, judged by its weights; images only where asked for."""
    torch.manual_seed(0)
    with quiet_ultralytics():
        model = build(name, width=0.5 if name == "yolov8n" else 1.0)
    model.names = {0: "square", 1: "disc", 2: "bar"}  # type: ignore[assignment]
    save_checkpoint(model, root / "baseline.pt", {"imgsz": IMGSZ})
    data = str(shapes_dataset(root / "data")) if recoverable else None
    settings = RefitSettings(positions=190)
    path = str(root / "baseline.pt")
    return Workbench(path, data, IMGSZ, calibration_images=8, importance="l2", round_to=4, refit_settings=settings)


def run(
    name: str,
    bench: Workbench,
    folder: Path,
    epochs: int = 0,
    tune: CountingTune | None = None,
    recover: str = "none",
    ratios: dict[str, float] | None = None,
) -> Outcome:
    return get_strategy(name).run(bench, ratios or RATIOS, epochs, folder, tune or CountingTune(), recover)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def difference(a: nn.Module, b: nn.Module, size: int = IMGSZ) -> float:
    """Largest difference of the outputs in units of how much the outputs of `a` differ from image to image.

    An untrained network's outputs hardly depend on the image, so relative to their size nothing would look wrong;
    computed in double precision, where rounding does not drown the dependence.
    """
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        expected, got = (raw_outputs(deepcopy(m).double(), images) for m in (a, b))
    worst = 0.0
    for x, y in zip(expected, got, strict=True):
        spread = (x - x.mean(0, keepdim=True)).abs().max()
        worst = max(worst, float((x - y).abs().max() / spread.clamp_min(1e-12)))
    return worst
