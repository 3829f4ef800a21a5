from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from paretoprune.pruning.builtin import dataset
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.builtin.scenes import (
    PHOTOS,
    Rect,
    Scene,
    digit_pool,
    draw_scene,
    load_digit_samples,
    photo_region,
)

TRAIN, VAL, SIDE = 24, 12, 160


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small dataset; tests that change it work on a copy."""
    return build_dataset(tmp_path_factory.mktemp("builtin") / "digits", train=TRAIN, val=VAL).parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def labels_of(folder: Path, split: str) -> dict[str, np.ndarray]:
    """File stem -> (n, 5) rows of class, centre x, centre y, width, height."""
    return {p.stem: np.loadtxt(p, ndmin=2) for p in sorted((folder / "labels" / split).glob("*.txt"))}


def test_two_builds_are_byte_identical(built: Path, tmp_path: Path) -> None:
    again = build_dataset(tmp_path / "elsewhere" / "again", train=TRAIN, val=VAL).parent
    assert contents(again) == contents(built)


def test_another_seed_gives_other_images(built: Path, tmp_path: Path) -> None:
    other = build_dataset(tmp_path / "other", seed=1, train=2, val=1).parent
    assert (other / "images/train/00000.jpg").read_bytes() != (built / "images/train/00000.jpg").read_bytes()


def test_fewer_training_images_are_a_prefix_and_validation_stays(built: Path, tmp_path: Path) -> None:
    small = contents(build_dataset(tmp_path / "small", train=5, val=VAL).parent)
    large = contents(built)
    scenes = {name: data for name, data in small.items() if name.startswith(("images/", "labels/"))}
    assert len(scenes) == 2 * (5 + VAL)
    assert {name: large[name] for name in scenes} == scenes


def test_a_complete_dataset_is_found_not_rebuilt(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Scene:
        raise AssertionError("a complete dataset was drawn again")

    (built / "labels" / "train.cache").write_bytes(b"written by Ultralytics")
    monkeypatch.setattr(dataset, "draw_scene", refuse)
    assert build_dataset(built, train=TRAIN, val=VAL) == built / "data.yaml"
    (built / "labels" / "train.cache").unlink()


@pytest.mark.parametrize("damage", ["images/train/00003.jpg", "labels/val/00001.txt", "data.yaml", dataset.MANIFEST])
def test_a_damaged_dataset_is_rebuilt(built: Path, tmp_path: Path, damage: str) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    (copy / damage).write_bytes((copy / damage).read_bytes()[:-7])
    build_dataset(copy, train=TRAIN, val=VAL)
    assert contents(copy) == contents(built)


def test_a_missing_image_is_replaced(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    (copy / "images/val/00000.jpg").unlink()
    build_dataset(copy, train=TRAIN, val=VAL)
    assert contents(copy) == contents(built)


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seed: int, split: str, index: int, imgsz: int) -> Scene:
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(seed, split, index, imgsz)

    monkeypatch.setattr(dataset, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(tmp_path / "digits", train=4, val=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rebuild_keeps_the_old_dataset(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Scene:
        raise OSError("No space left on device")

    copy = shutil.copytree(built, tmp_path / "copy")
    monkeypatch.setattr(dataset, "draw_scene", fail)
    with pytest.raises(OSError, match="No space left"):
        build_dataset(copy, train=TRAIN + 1, val=VAL)
    assert contents(copy) == contents(built)


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"needs a new or empty folder, but got .* that holds other files"):
        build_dataset(tmp_path, train=1, val=1)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", 0), ("imgsz", 32), ("seed", -1)])
def test_numbers_out_of_range_are_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` of the built-in dataset must be at least \d+, but got {value}\."):
        build_dataset(tmp_path / "digits", **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="must be one of train, val, but got 'test'"):
        draw_scene(0, "test", 0, SIDE)


def test_ultralytics_finds_the_images_wherever_the_folder_is_moved(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.data.utils import check_det_dataset

    moved = shutil.copytree(built, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.data.utils.DATASETS_DIR", tmp_path / "somewhere else")
    found = check_det_dataset(str(moved / "data.yaml"), autodownload=False)
    assert Path(found["train"]) == moved / "images" / "train"
    assert Path(found["val"]) == moved / "images" / "val"
    assert found["names"] == {digit: str(digit) for digit in range(10)}
    assert str(tmp_path) not in (moved / "data.yaml").read_text()


def test_every_image_has_its_size_and_its_labels_in_range(built: Path) -> None:
    for split, count in (("train", TRAIN), ("val", VAL)):
        labels = labels_of(built, split)
        images = sorted((built / "images" / split).glob("*.jpg"))
        assert [image.stem for image in images] == list(labels) == [f"{index:05d}" for index in range(count)]
        assert all(cv2.imread(str(image)).shape == (SIDE, SIDE, 3) for image in images)
        rows = np.concatenate(list(labels.values()))
        assert set(rows[:, 0]) <= set(range(10))
        assert len(set(rows[:, 0])) >= 8
        centre, size = rows[:, 1:3], rows[:, 3:5]
        assert (centre - size / 2 >= -1e-6).all()
        assert (centre + size / 2 <= 1 + 1e-6).all()
        assert (size * SIDE >= 8).all()
        assert (size * SIDE <= 90).all()


def test_labels_are_the_classes_of_the_samples_they_name(built: Path) -> None:
    sources = json.loads((built / "sources.json").read_text())
    targets = load_digit_samples()[1]
    assert len(sources) == TRAIN + VAL
    for split in ("train", "val"):
        for stem, rows in labels_of(built, split).items():
            assert rows[:, 0].astype(int).tolist() == targets[sources[f"{split}/{stem}"]["digits"]].tolist()


def test_no_digit_of_validation_is_seen_in_training(built: Path) -> None:
    used: dict[str, set[int]] = defaultdict(set)
    for name, source in json.loads((built / "sources.json").read_text()).items():
        used[name.split("/")[0]].update(source["digits"])
    assert len(used["train"]) > 50
    assert len(used["val"]) > 25
    assert not used["train"] & used["val"]
    pools = {split: set(digit_pool(split).tolist()) for split in ("train", "val")}
    assert used["train"] <= pools["train"]
    assert used["val"] <= pools["val"]
    assert pools["train"] | pools["val"] == set(range(1797))
    pixels = load_digit_samples()[0]
    drawings = {split: {pixels[sample].tobytes() for sample in pool} for split, pool in pools.items()}
    assert not drawings["train"] & drawings["val"], "the same drawing under two sample numbers"


def test_no_pixel_of_a_photograph_is_in_both_splits(built: Path) -> None:
    crops: dict[tuple[str, str], list[Rect]] = defaultdict(list)
    for name, source in json.loads((built / "sources.json").read_text()).items():
        crops[source["photo"], name.split("/")[0]].append(Rect(*source["crop"]))
    assert {photo for photo, _ in crops} == set(PHOTOS)
    for photo in PHOTOS:
        seen, unseen = photo_region(photo, "train"), photo_region(photo, "val")
        assert seen.intersection(unseen) == 0
        for split, region in (("train", seen), ("val", unseen)):
            assert all(crop.intersection(region) == crop.area > 0 for crop in crops[photo, split])


def test_the_background_is_the_crop_that_the_scene_names() -> None:
    """Oracle: undo the light by correlation; mirrored or not, the named crop is the one in the picture."""
    for index in range(12):
        scene = draw_scene(0, "val", index, SIDE)
        photo = cv2.imread(str(_photo_path(scene.photo)))
        crop = photo[scene.crop.top : scene.crop.bottom, scene.crop.left : scene.crop.right]
        small = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(float)
        matches = [np.corrcoef(small[:, ::step].ravel(), scene.background.ravel())[0, 1] for step in (1, -1)]
        assert max(matches) > 0.95


def _photo_path(name: str) -> Path:
    import sklearn.datasets
    from ultralytics.utils import ASSETS

    shipped = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
    return shipped if shipped.is_file() else Path(ASSETS) / f"{name}.jpg"


def corners(box: Rect) -> tuple[int, int, int, int]:
    return box.left, box.top, box.right, box.bottom


def _ink_seen(scene: Scene, ink: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Opacity recomputed from the finished picture (least squares over colours), and where ink is visible at all."""
    ground = scene.background.astype(float)
    towards = np.asarray(ink) - ground
    strength = (towards**2).sum(axis=2)
    return ((scene.image - ground) * towards).sum(axis=2) / np.maximum(strength, 1.0), strength >= 30.0**2


