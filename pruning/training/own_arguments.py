"""The user's own training arguments (`finetune.train`), under Ultralytics' names: augmentation and weights of losses.

What this project sets by itself (epochs, batch, learning rate, sizes, files ...) is refused, with the setting to use.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from paretoprune.base.errors import one_line
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.ultralytics_logging import quiet_ultralytics

_IMAGES = (
    "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr bgr mosaic close_mosaic mixup cutmix "
    "copy_paste copy_paste_mode auto_augment erasing multi_scale"
).split()
_LABELS = "box cls dfl pose kobj rle angle overlap_mask mask_ratio label_smoothing".split()
"""Of the loss by labels; an older Ultralytics has label smoothing."""
_OTHERWISE = {
    "epochs": "finetune.epochs", "patience": "finetune.patience", "batch": "finetune.batch", "lr0": "finetune.lr",
    "workers": "finetune.workers", "imgsz": "model.imgsz", "model": "model.path", "data": "data.path",
    "classes": "data.classes", "seed": "search.seed", "amp": "trial.amp", "device": "model.device",
    "distill_model": "finetune.teacher",
}  # fmt: skip
"""Arguments that are settings of their own."""
_CHOICES = {"copy_paste_mode": ("flip", "mixup"), "auto_augment": ("randaugment", "autoaugment", "augmix", None)}
"""What Ultralytics itself refuses only as the training begins, or takes for another."""


def check_arguments(given: Mapping[str, Any], by_labels: bool = True) -> None:
    """Raise PruningError, in one line, for a name that is none of these or a value that Ultralytics refuses.

    by_labels: whether there is a loss by labels, which else none of its arguments can change.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    known = [name for name in (*_IMAGES, *_LABELS) if name in DEFAULT_CFG_DICT]
    for name in given:
        if name in _OTHERWISE:
            raise PruningError(f"`finetune.train` has no `{name}`: set `{_OTHERWISE[name]}`")
        if name not in known:
            why = "is set by the fine-tuning itself" if name in DEFAULT_CFG_DICT else "is unknown to Ultralytics"
            near = difflib.get_close_matches(name, known, n=3)
            raise PruningError(
                f"`finetune.train` takes augmentation and loss weights, but `{name}` {why}; "
                f"{'near ones are' if near else 'there are'} {', '.join(near or known)}"
            )
        if name in _LABELS and not by_labels:
            raise PruningError(
                f"`finetune.train.{name}` is of the loss by labels, which distillation has none of: leave it out, or "
                "set distill off"
            )
        if given[name] not in _CHOICES.get(name, (given[name],)):
            raise PruningError(f"`finetune.train.{name}` must be one of {_CHOICES[name]}, but got {given[name]!r}")
    with quiet_ultralytics():
        try:
            get_cfg(overrides=dict(given))
        except (TypeError, ValueError, SyntaxError) as error:
            raise PruningError(one_line(f"`finetune.train`: {error}")) from error
