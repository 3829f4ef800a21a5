"""The layer table: which convolutions can lose channels, together with whom, and for the others the reason why not.

Built once per model from one trace. Removing channels afterwards needs no second trace: every convolution, batch norm
and linear layer carries, per channel, the *class* it belongs to (channels of one class leave together), so a plan comes
down to one boolean per class.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn
from ultralytics.nn.modules.conv import Conv, ConvTranspose

from paretoprune.pruning.graph.labels import FIXED
from paretoprune.pruning.graph.tracer import ChannelTracer, trace

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
ALWAYS = 0  # the class of every channel that is never removed


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


def build_layer_table(model: nn.Module) -> LayerTable:
    """Trace a task model and group its channels. The model is not touched; takes a fraction of a second.

    The network is traced twice, the second time narrower: what then reads other channels than the first trace says has
    a width stored somewhere, and is frozen.
    """
    from paretoprune.pruning.surgery.trace_check import misread

    tracer = trace(model)
    while True:
        classes, frozen = _number_classes(tracer)
        table = _table_of(model, tracer, classes, frozen)
        if not misread(model, tracer, table, classes):
            return table


def _table_of(model: nn.Module, tracer: ChannelTracer, classes: np.ndarray, frozen: dict[int, str]) -> LayerTable:
    parts = _parts(tracer, classes)
    reasons = _spread_reasons(tracer, classes, parts, frozen)
    layer_of = _layer_names(model)
    widths = {n: m.out_channels for n in layer_of if isinstance(m := model.get_submodule(n), _CONVOLUTIONS)}
    why = {c: reasons[k] for k, members in enumerate(parts) if k in reasons for c in members.tolist()}
    groups = _groups(tracer, classes, parts, reasons, layer_of)
    convs = {
        n: ConvChannels(classes[c.outputs], classes[c.inputs if c.inputs is not None else c.outputs], c.depthwise)
        for n, c in tracer.convs.items()
    }
    return LayerTable(
        layers=_rows(convs, groups, why, layer_of, widths, tracer.refused),
        groups=groups,
        convs=convs,
        norms={n: classes[a] for n, a in tracer.norms.items()},
        linears={n: classes[a] for n, a in tracer.linears.items()},
        features={n: classes[a] for n, a in tracer.features.items()},
        vectors={n: (v.dim, classes[v.atoms]) for n, v in tracer.vectors.items()},
        scalings=tuple((m, classes[a], classes[counted], p) for m, a, counted, p in _once(tracer.scalings)),
        attributes=tuple((m, a, classes[atoms]) for m, a, atoms in tracer.attributes),
        class_count=int(classes.max()) + 1,
        layer_of=layer_of,
    )


def _once(
    scalings: list[tuple[str, np.ndarray, np.ndarray, float]],
) -> Iterable[tuple[str, np.ndarray, np.ndarray, float]]:
    """One of each module: every forward pass meets them all."""
    return {scaling[0]: scaling for scaling in scalings}.values()


def prunable_share(model: nn.Module, table: LayerTable) -> float:
    """Share of the convolutions' weights that lie in layers that can lose channels, in [0, 1]."""
    sizes = {n: m.weight.numel() for n in table.layer_of if isinstance(m := model.get_submodule(n), _CONVOLUTIONS)}
    return sum(size for n, size in sizes.items() if table.layer_of[n] in table.group_of) / sum(sizes.values())


def _number_classes(tracer: ChannelTracer) -> tuple[np.ndarray, dict[int, str]]:
    """Class per atom (the last entry, reached by index -1, is the fixed one), and the reasons of frozen classes."""
    roots: dict[int, int] = {}
    classes = np.zeros(len(tracer.atoms.parent) + 1, dtype=np.int64)
    for atom in range(len(tracer.atoms.parent)):
        classes[atom] = roots.setdefault(tracer.atoms.find(atom), len(roots) + 1)
    classes[FIXED] = ALWAYS
    return classes, {roots[root]: why for root, why in tracer.atoms.why.items()}


def _parts(tracer: ChannelTracer, classes: np.ndarray) -> list[np.ndarray]:
    """Partition the classes: same convolutions and same pieces of chunks means freely interchangeable."""
    signature: dict[int, set[object]] = defaultdict(set)
    for name, conv in tracer.convs.items():
        for c in np.unique(classes[conv.outputs]):
            signature[int(c)].add(name)
    for k, piece in enumerate(tracer.pieces):
        for c in np.unique(classes[piece]):
            signature[int(c)].add(k)
    signature.pop(ALWAYS, None)
    found: dict[frozenset[object], list[int]] = defaultdict(list)
    for c in sorted(signature):
        found[frozenset(signature[c])].append(c)
    return [np.array(members) for members in found.values()]


