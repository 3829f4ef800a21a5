"""Every way in which a task model is run: what a trace follows, and what a comparison of two networks repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.head import YOLOEDetect

_PROMPTS = 2


@dataclass(frozen=True)
class Pass:
    """One kind of forward pass: its name for people, the mode it needs, and how it is run on images (N, C, H, W)."""

    name: str
    training: bool
    run: Callable[[Any, torch.Tensor], Any]


def passes_of(model: nn.Module) -> tuple[Pass, ...]:
    """Inference, training (some heads have branches of their own in each), and YOLOE's inference by visual prompts."""
    found: tuple[Pass, ...] = (Pass("inference", False, _plainly), Pass("training", True, _plainly))
    head = list(model.model)[-1]  # type: ignore[arg-type]
    if isinstance(head, YOLOEDetect) and not hasattr(head, "lrpc"):  # the prompt-free kind has no place for prompts
        found += (Pass("inference with visual prompts", False, _with_visual_prompts),)
    return found


def _plainly(model: Any, images: torch.Tensor) -> Any:
    return model(images)


def _with_visual_prompts(model: Any, images: torch.Tensor) -> Any:
    """Prompts are masks (N, prompts, H, W) over the first feature map."""
    stride = int(model.stride[0])
    height, width = (-(-side // stride) for side in images.shape[2:])
    masks = torch.zeros(len(images), _PROMPTS, height, width, dtype=images.dtype)
    masks[:, 0, : height // 2, : width // 2] = 1.0
    masks[:, 1, height // 4 :, width // 3 :] = 1.0
    return model(images, vpe=masks)
