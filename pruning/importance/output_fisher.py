"""How much a network's own answer changes: the Fisher information of its output distribution, without any label.

The outputs of a head are the parameters z of a distribution P(z) (`output_distribution` has that of each head). To
second order

    KL(P(z) || P(z + dz)) = 1/2 dz' F dz,    F = E[g g'],    g = d log P(y | z) / dz,  y ~ P(z)

(Amari 1998, "Natural gradient works efficiently in learning", section 2; Martens 2020, "New insights and perspectives
on the natural gradient method", arXiv:1412.1193, section 5: for these families F is also the generalised Gauss-Newton
matrix). With one draw u of a random vector that has E[u u'] = F, the scalar s = u'z has a gradient by any activation a
whose square has the expectation (J' F J)_aa, the curvature of the divergence there: one backward pass an image.

The gradient of the *labelled* loss is no substitute: for the logit of a class that is not there it is p, so its square
is p^2, where the curvature is p (1 - p); over 80 classes and thousands of anchors with p around 0.001, errors of class
logits would be priced a thousand times too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from paretoprune.pruning.yolo.output_distribution import Term, draw_indices, output_terms, raw_outputs

_BOUNDS = (0.02, 20.0)  # of what a position counts


def output_probe(
    model: nn.Module, images: torch.Tensor, generator: torch.Generator, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """The scalar s of the module's docstring, summed over images (N, C, H, W) that do not touch each other (eval mode).

    F is p (1 - p) for a Bernoulli variable, diag(q) - q q' for a categorical one, 1 for a normal one, times the term's
    weight. `generator`: on the CPU; equal seeds give equal probes on every device. `classes`: what each class
    counts (`class_weights`). Raises TypeError for a head that gives something unknown.
    """
    head: Any = model.model[-1]  # type: ignore[index]
    return probe_of(head, raw_outputs(model, images), generator, classes)


def probe_of(
    head: nn.Module, raw: Any, generator: torch.Generator, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """`output_probe` of `raw_outputs`."""
    return torch.stack([_drawn(term, generator) for term in output_terms(head, (raw,), generator, classes)]).sum()


def _drawn(term: Term, generator: torch.Generator) -> torch.Tensor:
    """u'z with E[u u'] = weight x F; nothing but the outputs z has a gradient."""
    (z,) = term.values
    scale = torch.as_tensor(term.weight, dtype=z.dtype, device=z.device) ** 0.5
    if term.family == "categorical":
        q = z.detach().softmax(term.dim)
        last = q.movedim(term.dim, -1)
        chosen = draw_indices(last.flatten(0, -2), 1, generator).reshape(last.shape[:-1]).unsqueeze(term.dim)
        u = (-q).scatter_add(term.dim, chosen, torch.ones_like(chosen, dtype=q.dtype))
        return (scale * u * z).sum()
    signs = (2 * torch.randint(0, 2, z.shape, generator=generator, dtype=torch.int8) - 1).to(z.device, z.dtype)
    if term.family == "bernoulli":
        p = z.detach().sigmoid()
        scale = scale * (p * (1 - p)) ** 0.5
    return (scale * signs * z).sum()


def curvature_at(places: torch.Tensor, slopes: Sequence[torch.Tensor | None], sides: tuple[int, int]) -> torch.Tensor:
    """The curvature by what layers give at these places, up to a constant: one probe's squares over their channels.

    Args:
        places: int64 (positions, 3): image, row, column on a grid of `sides` (rows, columns).
        slopes: of the probe by each layer's output (N, C, H, W), H and W multiples of the sides; None counts nothing.

    Returns:
        shape (positions,); zero where no slope is known.
    """
    total = torch.zeros(len(places), device=places.device)
    for slope in slopes:
        if slope is not None and slope.ndim == 4:
            squares = functional.adaptive_avg_pool2d(slope.square().sum(1, keepdim=True), sides)[:, 0]
            squares = squares / squares.mean().clamp_min(1e-30)  # layers that read one tensor count alike
            total += squares[places[:, 0], places[:, 1], places[:, 2]]
    return total


def position_weights(curvature: torch.Tensor) -> torch.Tensor:
    """What an error at a position counts: the root of its share of the curvature, within bounds, mean about 1.

    Shape (positions,). The root and the bounds, since one probe is a noisy estimate: a few places would decide alone.
    """
    weights = (curvature / curvature.mean().clamp_min(1e-30)).sqrt()
    mean = weights.mean()
    return (weights / mean).clamp(*_BOUNDS) if mean > 0 else torch.ones_like(weights)
