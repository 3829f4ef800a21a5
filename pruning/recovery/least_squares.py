"""Ridge least squares from accumulated moments: memory does not grow with the number of observations.

Several independent systems of one size are solved at once (a convolution has one per group of its channels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """First and second moments of inputs x (unknowns) and answers y, float64, about fixed reference points.

    Shapes: `xx` (systems, unknowns, unknowns), `xy` (systems, unknowns, outputs), `yy` (systems, outputs).
    """

    x0: torch.Tensor
    y0: torch.Tensor
    count: float
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @classmethod
    def about(cls, x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Empty moments whose reference points are the means of a first chunk (keeps the sums well conditioned)."""
        x0, y0 = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        systems, unknowns, outputs = x.shape[0], x.shape[2], y.shape[2]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(systems, *shape, dtype=torch.float64, device=x.device)

        return cls(
            x0,
            y0,
            0,
            zeros(1, unknowns),
            zeros(1, outputs),
            zeros(unknowns, unknowns),
            zeros(unknowns, outputs),
            zeros(outputs),
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None, with_xx: bool = True) -> None:
        """Take in observations: x (systems, observations, unknowns), y (systems, observations, outputs), float32.

        `weights`: what each counts, shape (observations,); None: 1.
        """
        x, y = x - self.x0, y - self.y0
        self.count += x.shape[1] if weights is None else float(weights.sum())
        weighted_x, weighted_y = (x, y) if weights is None else (x * weights[:, None], y * weights[:, None])
        self.x += weighted_x.sum(1, keepdim=True)
        self.y += weighted_y.sum(1, keepdim=True)
        self.xy += weighted_x.transpose(1, 2) @ y
        self.yy += (weighted_y * y).sum(1)
        if with_xx:
            self.xx += weighted_x.transpose(1, 2) @ x

    def centred(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Covariances (not divided by a count): xx, xy, yy about the true means."""
        n = max(self.count, 1e-12)
        xx = self.xx - self.x.transpose(1, 2) @ self.x / n
        xy = self.xy - self.x.transpose(1, 2) @ self.y / n
        return xx, xy, (self.yy - self.y.square().squeeze(1) / n).clamp_min(0)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean input (systems, 1, unknowns) and mean answer (systems, 1, outputs)."""
        n = max(self.count, 1e-12)
        return self.x0 + self.x / n, self.y0 + self.y / n

    def penalised(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs' covariances with the penalty of `solve_ridge` on their diagonal, and that penalty alone.

        Shapes (systems, unknowns, unknowns) and (systems, 1, 1).
        """
        xx = self.centred()[0]
        scale = xx.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        penalty = ridge * scale + 1e-9 * scale + 1e-12
        return xx + penalty * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device), penalty


@dataclass(frozen=True)
class Solution:
    """Weights (systems, unknowns, outputs), intercept (systems, 1, outputs), and the share of variance they miss."""

    weights: torch.Tensor
    intercept: torch.Tensor
    missed_before: float
    missed: float


def solve_ridge(
    moments: Moments,
    start: torch.Tensor,
    start_intercept: torch.Tensor,
    ridge: float,
    shared: int = 1,
    enough: float = 0.0,
) -> Solution:
    """Minimise |y - x w - b|^2 + ridge * scale * |w - start|^2 over w and a free intercept b.

    Args:
        start: (systems, unknowns, outputs), the weights to stay near.
        start_intercept: (systems, 1, outputs), only used to say what `start` misses.
        ridge: relative to `scale`, the mean diagonal of the inputs' centred second moments.
        shared: so many neighbouring outputs have one intercept: the mean of theirs, and the weights are solved for it.
        enough: where `start` misses a smaller share than this it is the solution, and nothing is solved.
    """
    xx, xy, yy = moments.centred()
    begin, begin_intercept = start.double(), start_intercept.double()
    x_mean, y_mean = (m.double() for m in moments.means())

    def missed(with_weights: torch.Tensor, with_intercept: torch.Tensor) -> float:
        offset = y_mean - x_mean @ with_weights - with_intercept
        squares = _missed(xx, xy, yy, with_weights) + float(moments.count * offset.square().sum())
        return squares / float(yy.sum().clamp_min(1e-12))

    before = missed(begin, begin_intercept)
    if before < enough:
        return Solution(begin, begin_intercept, before, before)
    penalised, penalty = moments.penalised(ridge)
    weights = begin + torch.linalg.solve(penalised, xy - xx @ begin)
    intercept = y_mean - x_mean @ weights
    if shared > 1:
        intercept = intercept.unflatten(2, (-1, shared)).mean(3).repeat_interleave(shared, dim=2)
        about_zero = xx + moments.count * x_mean.transpose(1, 2) @ x_mean
        answers = xy + moments.count * x_mean.transpose(1, 2) @ (y_mean - intercept)
        diagonal = penalty * torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
        weights = begin + torch.linalg.solve(about_zero + diagonal, answers - about_zero @ begin)
    return Solution(weights, intercept, before, missed(weights, intercept))


def _missed(xx: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor, weights: torch.Tensor) -> float:
    """Sum of squared errors of centred data under `weights`."""
    explained = (weights * (2 * xy - xx @ weights)).sum()
    return float((yy.sum() - explained).clamp_min(0))


def solve_by_output(
    x: torch.Tensor,
    pull: torch.Tensor,
    weights: torch.Tensor,
    away: torch.Tensor,
    factor: torch.Tensor,
    penalty: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to add to weights w and intercept b where each observation counts differently for each output.

    Minimises sum(weights * a^2 / 2 - pull * a) + penalty * |away + dw|^2 / 2, where a = x dw + db, by conjugate
    gradients, all outputs at once, preconditioned by the system that the outputs would share if they counted alike: one
    factorisation in place of one for every output. Where w misses r, `pull` is weights * r for least squares.

    Args:
        x: (systems, observations, unknowns), about their mean.
        pull, weights: (systems, observations, outputs); the weights above zero, of one mean for all outputs.
        away: (systems, unknowns, outputs), w less the weights to stay near.
        factor: Cholesky factor of the shared system, (systems, unknowns, unknowns), float64; its `penalty`.

    Returns:
        dw (systems, unknowns, outputs) and db (systems, 1, outputs).
    """
    penalty = penalty.to(x.dtype)
    total = weights.sum(1, keepdim=True)
    down, down_0 = x.transpose(1, 2) @ pull - penalty * away, pull.sum(1, keepdim=True)
    found, found_0 = torch.zeros_like(down), torch.zeros_like(down_0)

    def preconditioned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = torch.cholesky_solve(down.to(factor.dtype), factor).to(x.dtype)
        z_0 = down_0 / total
        return z, z_0, (down * z).sum(1, keepdim=True) + down_0 * z_0

    along, along_0, size = preconditioned()
    for step in range(steps):
        seen = weights * (x @ along + along_0)
        change, change_0 = x.transpose(1, 2) @ seen + penalty * along, seen.sum(1, keepdim=True)
        curvature = (along * change).sum(1, keepdim=True) + along_0 * change_0
        length = size / curvature.clamp_min(1e-30)
        found, found_0 = found + length * along, found_0 + length * along_0
        if step + 1 < steps:
            down, down_0 = down - length * change, down_0 - length * change_0
            z, z_0, now = preconditioned()
            along, along_0 = z + now / size.clamp_min(1e-30) * along, z_0 + now / size.clamp_min(1e-30) * along_0
            size = now
    return found, found_0
