"""What a network's outputs say, as a probability distribution, and how far two networks are apart in it: no label.

The outputs of a head are the parameters z of a distribution P(z), made of independent variables (`Term`):

- class scores (also RT-DETR's decoder and encoder, whose scores choose the queries): Bernoulli;
- a box side with bins (DFL): categorical over the bins; without bins, keypoints and angles: normal, with a standard
  deviation of one cell of the feature map, or one radian;
- a keypoint's visibility, a mask's pixels (averaged over the prototype's pixels): Bernoulli;
- a classifier, a pixel of a semantic map: categorical over the classes; depth: normal in the logarithm.

What an anchor says beside its class scores counts by the chance that it is a detection at all: its highest class
probability, called its reach. Classes may count differently (`class_weights`): accuracy is a mean over classes, a mean
over images is one over objects, in which a rare class goes first.

`output_divergence` is KL(P(z) || P(z')) of two networks on the same images, what a student is to minimise (Hinton,
Vinyals, Dean 2015, "Distilling the knowledge in a neural network", arXiv:1503.02531, for classes); its second
derivative at z' = z is the Fisher information that `importance.output_fisher` samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from ultralytics.nn.modules.head import Depth, Detect, Pose26, RTDETRDecoder, SemanticSegment

_CELL = 32  # pixels: the standard deviation of an RT-DETR box's sides; its coordinates are fractions of the image
_ROUNDING = 1e-4  # kernels with and without gradients (of an attention, a linear layer) may differ by a tenth of it
_RARE = 30.0  # times as much as the mean is the most that a class counts: of one that no image shows nothing is known
_MASKS = 8  # anchors an image whose masks are looked at, drawn by their chance to be a detection


@dataclass(frozen=True)
class Term:
    """Variables of one family: a tensor of parameters per network that is read, all of one shape.

    `dim`: of a categorical variable's choices, which `weight` lacks or has once; `weight` broadcasts to the variables.
    """

    family: Literal["bernoulli", "normal", "categorical"]
    values: tuple[torch.Tensor, ...]
    weight: torch.Tensor | float = 1.0
    dim: int = 1


def raw_outputs(model: nn.Module, images: torch.Tensor, like: Any = None) -> Any:
    """What `model` (eval mode) says of images (N, C, H, W) before it is decoded, as `output_terms` reads it.

    `like`: the raw outputs of another network for the same images. An RT-DETR then decodes the queries that the other
    one chose, in that order, so that the two can be compared; its encoder's scores are kept for all positions.
    """
    head: Any = model.model[-1]  # type: ignore[index]
    if not isinstance(head, RTDETRDecoder):
        output: Any = model(images)
        return output[1] if isinstance(output, tuple) else output
    with _encoder_scores(head, None if like is None else like["chosen"]) as seen:
        boxes, scores, *_ = model(images)[1]
    raw = {"boxes": boxes[0] * (images.shape[-1] / _CELL), "scores": scores[0], **seen}
    if like is not None:  # the same queries, but in the order of this network's own scores
        place = seen["chosen"].argsort(1).gather(1, like["chosen"].argsort(1).argsort(1))
        for name in ("boxes", "scores"):
            raw[name] = raw[name].gather(1, place[..., None].expand_as(raw[name]))
    return raw


@contextlib.contextmanager
def _encoder_scores(head: Any, chosen: torch.Tensor | None) -> Iterator[dict[str, torch.Tensor]]:
    """Filled in as `head` runs: `encoder`, scores (N, positions, classes), and `chosen`, positions of the queries."""
    seen: dict[str, torch.Tensor] = {}

    def look(module: nn.Module, inputs: Any, scores: torch.Tensor) -> torch.Tensor:
        seen["encoder"] = scores
        if chosen is not None:
            others = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, chosen, False)
            scores = scores.masked_fill(others[..., None], -torch.inf)
        count = min(head.num_queries, scores.shape[1])
        seen["chosen"] = Detect._grouped_topk(scores.detach().amax(-1), count, 1)[1]  # as the head itself does
        return scores

    handle = head.enc_score_head.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def output_terms(
    head: nn.Module, raws: tuple[Any, ...], generator: torch.Generator, classes: torch.Tensor | None = None
) -> list[Term]:
    """The terms of one or more networks' `raw_outputs` for the same images; reach and draws are the first one's.

    `generator`: on the CPU; draws the anchors whose masks are looked at, equal seeds the same ones on every device.
    `classes`: what each class counts (`class_weights`), shape (classes,); None: all alike.
    Raises TypeError for a head that gives something else.
    """
    first = raws[0]
    if isinstance(head, Depth):
        return [Term("normal", tuple(depth.log() for depth in raws))]
    if isinstance(head, RTDETRDecoder):
        counts = _counts(classes, first["scores"], -1)
        return [
            Term("bernoulli", _each(raws, "scores"), counts),
            Term("normal", _each(raws, "boxes"), _reach(first["scores"], -1, counts)),
            Term("bernoulli", _each(raws, "encoder"), counts),
        ]
    if isinstance(first, torch.Tensor) and (isinstance(head, SemanticSegment) or first.ndim == 2):
        return [Term("categorical", raws)]
    if not isinstance(first, Mapping):
        raise TypeError(f"raw outputs must be a mapping or logits, but {type(head).__name__} gives {type(first)}")
    steps = 1.0 if isinstance(head, Pose26) else 2.0  # what one unit of a keypoint's output is in cells
    names = [name for name in ("one2many", "one2one") if first.get(name)]
    parts = [_each(raws, name) for name in names] or [raws]
    points = getattr(head, "kpt_shape", None)
    return [term for part in parts for term in _anchors(part, generator, steps, points, classes)]


@torch.no_grad()
def unknown_outputs(model: nn.Module, images: torch.Tensor) -> str:
    """Why `output_terms` cannot read what `model` (eval mode) says of images (N, C, H, W); "" where it can."""
    head: nn.Module = model.model[-1]  # type: ignore[index, assignment]
    raw = raw_outputs(model, images)
    try:
        output_terms(head, (raw,), torch.Generator())
    except (TypeError, KeyError) as error:
        return f"{type(head).__name__} gives others ({type(error).__name__}: {error})"
    return ""


def _each(raws: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    return tuple(raw[name] for raw in raws)


def _counts(classes: torch.Tensor | None, scores: torch.Tensor, dim: int) -> torch.Tensor | float:
    """`classes` as it broadcasts to `scores`, whose classes lie along `dim`."""
    if classes is None:
        return 1.0
    return classes.to(scores).reshape([-1 if axis == dim % scores.ndim else 1 for axis in range(scores.ndim)])


def _reach(scores: torch.Tensor, dim: int, counts: torch.Tensor | float) -> torch.Tensor:
    return (counts * scores.detach().sigmoid()).amax(dim, keepdim=True)


def _anchors(
    raws: tuple[Any, ...], generator: torch.Generator, steps: float, keypoints: Any, classes: torch.Tensor | None
) -> Iterator[Term]:
    """What one set of anchors says: `scores` (N, classes, A), `boxes` (N, 4 x bins, A) and the task's own."""
    scores = _each(raws, "scores")
    counts = _counts(classes, scores[0], 1)
    reach = _reach(scores[0], 1, counts)  # (N, 1, A)
    yield Term("bernoulli", scores, counts)
    sides = tuple(boxes.unflatten(1, (4, -1)) for boxes in _each(raws, "boxes"))  # (N, 4, bins, A)
    if sides[0].shape[2] == 1:
        yield Term("normal", sides, reach[:, None])
    else:
        yield Term("categorical", sides, reach[:, None], 2)
    if "angle" in raws[0]:
        yield Term("normal", _each(raws, "angle"), reach)
    if "kpts" in raws[0]:
        points = [kpts.unflatten(1, tuple(keypoints)) for kpts in _each(raws, "kpts")]  # (N, points, 2 or 3, A)
        share = reach[:, None] / points[0].shape[1]
        yield Term("normal", tuple(steps * each[:, :, :2] for each in points), share)
        if points[0].shape[2] == 3:
            yield Term("bernoulli", tuple(each[:, :, 2:] for each in points), share)
    if "mask_coefficient" in raws[0]:
        yield _masks(raws, reach[:, 0], generator)


