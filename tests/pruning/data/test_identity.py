"""A dataset is the same wherever it lies, and every change that could change a figure is seen and named."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paretoprune.pruning.data.identity import differences, identify, rows_from_bytes, rows_to_bytes
from tests.pruning.recovery_material import shapes_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "shapes"
    shapes_dataset(root, train=3, val=4, size=64)
    return root


def changes(root: Path, change: Callable[[Path], object]) -> list[str]:
    """What is said to differ after `change`."""
    before, rows, _ = identify(root / "data.yaml", "detect")
    change(root)
    now, new_rows, _ = identify(root / "data.yaml", "detect")
    found = differences(before, now, rows, new_rows)
    assert bool(found) == (before != now)
    assert bool(found) == bool(differences(before, now, {}, {}))  # seen without the rows, too
    return found


def yaml_with(old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        data = root / "data.yaml"
        assert old in data.read_text()
        data.write_text(data.read_text().replace(old, new))

    return change


def rewrite_labels(root: Path) -> None:
    for name in ("1.txt", "3.txt"):
        (root / "labels" / "val" / name).write_text("0 0.5 0.5 0.1 0.1")


def delete_a_label(root: Path) -> None:
    (root / "labels" / "train" / "2.txt").unlink()


def crop_an_image(root: Path) -> None:
    Image.new("RGB", (64, 64)).save(root / "images" / "val" / "2.png")


def add_images(root: Path) -> None:
    for name in ("8.png", "9.png"):
        shutil.copy(root / "images" / "val" / "0.png", root / "images" / "val" / name)


def delete_an_image(root: Path) -> None:
    (root / "images" / "train" / "1.png").unlink()


def shorten_a_list(root: Path) -> None:
    (root / "some.txt").write_text("".join(f"./images/val/{name}.png\n" for name in (0, 1)))
    yaml_with("val: images/val", "val: some.txt")(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewrite_labels, ["2 labels of val changed, first: 1.png"]),
        (delete_a_label, ["1 labels of train changed, first: 2.png"]),
        (crop_an_image, ["1 images of val changed, first: 2.png"]),
        (add_images, ["2 images of val are new, first: 8.png"]),
        (delete_an_image, ["1 images of train are gone, first: 1.png"]),
        (shorten_a_list, ["2 images of val are gone, first: 2.png"]),
        (yaml_with("1: disc", "1: circle"), ["classes differ ([square, disc, bar] then, [square, circle, bar] now)"]),
        (yaml_with("names:", "kpt_shape: [2, 3]\nnames:"), ["kpt_shape differs (None then, [2, 3] now)"]),
        (
            yaml_with("val: images/val", "val: [images/val, images/val]"),
            ["images of val are listed another number of times"],
        ),
    ],
)
def test_a_change_is_seen_and_named(change: Callable[[Path], object], said: list[str], root: Path) -> None:
    assert changes(root, change) == said


def test_a_split_of_other_images_is_seen(root: Path) -> None:
    found = changes(root, yaml_with("val: images/val", "val: images/train"))
    assert found == ["3 labels of val changed, first: 0.png", "3 images of val changed, first: 0.png",
                     "1 images of val are gone, first: 3.png"]  # fmt: skip


def touch_all(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, (1, 1))


def empty_label_of_a_background(root: Path) -> None:
    """Added to an image that has none: both say that nothing is there."""
    (root / "labels" / "val" / "0.txt").write_text("\n")


def move(root: Path) -> None:
    away = root.parent / "elsewhere" / "deep"
    away.mkdir(parents=True)
    root.rename(away / "renamed")
    (away / "renamed" / "images" / "val").rename(away / "renamed" / "images" / "held out")
    (away / "renamed" / "labels" / "val").rename(away / "renamed" / "labels" / "held out")
    text = (away / "renamed" / "data.yaml").read_text()
    text = text.replace(f"path: {root}\n", "").replace("images/val", f"{away}/renamed/images/held out")
    root.mkdir()
    (root / "data.yaml").write_text(text.replace("train: images", f"train: {away}/renamed/images"))


def as_a_list(root: Path) -> None:
    lines = [f"{root}/images/val/{number}.png" for number in (3, 1, 0, 2)]
    (root / "lists").mkdir()
    (root / "lists" / "val.txt").write_text("\n".join(lines))
    yaml_with("val: images/val", "val: lists/val.txt")(root)


def names_as_a_list(root: Path) -> None:
    data = root / "data.yaml"
    data.write_text(data.read_text().split("names:")[0] + "nc: 3\nnames: [square, disc, bar]\n")


def add_a_test_split(root: Path) -> None:
    """Nothing of a run was judged by it until then."""
    yaml_with("val: images/val", "val: images/val\ntest: images/train")(root)


@pytest.mark.parametrize("change", [touch_all, empty_label_of_a_background, move, as_a_list, names_as_a_list])
def test_what_changes_nothing_is_no_difference(change: Callable[[Path], object], root: Path) -> None:
    (root / "labels" / "val" / "0.txt").unlink()
    assert changes(root, change) == []


def test_a_test_split_counts_once_it_is_there(root: Path) -> None:
    before, rows, _ = identify(root / "data.yaml", "detect")
    add_a_test_split(root)
    assert differences(before, identify(root / "data.yaml", "detect")[0], rows, {}) == []
    assert changes(root, yaml_with("test: images/train", "")) == ["there are no images of test (3 then)"]


def test_the_rows_are_kept_whole_and_the_same_each_time(root: Path) -> None:
    rows = identify(root / "data.yaml", "detect")[1]
    assert rows_from_bytes(rows_to_bytes(rows)) == rows
    assert rows_to_bytes(identify(root / "data.yaml", "detect")[1]) == rows_to_bytes(rows)
    for damaged in (b"", b"no gzip", rows_to_bytes(rows)[:-20]):
        assert rows_from_bytes(damaged) == {}


def test_a_classifiers_folders(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ball", "cube"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            picture = Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8))
            picture.save(tmp_path / "set" / split / name / "0.png")
    before, rows, classes = identify(tmp_path / "set", "classify")
    assert classes == {"train": [("ball",), ("cube",)], "val": [("ball",), ("cube",)]}
    assert before.classes == ["ball", "cube"]
    (tmp_path / "set").rename(tmp_path / "moved")
    assert identify(tmp_path / "moved", "classify") == (before, rows, classes)
    (tmp_path / "moved" / "val" / "ball" / "0.png").rename(tmp_path / "moved" / "val" / "cube" / "1.png")
    now, new_rows, _ = identify(tmp_path / "moved", "classify")
    assert differences(before, now, rows, new_rows) == [
        "1 images of val are gone, first: ball/0.png",
        "1 images of val are new, first: cube/1.png",
    ]


def test_many_images_take_a_moment(tmp_path: Path) -> None:
    """0.05 s of CPU on one core (100,000: 2.5 s); the bound leaves room for a busy machine."""
    import time

    for split, count in (("train", 1_900), ("val", 100)):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "images" / split / f"{number}.jpg").write_bytes(b"x")
            (tmp_path / "labels" / split / f"{number}.txt").write_text(f"0 0.5 0.5 {random.random():.4f} 0.1")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a]\n")
    begin = time.process_time()
    found, _, classes = identify(tmp_path / "data.yaml", "detect")
    assert found.splits["train"].images == len(classes["train"]) == 1_900
    assert set(classes["train"]) == {("0",)}
    assert time.process_time() - begin < 1
