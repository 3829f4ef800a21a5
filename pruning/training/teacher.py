"""A network that learns another one's outputs, as Ultralytics' trainer wants it: a module whose answer is a loss.

The teacher is the unpruned network, alone, or one of the user's own (a larger one) beside the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paretoprune.base.errors import one_line
from paretoprune.base.formatting import some
from paretoprune.base.image_size import ImageSize, height_width
from paretoprune.pruning.errors import PruningError
from paretoprune.pruning.surgery.classes import class_numbers, with_classes
from paretoprune.pruning.yolo.loading import input_channels, load_model
from paretoprune.pruning.yolo.output_distribution import output_divergence, output_terms, raw_outputs, unknown_outputs
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.tasks import kind_of

STEPS = tuple(1.25e-6 * 2**k for k in range(8))  # of a weight; up to 1.6e-4, which was too much everywhere


class TaughtModel(nn.Module):
    """A wrapper, as the one for several GPUs: Ultralytics finds the student in `module` wherever it wants the network.

    Without `labels` it gives, of a batch, the divergence of the student's outputs from the teacher's, nats per image.
    Both networks are in eval mode then, always: where the student is the teacher, every output is the same and the
    gradient exactly zero. By a batch's own statistics outputs would differ, and the student would learn to undo that.

    With `labels` the student trains as it does alone, and to its loss the divergence is added, in the loss's own unit:
    nats per object instead of per image (an object is what the teacher's reach sums up to, as Ultralytics divides by
    the sum of the scores that it assigns), times the images of the batch; of a classifier nats per image.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, classes: torch.Tensor | None = None, labels: bool = False
    ) -> None:
        """`classes`: what each class counts (`output_distribution.class_weights`), shape (classes,)."""
        super().__init__()
        self._classes = classes
        self._labels = labels
        self.module = student
        self._images = torch.empty(0)
        self.stride = student.stride  # asked for without unwrapping
        student.criterion = None  # type: ignore[assignment]  # asked for, too: there is no loss by labels
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: neither trained, averaged nor saved

    def train(self, mode: bool = True) -> TaughtModel:
        """Eval mode, whatever is asked for, unless there are labels."""
        return super().train(mode and self._labels)

    def forward(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._images = batch["img"]
        drawn = torch.Generator().manual_seed(int(torch.randint(2**31, ())))  # from what a state keeps
        if self._labels:
            return self._loss_beside(batch, drawn)
        loss = self._divergence(self._images, drawn)
        return loss, {"divergence": loss.detach()}

    def _loss_beside(
        self, batch: Mapping[str, Any], drawn: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (teacher,) = self._teacher
        images = batch["img"]
        with torch.no_grad():
            told = raw_outputs(teacher, images)
        student: Any = self.module
        said = student(images)
        loss, items = student.loss(batch, said)
        apart = output_divergence(_head(teacher), told, said, drawn) / objects(told)
        count = len(images) if isinstance(told, Mapping) else 1  # Ultralytics' losses of objects are times the images
        return loss.sum() + count * apart, {**items, "teacher": apart.detach()}

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


def objects(raw: Any) -> torch.Tensor:
    """How many objects raw outputs see, by the chances of their anchors, at least one; of a classifier the images."""
    if not isinstance(raw, Mapping):
        return torch.tensor(float(len(raw)))
    parts = [raw[name] for name in ("one2many", "one2one") if raw.get(name)] or [raw]
    return torch.stack([part["scores"].float().sigmoid().amax(1).sum() for part in parts]).sum().clamp_min(1.0)


def own_teacher(path: str | Path, model: nn.Module, imgsz: ImageSize, trust: bool = False) -> nn.Module:
    """The checkpoint at `path` as a teacher of networks like `model`, with the classes of `model` where it has more.

    Raises PruningError where it cannot be one (`check_own_teacher`). ``trust`` as in `load_model`.
    """
    teacher = load_model(path, trust)
    ours, theirs = (list(map(str, dict(net.names).values())) for net in (model, teacher))  # type: ignore[arg-type]
    if len(ours) < len(theirs) and set(ours) <= set(theirs):
        teacher = with_classes(teacher, class_numbers(teacher, ours))
    check_own_teacher(teacher, model, imgsz)
    return teacher


@torch.no_grad()
def check_own_teacher(teacher: nn.Module, model: nn.Module, imgsz: ImageSize) -> None:
    """Raise PruningError where `teacher` cannot teach `model` beside the labels: other classes, task or outputs."""
    ours, theirs = (dict(net.names) for net in (model, teacher))  # type: ignore[arg-type]
    if kind_of(teacher) != kind_of(model):
        why = f"is for '{kind_of(teacher)}' and the model for '{kind_of(model)}'"
    elif kind_of(model) == "rtdetr":
        why = (
            "chooses queries of its own, as the model does: RT-DETR learns from the unpruned network alone (--distill)"
        )
    elif [str(theirs[k]).casefold() for k in sorted(theirs)] != [str(ours[k]).casefold() for k in sorted(ours)]:
        why = f"knows {_few(theirs)} and the model {_few(ours)}"
    elif input_channels(teacher) != input_channels(model):
        why = f"takes {input_channels(teacher)} channels and the model {input_channels(model)}"
    else:
        why = _outputs_apart(plain_copy(teacher), plain_copy(model), height_width(imgsz))
    if why:
        raise PruningError(f"a teacher has the model's task, classes and kind of head, but it {why}; give another one")


def _few(names: Mapping[int, Any]) -> str:
    return f"{len(names)} classes ({some([str(name) for name in names.values()])})"


def _outputs_apart(teacher: nn.Module, model: nn.Module, size: tuple[int, int]) -> str:
    """Why the outputs of two networks cannot be compared; "" where they can."""
    heads = [_head(net) for net in (teacher, model)]
    bins = [getattr(head, "reg_max", None) for head in heads]
    if bins[0] != bins[1]:
        return f"has boxes of other bins (reg_max {bins[0]}) than the model (reg_max {bins[1]})"
    images = torch.zeros(1, input_channels(model), *size)
    raws = tuple(raw_outputs(net, images) for net in (teacher, model))
    both = [isinstance(raw, Mapping) and bool(raw.get("one2one")) for raw in raws]
    if both[0] != both[1]:
        return f"is {'' if both[0] else 'not '}end-to-end and the model is {'' if both[1] else 'not'}".rstrip()
    try:
        terms = output_terms(heads[0], raws, torch.Generator())
    except (TypeError, KeyError, RuntimeError) as error:
        return f"gives outputs that cannot be compared ({one_line(error, 80)})"
    other = next((term for term in terms if term.values[0].shape != term.values[1].shape), None)
    return (
        ""
        if other is None
        else (f"gives outputs of shape {tuple(other.values[0].shape)} and the model of {tuple(other.values[1].shape)}")
    )


def check_teacher(model: nn.Module, imgsz: ImageSize) -> None:
    """Raise PruningError where a network like `model` cannot teach: what its head gives is not known."""
    copy = plain_copy(model)
    if reason := unknown_outputs(copy, torch.zeros(1, input_channels(copy), *height_width(imgsz))):
        raise PruningError(f"distillation needs a head whose outputs are known, but {reason}; set distill off")


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = model.model[-1]  # type: ignore[index, assignment]
    return head