def _masks(raws: tuple[Any, ...], reach: torch.Tensor, generator: torch.Generator) -> Term:
    """Masks of a few anchors drawn by `reach` (N, A), weighted so that the expectation is that of all anchors."""
    chosen = draw_indices(reach, _MASKS, generator)
    masks = []
    for raw in raws:
        coefficients = raw["mask_coefficient"]
        picked = coefficients.gather(2, chosen[:, None].expand(-1, coefficients.shape[1], -1))
        proto = raw["proto"][0] if isinstance(raw["proto"], tuple) else raw["proto"]
        masks.append(torch.einsum("nck,nchw->nkhw", picked, proto))
    weight = reach.sum(1) / (_MASKS * masks[0].shape[2] * masks[0].shape[3])
    return Term("bernoulli", tuple(masks), weight[:, None, None, None])


@torch.no_grad()
def class_probabilities(model: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """What `model` (eval mode) gives each class at each of its anchors or queries, shape (N, classes, A).

    Those that are deployed, where a head has two sets; None for a head without any.
    """
    raw = raw_outputs(model, images)
    scores = (raw.get("one2one") or raw).get("scores") if isinstance(raw, Mapping) else None
    if not isinstance(scores, torch.Tensor) or scores.ndim != 3:
        return None
    by_query = isinstance(model.model[-1], RTDETRDecoder)  # type: ignore[index]
    found: torch.Tensor = scores.float().sigmoid()
    return found.transpose(1, 2) if by_query else found


def class_weights(
    model: nn.Module, images: torch.Tensor, chunk: int = 8, pause: Callable[[], None] = lambda: None
) -> torch.Tensor | None:
    """What an error in each class's scores counts, so that all classes together count alike on these images.

    The curvature of a class's scores is p (1 - p), summed over anchors it is about the number of its objects; a class
    counts by the inverse, within bounds, in the mean (weighted by curvature) 1. So a class that one image in a hundred
    shows is given up no sooner than one that every image shows, as in the mean average precision. With the weights
    COCO's yolov8n keeps 0.125 mAP50-95 at 45 % fewer multiply-adds, without 0.105: of the quarter of the classes that
    128 images show least it then keeps a fifth of the accuracy, of the others half.

    Args:
        model: the unpruned network, eval mode. images: (N, C, H, W), moved to its device chunk by chunk.
        pause: called between two chunks, where others may use the device.

    Returns:
        shape (classes,), on the CPU; None where there is one class or none.
    """
    device = next(model.parameters()).device
    total = torch.zeros(1)
    for part in images.split(chunk):
        pause()
        p = class_probabilities(model, part.to(device))
        if p is None or p.shape[1] == 1:
            return None
        total = total + (p * (1 - p)).sum((0, 2)).cpu()
    weights = (total.mean() / total.clamp_min(1e-12)).clamp(1 / _RARE, _RARE)
    return weights * total.sum() / (weights * total).sum()


def draw_indices(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` draws with replacement from each row of (rows, choices), shape (rows, count)."""
    chances = weights.detach().float().cpu() + 1e-12
    return torch.multinomial(chances, count, replacement=True, generator=generator).to(weights.device)


def output_divergence(
    head: nn.Module, teacher: Any, student: Any, generator: torch.Generator, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(P(teacher) || P(student)) of two networks' `raw_outputs` for the same images, nats, summed over the images.

    `head`: the teacher's. `classes`: as `output_terms` has it. Only `student` gets a gradient, and exactly none where
    its outputs are the teacher's up to rounding: an optimiser that normalises its steps would make full ones of that.
    Computed in 32 bits at least.
    """
    terms = output_terms(head, (teacher, student), generator, classes)
    return torch.stack([_apart(term) for term in terms]).sum()


def _apart(term: Term) -> torch.Tensor:
    before, after = (value if value.dtype == torch.float64 else value.float() for value in term.values)
    before = before.detach()
    after = torch.where((after - before).abs() <= _ROUNDING * (1 + before.abs()), before, after)
    if term.family == "normal":
        return (term.weight * (after - before) ** 2).sum() / 2
    if term.family == "bernoulli":
        p = before.sigmoid()
        cross, own = (functional.binary_cross_entropy_with_logits(z, p, reduction="none") for z in (after, before))
        return (term.weight * (cross - own)).sum()
    norms = [z.logsumexp(term.dim, keepdim=True) for z in (before, after)]
    q = (before - norms[0]).exp()
    return (term.weight * (norms[1] - norms[0] - (q * (after - before)).sum(term.dim, keepdim=True))).sum()
