"""How much a network's own answer changes: the Fisher information of its output distribution, without any label.

The outputs of a head are taken as a distribution P(z) with parameters z: a Bernoulli variable per class of an anchor, a
categorical one over the bins of a box's side, and so on (`output_probe` lists them). To second order

    KL(P(z) || P(z + dz)) = 1/2 dz' F dz,    F = E[g g'],    g = d log P(y | z) / dz,  y ~ P(z)

(Amari 1998, "Natural gradient works efficiently in learning", section 2; Martens 2020, "New insights and perspectives
on the natural gradient method", arXiv:1412.1193, section 5: for these families F is also the generalised Gauss-Newton
matrix). With one draw u of a random vector that has E[u u'] = F, the scalar s = u'z has a gradient by any activation a
whose square has the expectation (J' F J)_aa, the curvature of the divergence there: one backward pass an image.

What an anchor says beside its class scores counts by the chance that it is a detection at all: its highest class
probability. The gradient of the *labelled* loss is no substitute: for the logit of a class that is not there it is p,
so its square is p^2, where the curvature is p (1 - p); over 80 classes and thousands of anchors with p around 0.001,
errors of class logits would be priced a thousand times too low.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.head import Depth, Pose26, RTDETRDecoder, SemanticSegment

_CELL = 32  # pixels: the standard deviation of an RT-DETR box's sides; its coordinates are fractions of the image
_MASKS = 8  # anchors an image whose masks are looked at, drawn by their chance to be a detection


def output_probe(model: nn.Module, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The scalar s of the module's docstring, summed over images (N, C, H, W) that do not touch each other (eval mode).

    - class scores (also RT-DETR's decoder and its choice of queries): Bernoulli, F = p (1 - p);
    - a box side with bins (DFL): categorical over the bins, F = diag(q) - q q'; without bins, keypoints and angles:
      normal, with a standard deviation of one cell of the feature map, or one radian;
    - a keypoint's visibility, a mask's pixels (averaged over the prototype's pixels): Bernoulli;
    - a classifier, a pixel of a semantic map: categorical over the classes; depth: normal in the logarithm.

    `generator`: on the CPU; equal seeds give equal probes on every device. Raises TypeError for a head that gives
    something else.
    """
    head: Any = model.model[-1]  # type: ignore[index]
    output: Any = model(images)
    draw = _Draw(generator)
    if isinstance(head, Depth):
        return draw.normal(output.log())
    if isinstance(head, SemanticSegment):
        return draw.categorical(output, 1)
    raw = output[1] if isinstance(output, tuple) else output
    if isinstance(head, RTDETRDecoder):
        boxes, scores, _, encoder_scores, _ = raw
        reach = scores.detach().sigmoid().amax(-1, keepdim=True)
        sides = draw.normal(boxes * (images.shape[-1] / _CELL), reach)
        return draw.bernoulli(scores) + sides + draw.bernoulli(encoder_scores)
    if isinstance(raw, torch.Tensor) and raw.ndim == 2:
        return draw.categorical(raw, 1)
    if not isinstance(raw, Mapping):
        raise TypeError(f"raw outputs must be a mapping or logits, but {type(head).__name__} gives {type(raw)}")
    parts = [raw[name] for name in ("one2many", "one2one") if raw.get(name)] or [raw]
    steps = 1.0 if isinstance(head, Pose26) else 2.0  # what one unit of a keypoint's output is in cells
    return torch.stack([_anchors(part, draw, steps, getattr(head, "kpt_shape", None)) for part in parts]).sum()


def _anchors(raw: Mapping[str, Any], draw: _Draw, steps: float, keypoints: Any) -> torch.Tensor:
    """What one set of anchors says: `scores` (N, classes, A), `boxes` (N, 4 x bins, A) and the task's own."""
    scores, boxes = raw["scores"], raw["boxes"]
    reach = scores.detach().sigmoid().amax(1, keepdim=True)  # (N, 1, A)
    sides = boxes.unflatten(1, (4, -1))
    total = draw.bernoulli(scores)
    total = total + (draw.normal(boxes, reach) if sides.shape[2] == 1 else draw.categorical(sides, 2, reach))
    if "angle" in raw:
        total = total + draw.normal(raw["angle"], reach)
    if "kpts" in raw:
        points = raw["kpts"].unflatten(1, tuple(keypoints))  # (N, points, 2 or 3, A)
        share = reach[:, None] / points.shape[1]
        total = total + draw.normal(steps * points[:, :, :2], share)
        if points.shape[2] == 3:
            total = total + draw.bernoulli(points[:, :, 2:], share)
    if "mask_coefficient" in raw:
        proto = raw["proto"][0] if isinstance(raw["proto"], tuple) else raw["proto"]
        total = total + _masks(raw["mask_coefficient"], proto, reach[:, 0], draw)
    return total


def _masks(coefficients: torch.Tensor, proto: torch.Tensor, reach: torch.Tensor, draw: _Draw) -> torch.Tensor:
    """Masks of a few anchors drawn by `reach` (N, A), weighted so that the expectation is that of all anchors."""
    chosen = draw.indices(reach, _MASKS)
    picked = coefficients.gather(2, chosen[:, None].expand(-1, coefficients.shape[1], -1))
    logits = torch.einsum("nck,nchw->nkhw", picked, proto)
    weight = reach.sum(1) / (_MASKS * logits.shape[2] * logits.shape[3])
    return draw.bernoulli(logits, weight[:, None, None, None])


class _Draw:
    """Random vectors u with E[u u'] = weight x F, multiplied by the outputs; nothing but the outputs has a gradient."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def _signs(self, like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(0, 2, like.shape, generator=self._generator, dtype=torch.int8)
        return (2 * drawn - 1).to(like.device, like.dtype)

    def bernoulli(self, logits: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        p = logits.detach().sigmoid()
        return ((weight * p * (1 - p)) ** 0.5 * self._signs(logits) * logits).sum()

    def normal(self, values: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        scale = torch.as_tensor(weight, dtype=values.dtype, device=values.device) ** 0.5
        return (scale * self._signs(values) * values).sum()

    def categorical(self, logits: torch.Tensor, dim: int, weight: torch.Tensor | None = None) -> torch.Tensor:
        """`weight`: of the shape of `logits` without `dim`, or one that broadcasts to it."""
        q = logits.detach().softmax(dim)
        last = q.movedim(dim, -1)
        chosen = self.indices(last.flatten(0, -2), 1).reshape(last.shape[:-1])
        score = -q.movedim(dim, -1)
        score = score.scatter_add(-1, chosen[..., None], torch.ones_like(score[..., :1]))
        scale = 1.0 if weight is None else weight[..., None] ** 0.5
        return (scale * score * logits.movedim(dim, -1)).sum()

    def indices(self, weights: torch.Tensor, count: int) -> torch.Tensor:
        """`count` draws with replacement from each row of (rows, choices), shape (rows, count)."""
        chances = weights.detach().float().cpu() + 1e-12
        return torch.multinomial(chances, count, replacement=True, generator=self._generator).to(weights.device)
