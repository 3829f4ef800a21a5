"""A sample of a dataset: by class, the same one everywhere, and read by Ultralytics as any dataset."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paretoprune.pruning.data.calibration import load_calibration
from paretoprune.pruning.data.dataset import check_dataset
from paretoprune.pruning.data.identity import identify
from paretoprune.pruning.data.sampling import (
    LEAST_OF_A_CLASS,
    draw_sample,
    sampled_dataset,
    stratified_sample,
)
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.yolo.progress import progress_told
from paretoprune.pruning.yolo.saving import save_checkpoint
from tests.pruning.recovery_material import NAMES, shapes_dataset, write_yaml
from tests.pruning.tiny import tiny_model


def long_tailed(images: int = 4000) -> list[set[str]]:
    """Images of up to three classes: one in nearly all, one in a tenth, one in 20 images; and 400 backgrounds."""
    generator = np.random.default_rng(1)
    found = [{"common"} | ({"some"} if generator.random() < 0.1 else set()) for _ in range(images - 420)]
    found += [{"rare", "common"}] * 20 + [set[str]()] * 400
    return [found[int(i)] for i in generator.permutation(images)]


@pytest.mark.parametrize("count", [40, 200, 1000])
def test_every_class_keeps_its_share_and_a_rare_one_more(count: int) -> None:
    classes = long_tailed()
    chosen = stratified_sample(classes, count, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    whole, seen = Counter(c for its in classes for c in its), Counter(c for i in chosen for c in classes[i])
    share = count / len(classes)
    for name in ("common", "some"):
        assert seen[name] == pytest.approx(share * whole[name], rel=0.15, abs=2)
    backgrounds = sum(not classes[i] for i in chosen)
    assert backgrounds == pytest.approx(share * 400, rel=0.15, abs=2)
    assert seen["rare"] >= min(LEAST_OF_A_CLASS, count // 8) > 2 * share * 20 * (count < 1000)


def test_the_seed_alone_decides() -> None:
    classes = long_tailed()
    first = stratified_sample(classes, 200, seed=3)
    assert first == stratified_sample([tuple(sorted(its)) for its in classes], 200, seed=3)
    assert first != stratified_sample(classes, 200, seed=4)
    assert stratified_sample(classes, 4000, 0) == stratified_sample(classes, 5000, 1) == list(range(4000))
    assert len(stratified_sample([{i} for i in range(50)], 8, 0)) == 8  # more classes than room


def test_a_sample_is_judged_as_a_dataset_of_its_images_alone_would_be(tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "shapes", train=9, val=12)
    _, rows, classes = identify(data, "detect")
    sample = draw_sample(rows, classes, {"val": 7}, seed=0)
    assert set(sample) == {"val"}
    alone = tmp_path / "alone"
    for kind, suffix in (("images", ".png"), ("labels", ".txt")):
        (alone / kind / "val").mkdir(parents=True)
        shutil.copytree(tmp_path / "shapes" / kind / "train", alone / kind / "train")
        for name in sample["val"]:
            shutil.copy(tmp_path / "shapes" / kind / "val" / f"{Path(name).stem}{suffix}", alone / kind / "val")
    model = tiny_model()
    found = []
    for place in (
        str(data),
        sampled_dataset(str(data), "detect", sample, tmp_path / "run"),
        str(write_yaml(alone, NAMES)),
    ):
        assert check_dataset(place, model) == []
        evaluator = Evaluator(place, 64, "cpu")
        found.append((evaluator.run(model), evaluator.images))
        evaluator.close()
    assert found[1] == found[2]
    assert [images for _, images in found] == [12, 7, 7]
    kept = {path.name for path in (tmp_path / "shapes" / "labels").iterdir()}
    assert kept == {"train", "val", "val.paretoprune.npz"}  # of all images; what the sample needs lies beside it


@pytest.mark.parametrize("place", ["shapes", os.fsdecode(b"sh\xff")])
def test_every_worker_takes_the_same_images_wherever_they_lie(place: str, tmp_path: Path) -> None:
    data = shapes_dataset(tmp_path / "first", train=9, val=12)
    (tmp_path / "first" / "images" / "val" / "3.png").rename(
        tmp_path / "first" / "images" / "val" / os.fsdecode(b"\xfe.png")
    )
    (tmp_path / "first" / "labels" / "val" / "3.txt").rename(
        tmp_path / "first" / "labels" / "val" / os.fsdecode(b"\xfe.txt")
    )
    _, rows, classes = identify(data, "detect")
    sample = draw_sample(rows, classes, {"train": 5, "val": 11}, seed=0)
    data.write_text("train: images/train\nval: images/val\nnames: [square, disc, bar]\n")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    _, rows, classes = identify(tmp_path / "moved" / "data.yaml", "detect")
    assert draw_sample(rows, classes, {"train": 5, "val": 11}, seed=0) == sample
    seen = []
    for home, run in (("first", "a"), ("first", "a"), ("first", "b"), ("moved", "a")):
        found = sampled_dataset(str(tmp_path / home / "data.yaml"), "detect", sample, tmp_path / run)
        evaluator = Evaluator(found, 64, "cpu")
        evaluator.run(tiny_model())
        seen.append([Path(name).relative_to(tmp_path / home) for name in evaluator._loader.dataset.im_files])  # type: ignore[union-attr]
        evaluator.close()
    assert len(seen[0]) == 11
    assert seen == [seen[0]] * 4
    (tmp_path / "moved" / "images" / "val" / sample["val"][0]).unlink()
    with pytest.raises(PruningError, match=r"must hold the run's sample of images, but .* has no"):
        sampled_dataset(str(tmp_path / "moved" / "data.yaml"), "detect", sample, tmp_path / "c")


def test_a_classifiers_sample_is_folders_of_links(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ball", "cube", "disc"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(count if name != "disc" else 2):
                picture = Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                picture.save(tmp_path / "set" / split / name / f"{number}.png")
    _, rows, classes = identify(tmp_path / "set", "classify")
    sample = draw_sample(rows, classes, {"train": 9, "val": 0}, seed=0)
    assert set(sample) == {"train"}
    found = Path(sampled_dataset(str(tmp_path / "set"), "classify", sample, tmp_path / "run"))
    assert {path.name: len(list(path.iterdir())) for path in (found / "train").iterdir()} == {
        "ball": 4, "cube": 4, "disc": 1,
    }  # fmt: skip
    links = {path.resolve() for path in (found / "train").rglob("*.png")}
    assert links == {(tmp_path / "set" / "train" / name).resolve() for name in sample["train"]}
    assert (found / "val").resolve() == tmp_path / "set" / "val"


def test_calibration_reads_no_more_images_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.data import dataset as data_sets

    data = str(shapes_dataset(tmp_path / "shapes", train=30, val=2))
    model, stock = tiny_model(), data_sets.verify_image_label
    read: list[str] = []

    def verify(given: Any) -> Any:
        read.append(given[0])
        return stock(given)

    monkeypatch.setattr(data_sets, "verify_image_label", verify)
    few = load_calibration(data, model, 64, 6, seed=1)
    assert len(read) == len(set(read)) == len(few.images) == 6
    every = load_calibration(data, model, 64, 30, seed=1).images
    wanted = sorted(np.random.default_rng(1).permutation(30)[:6])  # as if drawn from the dataset that was read whole
    assert torch.equal(few.images, every[wanted])

    order = sorted(path.name for path in (tmp_path / "shapes" / "images" / "train").iterdir())
    (tmp_path / "shapes" / "images" / "train" / order[wanted[2]]).write_bytes(b"no image")
    read.clear()
    assert len(load_calibration(data, model, 64, 6, seed=1).images) == 6
    assert len(set(read)) == 12


def test_images_of_all_sizes_are_drawn_from_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paretoprune.pruning import workbench

    data, stock = str(shapes_dataset(tmp_path / "shapes", train=12, val=2)), workbench.training_files
    save_checkpoint(tiny_model(), tmp_path / "tiny.pt")
    listed: list[Path] = []
    monkeypatch.setattr(workbench, "training_files", lambda place, task: listed.append(place) or stock(place, task))
    bench = workbench.Workbench(str(tmp_path / "tiny.pt"), data, 96, calibration_images=5)
    for imgsz in (64, 96, 32, 64):
        alone = load_calibration(data, bench.model, imgsz, 5).images
        assert torch.equal(bench.at(imgsz).calibration.images, alone)
    assert len(listed) == 1


def test_reading_labels_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretoprune.pruning.yolo.progress.EVERY_S", 0.0)
    data, said = str(shapes_dataset(tmp_path / "shapes", train=3, val=3)), list[str]()
    with progress_told(said.append):
        evaluator = Evaluator(data, 64, "cpu", batch=1)
        evaluator.run(tiny_model())
        evaluator.close()
    assert said[0] == "reading labels, 0 of 3 images"
    assert said[-1] == "validating, 2 of 3 batches"
