"""Every form of a dataset that stock Ultralytics validates on is taken, with the same images, and left as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.data.dataset import check_dataset, dataset_file, dataset_places, image_files
from paretoprune.pruning.data.reading import image_paths, read_dataset
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from tests.pruning.recovery_material import NAMES, shapes_dataset
from tests.pruning.tiny import tiny_model

Form = Callable[[Path], str | Path]
"""Changes the dataset in a folder, which is the working directory, and returns what a person would give as DATA."""


def rewritten(root: Path, *changes: tuple[str, str]) -> Path:
    data = root / "data.yaml"
    text = data.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    data.write_text(text)
    return data


def background(root: Path, folder: str) -> None:
    (root / folder).mkdir(parents=True)
    shutil.copy(root / "images" / "train" / "0.png", root / folder / "nothing.png")


def plain(root: Path) -> Path:
    return root / "data.yaml"


def its_folder(root: Path) -> Path:
    return root


def backgrounds_in_a_list(root: Path) -> Path:
    background(root, "negatives/images")
    return rewritten(root, ("val: images/val", "val: [images/val, negatives/images]"))


def backgrounds_first(root: Path) -> Path:
    background(root, "a/images")
    return rewritten(root, ("val: images/val", "val: [a/images, images/val]"))


def background_subfolders(root: Path) -> Path:
    for number in range(3):
        background(root, f"images/val/a{number}")
    return root / "data.yaml"


def linked_subfolder(root: Path) -> Path:
    for kind in ("images", "labels"):
        (root / "elsewhere").mkdir(exist_ok=True)
        (root / kind / "val").rename(root / "elsewhere" / kind)
        (root / kind / "val").mkdir()
        (root / kind / "val" / "link").symlink_to(root / "elsewhere" / kind)
    return root / "data.yaml"


def linked_images(root: Path) -> Path:
    for image in list((root / "images" / "val").iterdir()):
        image.rename(root / image.name)
        image.symlink_to(root / image.name)
    return root / "data.yaml"


def an_empty_folder_among_several(root: Path) -> Path:
    (root / "images" / "todo").mkdir()
    return rewritten(root, ("val: images/val", "val: [images/todo, images/val]"))


def one_image(root: Path) -> Path:
    (root / "images" / "val" / "1.png").unlink()
    return root / "data.yaml"


def other_names_of_files(root: Path) -> Path:
    val = root / "images" / "val"
    (val / "0.png").rename(val / "a b.PNG")
    (root / "labels" / "val" / "0.txt").rename(root / "labels" / "val" / "a b.txt")
    (val / "notes.md").write_text("no image")
    (val / ".hidden.png").write_bytes(b"")
    return root / "data.yaml"


def a_folder_that_looks_like_a_pattern(root: Path) -> Path:
    for kind in ("images", "labels"):
        (root / kind / "val").rename(root / kind / "val [1]*")
    return rewritten(root, ("val: images/val", "val: 'images/val [1]*'"))


def labels_beside_images(root: Path) -> Path:
    (root / "images" / "val").rename(root / "flat")
    for label in list((root / "labels" / "val").iterdir()):
        label.rename(root / "flat" / label.name)
    return rewritten(root, ("val: images/val", "val: flat"))


def listed(lines: str, name: str = "val.txt", encoding: str = "utf-8") -> Form:
    def form(root: Path) -> Path:
        (root / name).write_text(lines.format(root=root), encoding=encoding, newline="")
        return rewritten(root, ("val: images/val", f"val: {name}"))

    return form


def a_list_and_a_folder(root: Path) -> Path:
    (root / "some.txt").write_text("./images/val/0.png\n")
    return rewritten(root, ("val: images/val", "val: [some.txt, images/train]"))


def path_is_here(root: Path) -> str:
    rewritten(root, (f"path: {root}", "path: ."))
    return "data.yaml"


def no_path(root: Path) -> Path:
    return rewritten(root, (f"path: {root}\n", ""))


def path_from_the_project(root: Path) -> Path:
    """The working directory is the folder above the dataset's, as its path says."""
    (root / "set").mkdir()
    for kind in ("images", "labels"):
        (root / kind).rename(root / "set" / kind)
    (root / "config").mkdir()
    rewritten(root, (f"path: {root}", "path: set")).rename(root / "config" / "data.yaml")
    return root / "config" / "data.yaml"


