"""Native rivals: the same classes go on as they are, other classes get a fresh head; the weights really come along."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paretoprune.pruning.builtin import BASELINE
from paretoprune.pruning.builtin.dataset import build_dataset
from paretoprune.pruning.data.class_subset import class_subset
from paretoprune.pruning.data.dataset import class_counts, has_split
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.training.stock_baseline import AS_PICKS, AS_ULTRALYTICS, check_native, train_native
from paretoprune.pruning.yolo.loading import load_model

SETTINGS = FinetuneSettings(epochs=1, imgsz=64, batch=8, workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset(tmp_path_factory.mktemp("data") / "digits", train=8, val=4)


def fewer_classes(data: Path, count: int) -> Path:
    """The same images under a description that knows only the first classes."""
    content = yaml.safe_load(data.read_text())
    names = content["names"]
    content["names"] = {index: names[index] for index in range(count)}
    content["path"] = str(data.parent)
    other = data.with_name("fewer.yaml")
    other.write_text(yaml.safe_dump(content))
    return other


def test_same_classes_are_fine_tuned_like_a_pick(data: Path, tmp_path: Path) -> None:
    epochs: list[int] = []

    def note(epoch: int, metrics: dict[str, float]) -> bool:
        epochs.append(epoch)
        return False

    result = train_native(BASELINE, str(data), SETTINGS, tmp_path, on_epoch=note)
    assert (result.recipe, result.epochs, epochs) == (AS_PICKS, 1, [1])


def test_of_a_dataset_of_some_classes_it_keeps_those_that_it_knows(data: Path, tmp_path: Path) -> None:
    whole = load_model(BASELINE)
    subset = class_subset(data, whole, [3, 7], tmp_path)
    result = train_native(BASELINE, subset, SETTINGS, tmp_path / "run")
    assert (result.recipe, result.model.names) == (AS_PICKS, {0: "3", 1: "7"})


@pytest.mark.slow
def test_other_classes_get_a_fresh_head_and_keep_the_rest(data: Path, tmp_path: Path) -> None:
    other = fewer_classes(data, 3)
    for cache in data.parent.rglob("*.cache"):
        cache.unlink()
    for label in data.parent.rglob("labels/**/*.txt"):  # the description knows three classes
        rows = [line.split() for line in label.read_text().splitlines()]
        label.write_text("\n".join(" ".join([str(int(row[0]) % 3), *row[1:]]) for row in rows))
    before = load_model(BASELINE)
    assert class_counts(other, before)[1] == 3 != class_counts(other, before)[0]
    seen: list[int] = []
    result = train_native(BASELINE, str(other), SETTINGS, tmp_path, on_epoch=lambda epoch, _: bool(seen.append(epoch)))
    assert (result.recipe, result.epochs, seen) == (AS_ULTRALYTICS, 1, [1])
    assert class_counts(other, result.model) == (3, 3)
    old, new = (dict(model.state_dict()) for model in (before, result.model))
    stem = next(name for name in old if name.endswith("conv.weight"))
    assert old[stem].shape == new[stem].shape
    assert (old[stem] - new[stem]).abs().max() < 0.1 * old[stem].abs().max()  # one epoch moved it a little only


def test_tasks_and_splits_are_checked(data: Path) -> None:
    check_native(BASELINE, "detect")
    with pytest.raises(PruningError, match=r"must have the task 'segment', but .* has 'detect'"):
        check_native(BASELINE, "segment")
    assert has_split(data, "val", load_model(BASELINE))
    assert not has_split(data, "test", load_model(BASELINE))
