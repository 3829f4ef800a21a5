"""Images that cannot be read: passed over and said, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.data.ignored_images import ignored_images
from paretoprune.pruning.evaluation.evaluator import Evaluator
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.yolo.loading import load_model

QUICK = FinetuneSettings(epochs=1, imgsz=64, batch=4)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return build_dataset(tmp_path / "digits", train=8, val=4)


def images(data: Path, split: str) -> list[Path]:
    return sorted((data.parent / "images" / split).iterdir())


def test_an_image_that_is_none_is_passed_over_and_said(digits: Path, tmp_path: Path) -> None:
    assert ignored_images(digits) == []
    bad = [images(digits, "train")[0], images(digits, "val")[1]]
    bad[0].write_bytes(b"no image at all")
    bad[1].write_bytes(b"")
    result = finetune(load_model(BASELINE), str(digits), QUICK, tmp_path / "run")
    assert result.epochs == 1
    lines = ignored_images(digits)
    assert [Path(line.split(": ")[1]).name for line in lines] == [path.name for path in bad]
    assert all("ignoring corrupt" in line for line in lines)
    assert bad[0].name in (tmp_path / "run" / "train.log").read_text()


def test_an_image_that_breaks_later_is_an_error_that_names_it(digits: Path) -> None:
    """After the labels were read once, nobody looks at the images before they are needed."""
    model, evaluator = load_model(BASELINE), Evaluator(str(digits), 64, "cpu")
    evaluator.run(model)
    broken = images(digits, "val")[2]
    broken.write_bytes(b"no image any more")
    with pytest.raises(FileNotFoundError, match=f"Image Not Found .*{broken.name}"):
        evaluator.run(model)
    evaluator.close()


def test_a_dataset_that_is_not_there_has_none() -> None:
    assert ignored_images("nowhere/data.yaml") == []
