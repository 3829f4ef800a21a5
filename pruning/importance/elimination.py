"""In which order inputs of least-squares problems are best given up, the remaining weights refitted each time.

Removing the inputs I of a convolution and refitting the rest optimally adds w_I' ((H^-1)_II)^-1 w_I to its squared
error, H the inputs' second moments (optimal brain surgeon: Hassibi and Stork 1993, for blocks of inputs). So the cost
of every candidate comes from one inverse, and after a removal the inverse of what is left is a Schur complement away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_DENSE = 0.7  # with a smaller share of the inputs left, a reader's matrices are packed anew


@dataclass
class Reader:
    """What reads the classes: a least-squares problem, changed in place while its inputs leave.

    Attributes:
        inverse: of all inputs' second moments, with what keeps them regular: the rows and columns of those inputs that
            may leave; shape (inputs, inputs).
        weights: their weights, shape (inputs, outputs), each output scaled by the root of what a squared error costs.
        places: per class, the inputs that leave with it; every input is in one.
    """

    inverse: torch.Tensor
    weights: torch.Tensor
    places: dict[int, list[int]]

    def costs(self) -> dict[int, float]:
        """Per class, what its removal adds to the squared error."""
        by_size: dict[int, list[int]] = {}
        for name, inputs in self.places.items():
            by_size.setdefault(len(inputs), []).append(name)
        found: dict[int, float] = {}
        for names in by_size.values():
            rows = torch.tensor([self.places[name] for name in names], device=self.weights.device)
            block, weights = self.inverse[rows[:, :, None], rows[:, None, :]], self.weights[rows]
            added = (weights * torch.linalg.solve(block, weights)).sum((1, 2))
            found.update(zip(names, added.tolist(), strict=True))
        return found

    def remove(self, classes: Sequence[int]) -> None:
        """Take the classes' inputs out and refit the rest; classes that are not read here are passed over."""
        rows = [i for name in classes for i in self.places.pop(name, ())]
        if not rows or not self.places:
            return
        index = torch.tensor(rows, device=self.weights.device)
        columns = self.inverse[:, index]
        block = columns[index]
        # In place, the rows of what has left become zero and are dropped now and then: copies cost more than products
        self.weights.addmm_(columns, torch.linalg.solve(block, self.weights[index]), alpha=-1)
        self.inverse.addmm_(columns, torch.linalg.solve(block, columns.T), alpha=-1)
        stay = [i for inputs in self.places.values() for i in inputs]
        if len(stay) <= _DENSE * len(self.weights):
            kept = torch.tensor(stay, device=self.weights.device)
            self.weights, self.inverse = self.weights[kept], self.inverse[kept][:, kept]
            moved = iter(range(len(stay)))
            self.places = {name: [next(moved) for _ in inputs] for name, inputs in self.places.items()}


def removal_errors(readers: Sequence[Reader], parts: Sequence[np.ndarray], rounds: int) -> dict[int, float]:
    """Give up all classes of `parts`, the cheapest first; what each added when it went, never less than one before it.

    Args:
        readers: changed. parts: classes of one group; each part keeps the same proportion, so each loses its share
            of every round.
        rounds: how many removals with a new look at the costs; more is finer and slower.
    """
    left = [[int(c) for c in part] for part in parts]
    portions = [max(1, -(-len(part) // rounds)) for part in parts]
    least = [0.0] * len(left)
    losses: dict[int, float] = {}
    while any(left):
        costs: dict[int, float] = {}
        for reader in readers:
            for name, added in reader.costs().items():
                costs[name] = costs.get(name, 0.0) + added
        gone: list[int] = []
        for k, members in enumerate(left):
            for name in sorted(members, key=lambda c: costs.get(c, 0.0))[: portions[k]]:
                least[k] = max(least[k], costs.get(name, 0.0))
                losses[name] = least[k]
                gone.append(name)
            left[k] = [c for c in members if c not in losses]
        for reader in readers:
            reader.remove(gone)
    return losses
