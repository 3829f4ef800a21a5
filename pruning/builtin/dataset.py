"""Builds the built-in detection dataset: ten classes (the digits), YOLO format, in seconds and without a download."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import cv2

from paretoprune.pruning.builtin.scenes import SPLITS, Scene, draw_scene

DATASET_VERSION: Final = 1
"""Rises whenever the same arguments give other images or labels."""
MANIFEST: Final = "builtin-dataset.json"
"""Marks a folder as built here, hence as one that may be replaced; the name is not one that others use."""
SOURCES: Final = "sources.json"
JPEG_QUALITY: Final = 95
MIN_IMGSZ: Final = 96
"""Below this side (pixels) the digits shrink to a few pixels and the largest scarcely find a place."""


def build_dataset(root: Path, seed: int = 0, train: int = 600, val: int = 200, imgsz: int = 160) -> Path:
    """Builds the dataset in the folder root, or finds it there complete, and returns the path of its data.yaml.

    The same arguments give the same bytes (for one version of OpenCV), the `train` images are the first of any larger
    number, and the validation split does not depend on `train`. The folder can be moved: data.yaml holds relative
    paths only. It appears under its name when it is complete, so an interrupted build leaves nothing that looks like
    a dataset.

    Args:
        root: folder to build; replaced if it holds a damaged or differently built dataset of this kind.
        seed: of everything random, >= 0.
        train: training images, at least 1.
        val: validation images, at least 1.
        imgsz: side of the square images in pixels.

    Raises:
        ValueError: a number is out of its range.
        FileExistsError: root holds something that this function did not build.
    """
    for name, value, least in (("seed", seed, 0), ("train", train, 1), ("val", val, 1), ("imgsz", imgsz, MIN_IMGSZ)):
        if value < least:
            raise ValueError(f"`{name}` of the built-in dataset must be at least {least}, but got {value}.")
    root = root.resolve()
    settings = {"version": DATASET_VERSION, "seed": seed, "train": train, "val": val, "imgsz": imgsz}
    if _is_complete(root, settings):
        return root / "data.yaml"
    _refuse_foreign(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        built = workspace / "new"
        _write_dataset(built, settings)
        _put_in_place(built, root, workspace / "old", settings)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return root / "data.yaml"


def _write_dataset(folder: Path, settings: dict[str, int]) -> None:
    """Writes images, labels, data.yaml and where everything came from; the manifest last."""
    sources: dict[str, Any] = {}
    for split in SPLITS:
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(settings[split]):
            scene = draw_scene(settings["seed"], split, index, settings["imgsz"])
            _write_scene(folder, split, f"{index:05d}", scene)
            crop = [scene.crop.left, scene.crop.top, scene.crop.right, scene.crop.bottom]
            digits = [digit.sample for digit in scene.digits]
            sources[f"{split}/{index:05d}"] = {"photo": scene.photo, "crop": crop, "digits": digits}
    (folder / SOURCES).write_text(json.dumps(sources) + "\n", encoding="utf-8")
    names = "".join(f'  {digit}: "{digit}"\n' for digit in range(10))
    # No `path:` key: Ultralytics then takes the folder of data.yaml, wherever that is, whatever its datasets_dir says.
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}", encoding="utf-8")
    manifest = {**settings, "sha256": _content_hash(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_scene(folder: Path, split: str, name: str, scene: Scene) -> None:
    """The image as JPEG, and its boxes as `class centre-x centre-y width height`, each a share of the side."""
    encoded, data = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded, "OpenCV always encodes a uint8 image as JPEG"
    (folder / "images" / split / f"{name}.jpg").write_bytes(data.tobytes())
    side = scene.image.shape[0]
    lines = []
    for digit in scene.digits:
        box = digit.box
        numbers = (box.left + box.right) / 2, (box.top + box.bottom) / 2, box.right - box.left, box.bottom - box.top
        lines.append(f"{digit.label} " + " ".join(f"{number / side:.6f}" for number in numbers))
    (folder / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _content_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of everything built; files that Ultralytics adds (label caches) do not count."""
    files = [folder / "data.yaml", folder / SOURCES]
    for split in SPLITS:
        files += sorted((folder / "images" / split).glob("*.jpg")) + sorted((folder / "labels" / split).glob("*.txt"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _is_complete(root: Path, settings: dict[str, int]) -> bool:
    """Whether root holds exactly the dataset of these settings, undamaged."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == {**settings, "sha256": _content_hash(root)})
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _refuse_foreign(root: Path) -> None:
    """Never delete what somebody else put there: only an empty folder or an earlier build may be replaced."""
    if root.is_dir():
        foreign = any(root.iterdir()) and not (root / MANIFEST).is_file()
    else:
        foreign = root.exists()
    if foreign:
        raise FileExistsError(
            f"The built-in dataset needs a new or empty folder, but got {root} that holds other files; choose another."
        )


def _put_in_place(built: Path, root: Path, aside: Path, settings: dict[str, int]) -> None:
    """Renames built to root, with whatever was there put aside. Another process that was faster is accepted."""
    if _is_complete(root, settings):
        return
    if root.exists():
        os.rename(root, aside)
    try:
        os.rename(built, root)
    except OSError:
        if not _is_complete(root, settings):
            raise
