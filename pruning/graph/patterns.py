"""Which of several keys, names of layers and patterns of names (`model.4.*`), a layer goes by. No torch here."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from fnmatch import fnmatchcase


def means(key: str, layer: str, names: Container[str]) -> bool:
    """Whether a key is the layer's name or a pattern that fits it; a key in `names`, those of all layers, is a name."""
    return key == layer if key in names else fnmatchcase(layer, key)


def governing(keys: Iterable[str], layers: Sequence[str], names: Container[str]) -> str | None:
    """The key that `layers`, which lose their channels together, go by; None where no key means any of them.

    A name beats a pattern, a longer pattern (in characters) a shorter one, and of two equal ones the later counts.
    """
    found = [key for key in keys if any(means(key, layer, names) for layer in layers)]
    ranks = {key: (key in names, 0 if key in names else len(key), position) for position, key in enumerate(found)}
    return max(ranks, key=lambda key: ranks[key], default=None)
