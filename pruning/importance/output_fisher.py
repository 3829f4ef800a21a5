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

from typing import Any

import torch
from torch import nn

from pruning.output_distribution import Term, draw_indices, output_terms, raw_outputs


def output_probe(model: nn.Module, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The scalar s of the module's docstring, summed over images (N, C, H, W) that do not touch each other (eval mode).

    F is p (1 - p) for a Bernoulli variable, diag(q) - q q' for a categorical one, 1 for a normal one, times the term's
    weight. `generator`: on the CPU; equal seeds give equal probes on every device. Raises TypeError for a head that
    gives something unknown.
    """
    head: Any = model.model[-1]  # type: ignore[index]
    return probe_of(head, raw_outputs(model, images), generator)


def probe_of(head: nn.Module, raw: Any, generator: torch.Generator) -> torch.Tensor:
    """`output_probe` of `raw_outputs`."""
    return torch.stack([_drawn(term, generator) for term in output_terms(head, (raw,), generator)]).sum()


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
