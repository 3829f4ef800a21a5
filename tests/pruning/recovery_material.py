"""Small networks and datasets for the tests of recovery: made here in a second, or cut out of the real assets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics
from tests.pruning.masking import randomise_batch_norm

NAMES = ("square", "disc", "bar")


def shapes_dataset(root: Path, train: int = 8, val: int = 4, size: int = 96, polygons: bool = False) -> Path:
    """A data.yaml of three kinds of bright shapes on noise, `train` and `val` images of `size` pixels."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            image, lines = _scene(generator, size, polygons)
            image.save(root / "images" / split / f"{index}.png")
            (root / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
    return write_yaml(root, NAMES)


def write_yaml(root: Path, names: tuple[str, ...]) -> Path:
    path = root / "data.yaml"
    listed = "\n".join(f"  {i}: {name}" for i, name in enumerate(names))
    path.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames:\n{listed}\n")
    return path


def _scene(generator: np.random.Generator, size: int, polygons: bool) -> tuple[Image.Image, list[str]]:
    image = Image.fromarray(generator.integers(0, 90, (size, size, 3), dtype=np.uint8))
    lines = []
    for kind in generator.permutation(3)[:2]:
        width, height = (28, 28) if kind < 2 else (40, 12)
        x, y = (int(generator.integers(0, size - side)) for side in (width, height))
        draw = ImageDraw.Draw(image)
        (draw.ellipse if kind == 1 else draw.rectangle)([x, y, x + width, y + height], fill=(255, 80 * int(kind), 30))
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        box = [(x + width / 2), (y + height / 2), width, height]
        values = [v for corner in corners for v in corner] if polygons else box
        lines.append(f"{kind} " + " ".join(f"{v / size:.5f}" for v in values))
    return image, lines


def blood_cells(assets: Path, root: Path, train: int, val: int) -> Path:
    """A data.yaml of the first images of the real blood cell dataset: images linked, labels copied."""
    for split, count in (("train", train), ("val", val)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for image in sorted((assets / "bccd" / "images" / split).iterdir())[:count]:
            (root / "images" / split / image.name).symlink_to(image.resolve())
            label = assets / "bccd" / "labels" / split / f"{image.stem}.txt"
            shutil.copyfile(label, root / "labels" / split / label.name)
    return write_yaml(root, ("RBC", "WBC", "Platelets"))


def fresh_yolov8n(seed: int = 0) -> nn.Module:
    """An untrained yolov8n for three classes."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(seed)
    with quiet_ultralytics():
        return DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()


def teaching_yolov8n() -> nn.Module:
    """One whose answers differ from image to image: a fresh one's hardly do."""
    model = fresh_yolov8n(1)
    randomise_batch_norm(model)
    return model


def stock_model(path: Path) -> nn.Module:
    """The network of a checkpoint, as stock Ultralytics loads it."""
    from ultralytics.nn.tasks import load_checkpoint

    with quiet_ultralytics():
        model: nn.Module = load_checkpoint(str(path))[0]
    return model


def halve_bottlenecks(model: nn.Module, blocks: tuple[int, ...] = (2, 4)) -> nn.Module:
    """Remove the second half of the hidden channels of each block's first bottleneck, in place, by slicing."""
    for block in blocks:
        bottleneck = model.model[block].m[0]  # type: ignore[index, union-attr]
        first, second = bottleneck.cv1, bottleneck.cv2.conv
        keep = first.conv.out_channels // 2
        first.conv.weight = nn.Parameter(first.conv.weight.detach()[:keep].clone())
        first.conv.out_channels = first.bn.num_features = keep
        for name in ("weight", "bias"):
            setattr(first.bn, name, nn.Parameter(getattr(first.bn, name).detach()[:keep].clone()))
        for name in ("running_mean", "running_var"):
            setattr(first.bn, name, getattr(first.bn, name)[:keep].clone())
        second.weight = nn.Parameter(second.weight.detach()[:, :keep].clone())
        second.in_channels = keep
    return model


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight shape of every convolution."""
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything the network computes with."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class CountingGate:
    """A gate that lets everybody pass and counts."""

    def __init__(self) -> None:
        self.entered = 0
        self.inside = 0

    @contextmanager
    def using(self) -> Iterator[None]:
        self.entered += 1
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}
