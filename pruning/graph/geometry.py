"""The shape of a network as plain data: what each convolution costs at any widths, without torch or the network.

Taken once from the unpruned network (`pruning.graph.geometry_reading`), it goes through JSON into a run's
`baseline.json`, and serves wherever thousands of plans must be judged before any is applied: parameters, operations,
latency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from paretoprune.base.image_size import ImageSize, area_of, plain_size, read_size
from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.plan import Plan

FloatArray = npt.NDArray[np.float64]

FIXED = -1  # in place of a group's id: channels that no plan removes
_NORM_WEIGHTS = 2  # per channel
_NORM_OPERATIONS = 8  # per channel and position, as Ultralytics' counter (THOP) has it

Channels = tuple[tuple[int, int], ...]
"""(group id, how many of a side's channels belong to it at full width)."""


@dataclass(frozen=True)
class GroupGeometry:
    """Layers that lose channels together, and how many the group's first part has."""

    name: str
    layers: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class ConvGeometry:
    """One convolution at full width, over all its calls in one forward pass of one image.

    `area`: weights per pair of channels (kernel height x width). `weight_uses`: positions at which each weight is used.
    `in_pixels`, `out_pixels`: positions read and written. `conv_groups`: torch's `groups`; where `depthwise`, it
    follows the width.
    """

    name: str
    outputs: Channels
    inputs: Channels
    area: int
    weight_uses: int
    in_pixels: int
    out_pixels: int
    conv_groups: int
    depthwise: bool
    bias: bool


@dataclass(frozen=True)
class NormGeometry:
    """One batch norm: its channels, and the positions it runs at (0 where only training reaches it)."""

    channels: Channels
    pixels: int
    name: str = ""


@dataclass(frozen=True)
class LinearGeometry:
    """One linear layer: the features it reads and writes."""

    inputs: Channels
    outputs: Channels
    bias: bool = False
    name: str = ""


@dataclass(frozen=True)
class MergeGeometry:
    """What a convolution reads less when all of these branches are removed; negative counts: it reads these instead."""

    branches: tuple[str, ...]
    conv: str
    channels: Channels


@dataclass(frozen=True)
class NetworkGeometry:
    """A network on images of `imgsz`; `params` and `gflops` are the unpruned one's, counted by Ultralytics."""

    imgsz: ImageSize
    params: int
    gflops: float
    groups: tuple[GroupGeometry, ...]
    convs: tuple[ConvGeometry, ...]
    norms: tuple[NormGeometry, ...]
    linears: tuple[LinearGeometry, ...]
    vectors: tuple[Channels, ...] = ()  # further parameters with a number per channel
    branches: tuple[str, ...] = ()  # that can be removed whole
    merges: tuple[MergeGeometry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {**asdict(self), "imgsz": plain_size(self.imgsz)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkGeometry:
        """Inverse of `to_json`. Raises `PlanError` for anything else."""
        try:
            return cls(
                imgsz=read_size(data["imgsz"]),
                params=int(data["params"]),
                gflops=float(data["gflops"]),
                groups=tuple(GroupGeometry(g["name"], tuple(g["layers"]), int(g["channels"])) for g in data["groups"]),
                convs=tuple(
                    ConvGeometry(**{**c, "outputs": _channels(c["outputs"]), "inputs": _channels(c["inputs"])})
                    for c in data["convs"]
                ),
                norms=tuple(
                    NormGeometry(_channels(n["channels"]), int(n["pixels"]), n.get("name", "")) for n in data["norms"]
                ),
                linears=tuple(_linear(x) for x in data["linears"]),
                vectors=tuple(_channels(v) for v in data.get("vectors", ())),
                branches=tuple(data.get("branches", ())),
                merges=tuple(
                    MergeGeometry(tuple(m["branches"]), m["conv"], _channels(m["channels"]))
                    for m in data.get("merges", ())
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"the network's geometry is not readable ({error!r}); measure the baseline again."
            ) from None

    def shares(self, plans: Sequence[Plan | Mapping[str, float]]) -> FloatArray:
        """What stays: each group's share of its channels, then each branch (1; 0 where it is removed).

        Shape (plans, groups + branches); ratios are realised ones, by layer.

        Raises `PlanError` for a layer that is in no group, or a branch that the network does not have.
        """
        shares = np.ones((len(plans), len(self.groups) + len(self.branches)))
        for row, given in zip(shares, plans, strict=True):
            plan = given if isinstance(given, Plan) else Plan(given)
            for layer, ratio in plan.ratios.items():
                group = self._group_of.get(layer)
                if group is None:
                    raise PlanError(f"{layer} is no prunable layer of this model; the plan is for another one.")
                channels = self.groups[group].channels
                row[group] = round(channels * (1 - ratio)) / channels
            for branch in plan.branches:
                if branch not in self.branches:
                    raise PlanError(f"{branch} is no branch of this model; the plan is for another one.")
                row[len(self.groups) + self.branches.index(branch)] = 0
        return shares

    @property
    def whole(self) -> FloatArray:
        """`shares` of the unpruned network."""
        return np.ones((1, len(self.groups) + len(self.branches)))

    def runs(self, shares: FloatArray) -> FloatArray:
        """Which convolutions are left (1, else 0), shape (plans, convs)."""
        return self._left([conv.name for conv in self.convs], shares)

    def widths(self, shares: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Output and input channels of every convolution, shapes (plans, convs) each; of a depthwise one both alike.

        Zero for one that is gone.
        """
        kept, left = self._kept(shares), self.runs(shares)
        outputs, inputs = np.rint(kept @ self._outputs.T), np.rint(kept @ self._inputs.T)
        for merge, less in zip(self.merges, np.rint(kept @ self._merged.T).T, strict=True):
            places = [len(self.groups) + self.branches.index(branch) for branch in merge.branches]
            inputs[:, self._place_of[merge.conv]] -= less * (shares[:, places] == 0).all(axis=1)
        return outputs * left, inputs * left

    def weights(self, shares: FloatArray) -> FloatArray:
        """Weights of every convolution, biases not counted, shape (plans, convs)."""
        outputs, inputs = self.widths(shares)
        return outputs * np.where(self.depthwise, 1.0, inputs) * self._weights_per_pair

    def macs(self, shares: FloatArray) -> FloatArray:
        """Multiply-adds of every convolution for one image, shape (plans, convs)."""
        return self.weights(shares) * np.array([c.weight_uses for c in self.convs], dtype=np.float64)

    def costs(self, shares: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Parameters in millions (exact) and GFLOPs (without what has no weights), shapes (plans,)."""
        params = self.params - (self._params(self.whole) - self._params(shares))
        operations = self._operations(self.whole) - self._operations(shares)
        return params / 1e6, self.gflops - operations / 1e9

    def at(self, imgsz: ImageSize | None) -> NetworkGeometry:
        """The same network on inputs of another size; None: this one's own.

        Positions and operations grow with the input's area, but for what comes after a global pooling.
        """
        if imgsz is None or imgsz == self.imgsz:
            return self
        if imgsz not in self._others:
            area = area_of(imgsz) / area_of(self.imgsz)

            def scaled(count: int) -> int:
                return count if count <= 1 else round(count * area)

            convs = (
                replace(
                    conv,
                    weight_uses=scaled(conv.weight_uses),
                    in_pixels=scaled(conv.in_pixels),
                    out_pixels=scaled(conv.out_pixels),
                )
                for conv in self.convs
            )
            norms = (replace(norm, pixels=scaled(norm.pixels)) for norm in self.norms)
            self._others[imgsz] = replace(
                self, imgsz=imgsz, gflops=self.gflops * area, convs=tuple(convs), norms=tuple(norms)
            )
        return self._others[imgsz]

    @cached_property
    def _others(self) -> dict[ImageSize, NetworkGeometry]:
        return {}

    @property
    def layers(self) -> Set[str]:
        """Every prunable layer's name."""
        return self._group_of.keys()

    @cached_property
    def depthwise(self) -> npt.NDArray[np.bool_]:
        """Which convolutions are depthwise, shape (convs,)."""
        return np.array([c.depthwise for c in self.convs], dtype=bool)

    def _params(self, shares: FloatArray) -> FloatArray:
        outputs, _ = self.widths(shares)
        kept = self._kept(shares)
        biases = outputs @ np.array([c.bias for c in self.convs], dtype=np.float64)
        norms = _NORM_WEIGHTS * self._normed(shares).sum(axis=1)
        vectors = np.rint(kept @ _counts(self.vectors, len(self.groups)).T).sum(axis=1)
        read, written = self._linear_widths(shares)
        features = written @ np.array([x.bias for x in self.linears], dtype=np.float64)
        return np.asarray(
            self.weights(shares).sum(axis=1) + biases + norms + vectors + features + (read * written).sum(axis=1)
        )

    def _operations(self, shares: FloatArray) -> FloatArray:
        places = np.array([n.pixels for n in self.norms], dtype=np.float64)
        norms = _NORM_OPERATIONS * self._normed(shares) @ places
        read, written = self._linear_widths(shares)
        return np.asarray(2 * self.macs(shares).sum(axis=1) + norms + 2 * (read * written).sum(axis=1))

    def _kept(self, shares: FloatArray) -> FloatArray:
        """Share of every group's channels, that of the fixed ones last, shape (plans, groups + 1)."""
        return np.hstack([shares[:, : len(self.groups)], np.ones((len(shares), 1))])

    def _left(self, names: Sequence[str], shares: FloatArray) -> FloatArray:
        """Which modules are outside every removed branch (1, else 0), shape (plans, names)."""
        inside = np.array([[n.startswith(f"{b}.") for n in names] for b in self.branches], dtype=np.float64)
        gone = 1 - shares[:, len(self.groups) :]
        return np.asarray(gone @ inside.reshape(len(self.branches), len(names)) == 0, dtype=np.float64)

    def _normed(self, shares: FloatArray) -> FloatArray:
        """Channels of every batch norm, shape (plans, norms)."""
        return np.rint(self._kept(shares) @ self._norms.T) * self._left([n.name for n in self.norms], shares)

    def _linear_widths(self, shares: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Features that every linear layer reads and writes, shapes (plans, linears) each."""
        kept, left = self._kept(shares), self._left([x.name for x in self.linears], shares)
        read = np.rint(kept @ _counts([x.inputs for x in self.linears], len(self.groups)).T)
        return read, np.rint(kept @ self._features.T) * left

    @cached_property
    def _merged(self) -> FloatArray:
        return _counts([m.channels for m in self.merges], len(self.groups))

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {conv.name: place for place, conv in enumerate(self.convs)}

    @cached_property
    def _group_of(self) -> dict[str, int]:
        return {layer: i for i, group in enumerate(self.groups) for layer in group.layers}

    @cached_property
    def _weights_per_pair(self) -> FloatArray:
        return np.array([c.area / (1 if c.depthwise else c.conv_groups) for c in self.convs])

    @cached_property
    def _outputs(self) -> FloatArray:
        return _counts([c.outputs for c in self.convs], len(self.groups))

    @cached_property
    def _inputs(self) -> FloatArray:
        return _counts([c.inputs for c in self.convs], len(self.groups))

    @cached_property
    def _norms(self) -> FloatArray:
        return _counts([n.channels for n in self.norms], len(self.groups))

    @cached_property
    def _features(self) -> FloatArray:
        return _counts([x.outputs for x in self.linears], len(self.groups))


def _linear(data: Mapping[str, Any]) -> LinearGeometry:
    outputs = data["outputs"]  # a number where nothing of it could be removed, as it was written once
    written = ((FIXED, outputs),) if isinstance(outputs, int) else _channels(outputs)
    return LinearGeometry(_channels(data["inputs"]), written, bool(data.get("bias", False)), data.get("name", ""))


def _channels(pairs: Sequence[Sequence[int]]) -> Channels:
    return tuple((int(group), int(count)) for group, count in pairs)


def _counts(sides: Sequence[Channels], groups: int) -> FloatArray:
    """Channels of every side by group, the fixed ones last, shape (sides, groups + 1)."""
    counts = np.zeros((len(sides), groups + 1))
    for row, side in zip(counts, sides, strict=True):
        for group, count in side:
            row[group] += count  # FIXED is the last column
    return counts
