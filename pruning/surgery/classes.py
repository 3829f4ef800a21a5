"""A network restricted to some of its classes: the rows of the others leave every layer that gives a score per class.

What is left gives each kept class the scores that it had. A classifier's probabilities are shared among the kept
classes, and a head that takes the best so many (RT-DETR's queries, an end-to-end head's detections) takes them by the
kept classes alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.head import Classify, Detect, RTDETRDecoder, WorldDetect, YOLOEDetect

from paretoprune.pruning.errors import NotEquivalentError, PruningError
from paretoprune.pruning.yolo.image_size import stride_of
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.output_distribution import raw_outputs
from paretoprune.pruning.yolo.saving import plain_copy
from paretoprune.pruning.yolo.tasks import is_single_class

_CELLS = 2  # of the coarsest feature map, a side, of the image on which both networks are compared
_ROUNDING = 1e-4  # relative to the largest output; a convolution of fewer rows may add up in another order


def class_numbers(model: nn.Module, wanted: Sequence[str | int]) -> list[int]:
    """The numbers of the classes of `model` that are meant by name or number, rising.

    PruningError for one that it does not have (the nearest names are told), for an ambiguous name, and for none.
    """
    names = {int(number): str(name) for number, name in dict(model.names).items()}  # type: ignore[arg-type]
    found = set()
    for given in map(str, wanted):
        numbers = [number for number, name in names.items() if name == given]
        numbers = numbers or [number for number, name in names.items() if name.casefold() == given.casefold()]
        if not numbers and given.isdecimal() and int(given) in names:
            numbers = [int(given)]
        if not numbers:
            near = difflib.get_close_matches(given.casefold(), [name.casefold() for name in names.values()], n=3)
            known = [name for name in names.values() if name.casefold() in near] or list(names.values())[:5]
            more = ", ..." if not near and len(names) > len(known) else ""
            raise PruningError(
                f"`classes` must be of the model's {len(names)}, by name or number, but got '{given}'; "
                f"{'near ones are' if near else 'it has'} {', '.join(known)}{more}"
            )
        if len(numbers) > 1:
            raise PruningError(
                f"`classes` must be clear, but '{given}' is the name of {', '.join(map(str, numbers))}; give its number"
            )
        found.update(numbers)
    if not found:
        raise PruningError("`classes` must name one class at least, but got none; leave it out to keep all")
    return sorted(found)


def with_classes(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of `model` (eval mode, on the CPU) with the classes of these rising numbers alone.

    Its head, `nc`, `no`, `names` and stored yaml are those of so many classes; every other layer stays as it is.

    Raises PruningError for a head whose classes are not rows of a layer, and NotEquivalentError where the copy gives
    the kept classes other scores than `model`.
    """
    head: Any = model.model[-1]  # type: ignore[index]
    if is_single_class(model):
        raise PruningError("the model was trained with all classes as one (single_cls): leave `classes` out")
    if isinstance(head, (WorldDetect, YOLOEDetect)) or not isinstance(head, (Classify, Detect, RTDETRDecoder)):
        raise PruningError(
            "classes are removed from the heads Detect, Segment, Pose, OBB, RTDETRDecoder and Classify, but the model "
            f"has {type(head).__name__}: leave `classes` out"
        )
    copy: Any = plain_copy(model)
    rows = torch.as_tensor(kept)
    before = len(copy.names)
    for layer in _class_layers(copy.model[-1]):
        _keep_rows(layer, rows, before)
    count = len(kept)
    copy.names = {new: copy.names[old] for new, old in enumerate(kept)}
    if isinstance(getattr(copy, "kpt_names", None), Mapping):
        copy.kpt_names = {new: copy.kpt_names[old] for new, old in enumerate(kept) if old in copy.kpt_names}
    if hasattr(copy, "nc"):
        copy.nc = count
    own: Any = copy.model[-1]
    if hasattr(own, "nc"):
        own.nc = count
    if isinstance(own, Detect):
        own.no = count + own.reg_max * 4
    if isinstance(getattr(copy, "yaml", None), dict):
        _describe(copy.yaml, before, count)
    _check(model, copy, kept)
    return copy  # type: ignore[no-any-return]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have layers of the same names with the same values."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _class_layers(head: Any) -> Iterator[nn.Module]:
    """The layers of a head that have a row for each class; those of training alone, too."""
    if isinstance(head, Classify):
        yield head.linear
    elif isinstance(head, RTDETRDecoder):
        yield from (head.enc_score_head, *head.dec_score_head, head.denoising_class_embed)
    else:
        for name in ("cv3", "one2one_cv3"):  # the first is None in a fused end-to-end head
            yield from (branch[-1] for branch in getattr(head, name, None) or ())
        semantic = getattr(getattr(head, "proto", None), "semseg", None)
        if semantic is not None:
            yield semantic[-1]


@torch.no_grad()
def _keep_rows(layer: Any, rows: torch.Tensor, before: int) -> None:
    if not isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)) or len(layer.weight) != before:
        raise PruningError(
            f"a layer of class scores must have a row for each of the {before} classes, but got {layer}: leave "
            "`classes` out"
        )
    for name, values in layer.named_parameters():
        setattr(layer, name, nn.Parameter(values[rows].clone()))
    for name in ("out_channels", "out_features", "num_embeddings"):
        if hasattr(layer, name):
            setattr(layer, name, len(rows))


def _describe(yaml: dict[str, Any], before: int, count: int) -> None:
    """The number of classes, also where the head's own arguments say it."""
    yaml["nc"] = count
    arguments = yaml["head"][-1][-1] if yaml.get("head") else None
    if isinstance(arguments, list) and arguments and arguments[0] == before:
        arguments[0] = count


@torch.no_grad()
def _check(model: nn.Module, copy: nn.Module, kept: Sequence[int]) -> None:
    """NotEquivalentError unless the raw outputs for an image of noise are those of `model` for the kept classes."""
    whole = plain_copy(model)
    side = _CELLS * stride_of(whole)
    image = torch.rand(1, input_channels(whole), side, side, generator=torch.Generator().manual_seed(0))
    before = raw_outputs(whole, image)
    after = raw_outputs(copy, image, before)
    worst = max(_apart(before, after, torch.as_tensor(kept)))
    if not worst <= _ROUNDING:
        raise NotEquivalentError(
            f"without the other classes the scores must be the same, but they differ by {worst:.2g} of the largest; "
            "leave `classes` out"
        )


def _apart(before: Any, after: Any, kept: torch.Tensor) -> Iterator[float]:
    """How far outputs are apart, relative to the largest, tensor by tensor; 0 for what is no tensor."""
    yield 0.0
    if isinstance(before, Mapping):
        for name in before:
            if name != "chosen":  # the queries, in each network's own order
                yield from _apart(before[name], after[name], kept)
    elif isinstance(before, (list, tuple)):
        for one, other in zip(before, after, strict=True):
            yield from _apart(one, other, kept)
    elif isinstance(before, torch.Tensor):
        for dim in range(before.ndim):
            if before.shape[dim] != after.shape[dim]:
                before = before.index_select(dim, kept)
        yield float((before - after).abs().max() / (1 + before.abs().max())) if before.numel() else 0.0
