"""What the tracer knows of a tensor: which channel each of its elements belongs to, and what a removed one holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

FIXED = -1  # the atom of a channel nobody may remove (the image's, or one behind an unknown operation)
ZEROS = -2  # in place of an atom: zero whatever is removed (padding, the rest of a new tensor)


class State(IntEnum):
    """What a tensor holds where a channel is removed, which is masked behind its norm and activation.

    FRESH: a convolution's output before its activation, masked there or later. ZERO: zero. APART: some number, but
    every channel depends on itself alone, so that multiplying by a zero channel still gives zero.
    """

    FRESH = 0
    ZERO = 1
    APART = 2


@dataclass(frozen=True)
class Label:
    """Atoms of a tensor's elements: as many dimensions, each as long as the tensor's or 1 where atoms are equal."""

    atoms: np.ndarray
    state: State = State.ZERO

    @property
    def varying(self) -> tuple[int, ...]:
        """Dimensions along which the atoms differ."""
        return tuple(d for d, n in enumerate(self.atoms.shape) if n > 1)

    def along(self, dim: int, size: int) -> np.ndarray | None:
        """Atoms along one dimension of `size`, shape (size,); None where they differ along another one too."""
        if any(d != dim for d in self.varying):
            return None
        return np.broadcast_to(self.atoms.reshape(-1), (size,))


def compact(atoms: np.ndarray) -> np.ndarray:
    """The same with length 1 wherever all atoms along a dimension are equal; `ZEROS` are equal to anything."""
    for dim, size in enumerate(atoms.shape):
        if size > 1:
            if atoms.strides[dim] == 0:
                atoms = atoms.take([0], dim)
                continue
            top = atoms.max(axis=dim, keepdims=True)
            if ((atoms == top) | (atoms == ZEROS)).all():
                atoms = top
    return atoms


@dataclass
class Atoms:
    """Union-find over atoms; a frozen class carries the reason it was frozen for."""

    parent: list[int] = field(default_factory=list)
    why: dict[int, str] = field(default_factory=dict)

    def new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        for atom in np.unique(atoms).tolist():
            if atom >= 0:
                self.why.setdefault(self.find(atom), reason)

    def couple(self, a: np.ndarray, b: np.ndarray, reason: str) -> np.ndarray:
        """Make the atoms of `a` and `b` (equal shape) one class each; a fixed partner freezes the other.

        Where one side is `ZEROS`, the other stays what it is.
        """
        apart = (a != b) & (a != ZEROS) & (b != ZEROS)
        pairs = set(zip(a[apart].tolist(), b[apart].tolist(), strict=True)) if a is not b and apart.any() else ()
        for left, right in map(sorted, pairs):
            if left == FIXED:
                self.why.setdefault(self.find(right), reason)
                continue
            low, high = sorted((self.find(left), self.find(right)))
            if low != high:
                self.parent[high] = low
                if high in self.why:
                    self.why.setdefault(low, self.why.pop(high))
        found: np.ndarray = np.maximum(a, b)  # a fixed channel takes the (now frozen) partner's identity
        return found