def test_boxes_enclose_the_ink_tightly() -> None:
    """Oracle: the ink found in the finished picture, not the mask that it was drawn with."""
    errors: list[int] = []
    for index in range(60):
        scene = draw_scene(0, "train", index, SIDE)
        for digit in scene.digits:
            box = np.array(corners(digit.box))
            window = Rect(*np.clip(box + np.array([-6, -6, 6, 6]), 0, SIDE).tolist())
            alone = all(other is digit or window.intersection(other.box) == 0 for other in scene.digits)
            opacity, visible = _ink_seen(scene, digit.ink)
            area = np.s_[window.top : window.bottom, window.left : window.right]
            if not alone or not visible[area].all():
                continue
            rows, columns = np.nonzero(opacity[area] >= 0.4)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            offset = np.array([window.left, window.top, window.left, window.top])
            errors.append(int(np.abs(np.array(found) + offset - box).max()))
    assert len(errors) >= 40
    assert max(errors) <= 1, "pixels"
    assert np.mean(np.array(errors) == 0) >= 0.95


def test_label_files_hold_the_boxes_of_their_scenes(built: Path) -> None:
    for split in ("train", "val"):
        for stem, rows in labels_of(built, split).items():
            boxes = np.array([corners(digit.box) for digit in draw_scene(0, split, int(stem), SIDE).digits])
            centre, half = rows[:, 1:3] * SIDE, rows[:, 3:5] * SIDE / 2
            np.testing.assert_allclose(np.hstack([centre - half, centre + half]), boxes, atol=1e-3)


def test_digits_scarcely_overlap() -> None:
    for index in range(40):
        boxes = [digit.box for digit in draw_scene(0, "val", index, SIDE).digits]
        for i, box in enumerate(boxes):
            assert all(box.intersection(other) <= 0.05 * min(box.area, other.area) for other in boxes[:i])


def test_ink_stands_out_from_what_is_under_it() -> None:
    luma = np.array([0.114, 0.587, 0.299])
    for index in range(20):
        scene = draw_scene(0, "train", index, SIDE)
        first = scene.digits[0]
        patch = scene.background[first.box.top : first.box.bottom, first.box.left : first.box.right]
        assert abs(float(np.asarray(first.ink) @ luma) - float(patch.mean(axis=(0, 1)) @ luma)) >= 70


def test_other_image_sizes_scale_the_digits() -> None:
    small, large = (draw_scene(0, "val", 3, side) for side in (160, 320))
    heights = [max(digit.box.bottom - digit.box.top for digit in scene.digits) for scene in (small, large)]
    assert large.image.shape == (320, 320, 3)
    assert heights[1] > 1.3 * heights[0]
