"""The layer table: which convolutions can lose channels, together with whom, and for the others the reason why not.

Built once per model from one trace. Removing channels afterwards needs no second trace: every convolution, batch norm
and linear layer carries, per channel, the *class* it belongs to (channels of one class leave together), so a plan comes
down to one boolean per class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from torch import nn

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
ALWAYS = 0  # the class of every channel that is never removed

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """One convolution of the network, as a row for people. `reason` is empty where `prunable`."""

    name: str
    block: int
    group: int
    out_channels: int
    prunable: bool
    reason: str


@dataclass(frozen=True)
class Group:
    """Layers that lose channels together: one free ratio.

    `parts` are arrays of classes, shape (channels of the part,). All parts keep the same proportion; within a part any
    channels may be chosen. A C2f's first convolution gives two parts, the halves that `chunk` cuts it into.
    `channels` counts the first part.
    """

    id: int
    name: str
    block: int
    layers: tuple[str, ...]
    parts: tuple[np.ndarray, ...]

    @property
    def channels(self) -> int:
        return len(self.parts[0])

    def widths(self, round_to: int = 8) -> tuple[int, ...]:
        """Every width the first part may have: the unpruned one, then multiples of `round_to`, descending."""
        whole = self.channels
        fits = (w for w in range(whole - 1, 0, -1) if w % round_to == 0)
        return (whole, *(w for w in fits if all(len(p) * w % whole == 0 for p in self.parts)))

    def kept_per_part(self, width: int) -> tuple[int, ...]:
        """Channels that stay in each part when the first part keeps `width`."""
        return tuple(len(p) * width // self.channels for p in self.parts)


@dataclass(frozen=True)
class ConvChannels:
    """Classes of a convolution's channels, shapes (out,) and (in,); equal arrays for a depthwise one."""

    outputs: np.ndarray
    inputs: np.ndarray
    depthwise: bool


@dataclass(frozen=True)
class LayerTable:
    """Everything that surgery needs to know about one model; built by `build_layer_table`."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    convs: dict[str, ConvChannels]  # by the convolution's name in the model, in execution order
    norms: dict[str, np.ndarray]
    linears: dict[str, np.ndarray]  # inputs of linear layers
    features: dict[str, np.ndarray]  # outputs of linear layers
    vectors: dict[
        str, tuple[int, np.ndarray]
    ]  # other parameters and buffers with a number per channel: along which dim
    attributes: tuple[tuple[str, str, np.ndarray], ...]
    scalings: tuple[tuple[str, np.ndarray, np.ndarray, float], ...]
    """(batch norm or linear layer, classes that it gives, others, power): what it gives of these classes is to be
    multiplied by the share of the others that stays, to that power, since what follows divides by a root of their
    number."""
    class_count: int
    layer_of: dict[str, str]  # convolution's name -> layer's name

    @cached_property
    def group_of(self) -> dict[str, Group]:
        """Layer name -> its group, for prunable layers."""
        return {name: g for g in self.groups for name in g.layers}

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def left(self, stays: np.ndarray) -> LayerTable:
        """The table of the network that keeps the classes `stays`, bool (class_count,); classes go by their names.

        `layers` says the unpruned widths still.
        """

        def of(classes: np.ndarray) -> np.ndarray:
            return classes[stays[classes]]

        return replace(
            self,
            groups=tuple(replace(group, parts=tuple(of(part) for part in group.parts)) for group in self.groups),
            convs={n: ConvChannels(of(c.outputs), of(c.inputs), c.depthwise) for n, c in self.convs.items()},
            norms={name: of(classes) for name, classes in self.norms.items()},
            linears={name: of(classes) for name, classes in self.linears.items()},
            features={name: of(classes) for name, classes in self.features.items()},
            vectors={name: (dim, of(classes)) for name, (dim, classes) in self.vectors.items()},
            attributes=tuple((name, attribute, of(classes)) for name, attribute, classes in self.attributes),
            scalings=tuple((n, of(classes), of(counted), power) for n, classes, counted, power in self.scalings),
        )

    def renamed(self, name_after: Callable[[str], str | None]) -> LayerTable:
        """What a refit needs of a network whose modules have other names; those without one are gone from it."""

        def of(found: dict[str, T]) -> dict[str, T]:
            return {new: value for name, value in found.items() if (new := name_after(name)) is not None}

        return replace(self, convs=of(self.convs), linears=of(self.linears), features=of(self.features))

    @property
    def fingerprint(self) -> str:
        """Identity of the architecture (names and widths), 16 hex digits."""
        text = ";".join(f"{x.name}:{x.out_channels}:{x.group}" for x in self.layers)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_rows(self) -> list[dict[str, object]]:
        """Rows with keys layer, block, group, out_channels, prunable, reason (group is None where not prunable)."""
        return [
            {
                "layer": x.name,
                "block": x.block,
                "group": x.group if x.prunable else None,
                "out_channels": x.out_channels,
                "prunable": x.prunable,
                "reason": x.reason,
            }
            for x in self.layers
        ]


def prunable_share(model: nn.Module, table: LayerTable) -> float:
    """Share of the convolutions' weights that lie in layers that can lose channels, in [0, 1]."""
    sizes = {n: m.weight.numel() for n in table.layer_of if isinstance(m := model.get_submodule(n), CONVOLUTIONS)}
    return sum(size for n, size in sizes.items() if table.layer_of[n] in table.group_of) / sum(sizes.values())
