"""From a trace to the layer table: which channels leave together, and for the others the reason why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
from torch import nn
from ultralytics.nn.modules.conv import Conv, ConvTranspose

from paretoprune.pruning.graph.labels import FIXED
from paretoprune.pruning.graph.layers import ALWAYS, CONVOLUTIONS, ConvChannels, Group, Layer, LayerTable
from paretoprune.pruning.graph.tracer import ChannelTracer


def table_of(model: nn.Module, tracer: ChannelTracer, classes: np.ndarray, frozen: dict[int, str]) -> LayerTable:
    """The table; `classes` and `frozen` as `number_classes` gives them."""
    parts = _parts(tracer, classes)
    reasons = _spread_reasons(tracer, classes, parts, frozen)
    layer_of = _layer_names(model)
    widths = {n: m.out_channels for n in layer_of if isinstance(m := model.get_submodule(n), CONVOLUTIONS)}
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


def number_classes(tracer: ChannelTracer) -> tuple[np.ndarray, dict[int, str]]:
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
        if isinstance(module, CONVOLUTIONS):
            parent = model.get_submodule(name.rpartition(".")[0])
            wrapped = isinstance(parent, (Conv, ConvTranspose)) and name.endswith((".conv", ".conv_transpose"))
            names[name] = name.rpartition(".")[0] if wrapped else name
    return names