def _part_of(parts: list[np.ndarray], class_count: int) -> np.ndarray:
    part_of = np.full(class_count, -1)
    for k, members in enumerate(parts):
        part_of[members] = k
    return part_of


def _spread_reasons(
    tracer: ChannelTracer, classes: np.ndarray, parts: list[np.ndarray], frozen: dict[int, str]
) -> dict[int, str]:
    """Reason per frozen part. One frozen channel freezes its part, and every part tied to it."""
    reasons = {k: frozen[c] for k, members in enumerate(parts) for c in members.tolist() if c in frozen}
    part_of = _part_of(parts, int(classes.max()) + 1)
    changed = True
    while changed:
        changed = False
        for left, right in tracer.ties:
            ends = set(part_of[classes[np.concatenate([left, right])]].tolist())
            why = next((reasons[p] for p in sorted(ends) if p in reasons), None)
            if -1 in ends:
                why = why or "it is cut into pieces beside channels that must stay"
            for p in ends - {-1}:
                if why and p not in reasons:
                    reasons[p], changed = why, True
    return reasons


def _groups(
    tracer: ChannelTracer,
    classes: np.ndarray,
    parts: list[np.ndarray],
    reasons: dict[int, str],
    layer_of: dict[str, str],
) -> tuple[Group, ...]:
    """Join the free parts that share a convolution or are tied; name each group after its first layer."""
    part_of = _part_of(parts, int(classes.max()) + 1)
    free = [k for k in range(len(parts)) if k not in reasons]
    sets = {k: {k} for k in free}
    owners: dict[int, list[str]] = defaultdict(list)
    links = [np.concatenate([a, b]) for a, b in tracer.ties]
    for name, conv in tracer.convs.items():
        links.append(conv.outputs)
        for k in set(part_of[classes[conv.outputs]].tolist()) & set(free):
            owners[k].append(name)
    for atoms in links:
        ends = [k for k in sorted(set(part_of[classes[atoms]].tolist())) if k in sets]
        joined = set().union(*(sets[k] for k in ends)) if ends else set()
        for k in joined:
            sets[k] = joined
    order = {name: i for i, name in enumerate(tracer.convs)}
    found, seen = [], set()
    for k in free:
        if k in seen:
            continue
        members = sorted(sets[k], key=lambda p: int(parts[p][0]))
        seen.update(members)
        names = sorted({layer_of[n] for p in members for n in owners[p]}, key=_first_use(order, layer_of))
        found.append((names, tuple(parts[p] for p in members)))
    found.sort(key=lambda item: _first_use(order, layer_of)(item[0][0]))
    return tuple(Group(i, n[0], _block(n[0]), tuple(n), p) for i, (n, p) in enumerate(found))


def _first_use(order: dict[str, int], layer_of: dict[str, str]) -> Callable[[str], int]:
    position: dict[str, int] = {}
    for name, i in order.items():
        position.setdefault(layer_of[name], i)
    return position.__getitem__


def _rows(
    convs: dict[str, ConvChannels],
    groups: tuple[Group, ...],
    why: dict[int, str],
    layer_of: dict[str, str],
    widths: dict[str, int],
    refused: dict[str, str],
) -> tuple[Layer, ...]:
    group_of = {name: g.id for g in groups for name in g.layers}
    rows = []
    for conv, layer in layer_of.items():
        group = group_of.get(layer, -1)
        reason = "" if group >= 0 else refused.get(conv) or _why_not(convs.get(conv), why)
        rows.append(Layer(layer, _block(layer), group, widths[conv], group >= 0, reason))
    return tuple(rows)


def _why_not(conv: ConvChannels | None, why: dict[int, str]) -> str:
    if conv is None:
        return "no forward pass reaches it"
    found = next((why[c] for c in conv.outputs.tolist() if c in why), "")
    return found or "depthwise on channels that must stay"


def _block(name: str) -> int:
    return int(name.split(".")[1])


def _layer_names(model: nn.Module) -> dict[str, str]:
    """Convolution's name in the model -> layer name: the Ultralytics `Conv` wrapper's where there is one."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            parent = model.get_submodule(name.rpartition(".")[0])
            wrapped = isinstance(parent, (Conv, ConvTranspose)) and name.endswith((".conv", ".conv_transpose"))
            names[name] = name.rpartition(".")[0] if wrapped else name
    return names