def beside_the_path(root: Path) -> Path:
    return rewritten(root, ("val: images/val", "val: ../images/val"))


def names_listed(root: Path) -> Path:
    data = rewritten(root)
    data.write_text(data.read_text().split("names:")[0] + f"names: {list(NAMES)}\nnc: 3\n")
    return data


def no_names(root: Path) -> Path:
    data = rewritten(root)
    data.write_text(data.read_text().split("names:")[0] + "nc: 3\n")
    return data


def validation_key(root: Path) -> Path:
    return rewritten(root, ("val: images", "validation: images"))


def same_images_twice(root: Path) -> Path:
    return rewritten(root, ("val: images/val", "val: [images/val, images/val]"))


def no_val_but_test(root: Path) -> Path:
    return rewritten(root, ("val: images", "test: images"))


def pattern(root: Path) -> Path:
    return rewritten(root, ("val: images/val", "val: images/v*"))


def an_image_in_place_of_a_folder(root: Path) -> Path:
    return rewritten(root, ("val: images/val", "val: images/val/0.png"))


def a_list_of_what_is_gone(root: Path) -> Path:
    return listed("./images/val/gone.png\n")(root)  # type: ignore[return-value]


FORMS: list[Form] = [
    plain, its_folder, backgrounds_in_a_list, backgrounds_first, background_subfolders, linked_subfolder, linked_images,
    an_empty_folder_among_several, one_image, other_names_of_files, a_folder_that_looks_like_a_pattern,
    labels_beside_images, a_list_and_a_folder, path_is_here, no_path, path_from_the_project, beside_the_path,
    names_listed, no_names, validation_key, same_images_twice, no_val_but_test, pattern, an_image_in_place_of_a_folder,
    a_list_of_what_is_gone,
]  # fmt: skip
LISTS = {
    "absolute lines": listed("{root}/images/val/1.png\n{root}/images/val/0.png"),
    "relative to the list": listed("./images/val/0.png\n./images/val/1.png\n"),
    "one line": listed("./images/val/1.png"),
    "blank lines and other files": listed("\n\n./images/val/0.png\n\n./data.yaml\n./images/val/1.png\n\n"),
    "Windows' line ends": listed("./images/val/0.png\r\n./images/val/1.png\r\n"),
    "byte-order mark": listed("./images/val/0.png\n./images/val/1.png\n", encoding="utf-8-sig"),
    "another suffix": listed("./images/val/0.png\n", "val.list"),
    "no suffix": listed("./images/val/0.png\n", "val_files"),
    "in a folder of lists": listed("{root}/images/val/0.png\n", "images/val.txt"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "shapes"
    shapes_dataset(root, train=2, val=2, size=64)
    monkeypatch.chdir(root)
    return root


def stock_images(data: str | Path, model: nn.Module) -> list[str] | None:
    """The images that stock validation goes through; None where it refuses the dataset."""
    from ultralytics.models.yolo.detect import DetectionValidator

    from paretoprune.pruning.yolo.saving import plain_copy

    args = {"data": str(data), "imgsz": 64, "device": "cpu", "plots": False, "verbose": False, "batch": 4}
    validator: Any = DetectionValidator(args={**args, "task": "detect", "mode": "val", "rect": True})
    try:
        validator(model=plain_copy(model))
    except Exception:  # noqa: BLE001  whatever it refuses with
        return None
    return list(validator.dataloader.dataset.im_files)


@pytest.mark.parametrize(
    "form",
    [*(pytest.param(form, id=form.__name__) for form in FORMS), *(pytest.param(f, id=n) for n, f in LISTS.items())],
)
def test_what_stock_validates_on_is_taken_with_the_same_images(form: Form, root: Path, model: nn.Module) -> None:
    data = form(root)
    wanted = stock_images(data, model)
    if wanted is None:
        with pytest.raises(PruningError) as refused:
            check_dataset(data, model)
        assert "\n" not in str(refused.value)
        return
    assert check_dataset(data, model) == []
    evaluator = Evaluator(str(data), 64, "cpu", 4)
    evaluator.run(model)
    assert [str(image) for image in evaluator._loader.dataset.im_files] == wanted  # type: ignore[union-attr]
    evaluator.close()
    found = image_paths(read_dataset(dataset_file(data))["val"])
    assert [image for image in found if not image.endswith(".hidden.png")] == wanted
    assert all(Path(place).exists() for place in dataset_places(data))
    assert len(load_calibration(str(data), model, 64, 2).images) == 2


def test_most_forms_are_such_that_stock_takes_them() -> None:
    refused = {no_val_but_test, pattern, an_image_in_place_of_a_folder, a_list_of_what_is_gone}
    assert len(FORMS) + len(LISTS) - len(refused) > 25


@pytest.mark.parametrize("form", [path_is_here, path_from_the_project, no_path, plain])
def test_a_dataset_is_read_from_any_folder_with_the_same_images(
    form: Form, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(form(root)).absolute()
    at_home = read_dataset(data)
    (tmp_path / "away" / "images" / "val").mkdir(parents=True)  # "." means the yaml's folder all the same
    monkeypatch.chdir(tmp_path / "away")
    assert {**read_dataset(data), "yaml_file": ""} == {**at_home, "yaml_file": ""}
    assert [path.name for path in image_files(data, "val", 9)] == ["0.png", "1.png"]


def test_relative_lines_of_a_list_are_found_from_any_folder(
    root: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = listed("shapes/images/val/1.png\n")(root)
    monkeypatch.chdir(tmp_path)
    assert stock_images(data, model) == ["shapes/images/val/1.png"]
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert stock_images(data, model) is None
    assert check_dataset(data, model) == []
    assert image_files(data, "val", 9) == [root / "images" / "val" / "1.png"]


def test_looking_at_a_dataset_draws_no_random_numbers(root: Path) -> None:
    import random

    before = random.getstate()
    read_dataset(root / "data.yaml")
    image_files(root / "data.yaml", "val", 1)
    assert random.getstate() == before


def test_jpegs_that_ultralytics_repairs_are_used_and_left_as_they_are(
    root: Path, model: nn.Module, tmp_path: Path
) -> None:
    images = []
    for split in ("train", "val"):
        picture = root / "images" / split / "0.png"
        images.append(picture.with_suffix(".jpg"))
        Image.open(picture).save(images[-1], quality=90)
        picture.unlink()
        images[-1].write_bytes(images[-1].read_bytes() + b"\0\0")
    cut = root / "images" / "train" / "cut.jpg"
    cut.write_bytes(images[0].read_bytes()[:900])  # half of one: for Ultralytics it is corrupt
    held = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (*images, cut)}
    data = str(root / "data.yaml")
    check_dataset(data, model)
    assert len(load_calibration(data, model, 64, 9).images) == 2
    result = finetune(model, data, FinetuneSettings(epochs=1, imgsz=64, batch=2), tmp_path / "run")
    assert result.epochs == 1
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in held} == held
    assert sorted(path.name for path in images[0].parent.iterdir()) == ["0.jpg", "1.png", "cut.jpg"]
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"{images[0]}: does not end as a JPEG should; read as it is" in log
    assert f"{cut}: ignoring corrupt" in log
    assert "restored" not in log
    assert stock_images(data, model) == [str(images[1]), str(root / "images" / "val" / "1.png")]
    (root / "labels" / "val.cache").unlink()  # where nothing was read before, stock rewrites it
    stock_images(data, model)
    assert images[1].read_bytes() != held[images[1]][0]
