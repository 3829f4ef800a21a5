"""The user's own training arguments: what may be given, and that a training really works by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.training.finetune import finetune
from paretoprune.pruning.training.own_arguments import check_arguments
from paretoprune.pruning.training.settings import FinetuneSettings
from paretoprune.pruning.training.single_device import _identity
from tests.pruning.recovery_material import shapes_dataset
from tests.pruning.tiny import tiny_model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 3}, "`finetune.train` has no `epochs`: set `finetune.epochs`"),
        ({"lr0": 0.1}, "set `finetune.lr`"),
        ({"optimizer": "SGD"}, "but `optimizer` is set by the fine-tuning itself; there are hsv_h, hsv_s"),
        ({"mosiac": 1}, "but `mosiac` is unknown to Ultralytics; near ones are mosaic$"),
        ({"mosaic": 2.0}, "`finetune.train`: 'mosaic=2.0' is an invalid value"),
        ({"close_mosaic": 1.5}, "'close_mosaic' must be an int"),
        ({"degrees": "much"}, "is of invalid type str"),
        ({"auto_augment": "mine"}, r"`finetune.train.auto_augment` must be one of \('randaugment', .* but got 'mine'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message) as error:
        check_arguments(given)
    assert "\n" not in str(error.value)


def test_a_loss_that_there_is_none_of_is_not_weighed() -> None:
    check_arguments({"box": 5.0, "scale": [0.5, 1.5], "multi_scale": 0.2, "auto_augment": None})
    check_arguments({"degrees": 5}, by_labels=False)
    with pytest.raises(
        PruningError, match=r"`finetune\.train\.box` is of the loss by labels, which distillation has none"
    ):
        check_arguments({"box": 5.0}, by_labels=False)


def test_a_training_augments_and_weighs_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen where Ultralytics makes its transforms, and where its loss reads the weights."""
    from ultralytics.data import dataset
    from ultralytics.utils import loss

    seen: list[dict[str, Any]] = []
    transforms, weighed = dataset.v8_transforms, loss.v8DetectionLoss.__init__

    def made(own: Any, imgsz: int, hyp: Any, *more: Any, **named: Any) -> Any:
        seen.append({name: getattr(hyp, name) for name in ("mosaic", "degrees", "fliplr", "hsv_h", "mixup")})
        return transforms(own, imgsz, hyp, *more, **named)

    def read(self: Any, model: Any, *more: Any, **named: Any) -> None:
        weighed(self, model, *more, **named)
        seen.append({"box": self.hyp.box})

    monkeypatch.setattr(dataset, "v8_transforms", made)
    monkeypatch.setattr(loss.v8DetectionLoss, "__init__", read)
    model: Any = tiny_model()
    model.args = {"fliplr": 0.0, "hsv_h": 0.0}  # of the checkpoint's own training: what is not given stays
    data = str(shapes_dataset(tmp_path / "shapes", train=4, val=2))
    own = {"mosaic": 0.5, "close_mosaic": 1, "degrees": 5, "fliplr": 1.0, "box": 3.0}
    settings = FinetuneSettings(epochs=2, imgsz=64, batch=4, lr=1e-3, train=own)
    finetune(model, data, settings, tmp_path / "run")
    expected = {"mosaic": 0.5, "degrees": 5, "fliplr": 1.0, "hsv_h": 0.0, "mixup": 0.0}
    assert expected in seen
    assert {**expected, "mosaic": 0.0} in seen  # in the last epoch
    assert {"box": 3.0} in seen
    written = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert {name: written[name] for name in own} == own
    assert (written["epochs"], written["optimizer"]) == (2, "AdamW")
    # A training that died goes on under the same arguments only; without any as a state of an older version does
    identity = _identity(model, data, settings)
    assert identity["train"] == own
    assert "train" not in _identity(model, data, replace(settings, train={}))
