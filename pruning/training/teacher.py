"""A network that learns another one's outputs, as Ultralytics' trainer wants it: a module whose answer is a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.output_distribution import output_divergence, raw_outputs, unknown_outputs
from paretoprune.pruning.yolo.saving import plain_copy

STEPS = tuple(1.25e-6 * 2**k for k in range(8))  # of a weight; up to 1.6e-4, which was too much everywhere


class TaughtModel(nn.Module):
    """A wrapper, as the one for several GPUs: Ultralytics finds the student in `module` wherever it wants the network.

    Of a batch it gives the divergence of the student's outputs from the teacher's, nats per image, and looks at no
    label. Both networks are in eval mode, always: where the student is the teacher, every output is the same and the
    gradient exactly zero. By a batch's own statistics outputs would differ, and the student would learn to undo that.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, classes: torch.Tensor | None = None) -> None:
        """`classes`: what each class counts (`output_distribution.class_weights`), shape (classes,)."""
        super().__init__()
        self._classes = classes
        self.module = student
        self._images = torch.empty(0)
        self.stride = student.stride  # asked for without unwrapping
        student.criterion = None  # type: ignore[assignment]  # asked for, too: there is no loss by labels
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: neither trained, averaged nor saved

    def train(self, mode: bool = True) -> TaughtModel:
        """Eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._images = batch["img"]
        drawn = torch.Generator().manual_seed(int(torch.randint(2**31, ())))  # from what a state keeps
        loss = self._divergence(self._images, drawn)
        return loss, {"divergence": loss.detach()}

    def _divergence(self, images: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
        (teacher,) = self._teacher
        with torch.no_grad():
            told = raw_outputs(teacher, images)
        said = raw_outputs(self.module, images, told)
        return output_divergence(_head(teacher), told, said, drawn, self._classes) / len(images)

    def longest_step(self) -> float:
        """How far every weight can go by its gradient's sign, as Adam's first step does, before images get worse by it.

        The gradient is that of one half of the last batch, the images the other half (a single image is both). The one
        of `STEPS` after which they are closest to the teacher; the smallest where none does them any good. The weights
        are as before.
        """
        images = self._images
        seen, unseen = (images[: len(images) // 2], images[len(images) // 2 :]) if len(images) > 1 else (images, images)
        weights = [p for p in self.module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(self._divergence(seen, torch.Generator()), weights, allow_unused=True)
        moves = [(p, g.sign()) for p, g in zip(weights, gradients, strict=True) if g is not None]
        kept = [p.detach().clone() for p, _ in moves]
        best, least = STEPS[0], float("inf")
        with torch.no_grad():
            for step in STEPS:
                for (p, sign), value in zip(moves, kept, strict=True):
                    p.copy_(value - step * sign)
                found = float(self._divergence(unseen, torch.Generator()))
                if not found < least:
                    break
                best, least = step, found
            for (p, _), value in zip(moves, kept, strict=True):
                p.copy_(value)
        return best


def check_teacher(model: nn.Module, imgsz: ImageSize) -> None:
    """Raise PruningError where a network like `model` cannot teach: what its head gives is not known."""
    copy = plain_copy(model)
    if reason := unknown_outputs(copy, torch.zeros(1, input_channels(copy), *height_width(imgsz))):
        raise PruningError(f"distillation needs a head whose outputs are known, but {reason}; set distill off")


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = model.model[-1]  # type: ignore[index, assignment]
    return head
