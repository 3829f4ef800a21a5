"""The layer table of a network: traced, and traced again after a cut.

A trace cannot tell a width that follows from one that is stored in a number somewhere: a slice's place, a view's size,
the divisor of a mean. So the network is cut by a made-up plan and traced once more. What it then cannot run, reads from
other channels or computes with other numbers is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from paretoprune.pruning.graph.grouping import number_classes, table_of
from paretoprune.pruning.graph.labels import FIXED
from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.graph.operations import MOVES
from paretoprune.pruning.graph.trace import prepare, run, trace
from paretoprune.pruning.graph.tracer import ChannelTracer, Step
from paretoprune.pruning.surgery.surgery import choose_kept, nearest_width, remove

_STORED = "has its width stored in a number that pruning would not change"


def build_layer_table(model: nn.Module) -> LayerTable:
    """Trace a task model and group its channels. The model is not touched; takes a fraction of a second.

    The network is traced twice, the second time narrower: what then reads other channels than the first trace says has
    a width stored somewhere, and is frozen.
    """
    tracer = trace(model)
    while True:
        classes, frozen = number_classes(tracer)
        table = table_of(model, tracer, classes, frozen)
        if not _misread(model, tracer, table, classes):
            return table


def _misread(model: nn.Module, tracer: ChannelTracer, table: LayerTable, classes: np.ndarray) -> bool:
    """Freeze in `tracer` what a narrower network would misread; whether there was any.

    Args:
        tracer: the trace of `model` that `table` was made from.
        classes: by atom, as in the table.
    """
    rng = np.random.default_rng(0)
    return any(_misread_once(model, tracer, table, classes, rng) for _ in range(3 if tracer.cuts else 1))


def _misread_once(
    model: nn.Module, tracer: ChannelTracer, table: LayerTable, classes: np.ndarray, rng: np.random.Generator
) -> bool:
    narrow = {g.id: nearest_width(g, rng.uniform(0.2, 0.6), 1) for g in table.groups}
    scores = rng.random(table.class_count)
    for part in (p for g in table.groups for p in g.parts):
        scores[part[[0, -1]]] = rng.choice([-1, 1], 2, p=[0.7, 0.3])  # what turns channels around shows at the ends
    stays = choose_kept(table, narrow, scores)
    if stays.all():
        return False
    narrower = prepare(remove(model, table, stays))
    narrower.as_before = tracer.free
    try:
        run(narrower, tracer.shape)
    except Exception:  # noqa: BLE001  anybody's code, at a width that it does not expect
        where = narrower.failed_in or ""
        reason = f"{tracer.described(where)} cannot run narrower: it {_STORED}"
        failed = tracer.steps[len(narrower.steps)] if len(narrower.steps) < len(tracer.steps) else None
        viewed = failed is not None and failed.where == where and failed.name in MOVES  # it alone has such a number
        return _freeze(tracer, failed if failed is not None and viewed else Step(where, "", (), ()), reason)
    there: dict[int, int] = {}
    elsewhere = list(_elsewhere(tracer, classes, narrower, stays, there))
    if _other_steps(tracer, classes, narrower, stays, there):  # says more precisely what it is
        return True
    before = len(tracer.atoms.why)
    for where, atoms in elsewhere:
        reason = f"{tracer.described(where)} reads other channels when narrower: something before it {_STORED}"
        tracer.atoms.freeze(atoms, reason)
    return len(tracer.atoms.why) > before


def _elsewhere(
    tracer: ChannelTracer, classes: np.ndarray, narrower: ChannelTracer, stays: np.ndarray, there: dict[int, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Modules whose channels the two traces name differently, and the atoms there.

    Args:
        there: filled with the narrower trace's atom of each class.
    """
    back: dict[int, int] = {}
    found = dict(_places(narrower))
    for place, atoms in _places(tracer):
        expected = classes[atoms][stays[classes[atoms]]]
        got = np.array([narrower.atoms.find(a) if a >= 0 else FIXED for a in found.get(place, np.array([])).tolist()])
        pairs = list(zip(expected.tolist(), got.tolist(), strict=False))
        if len(expected) != len(got) or any(there.get(c, a) != a or back.get(a, c) != c for c, a in pairs):
            yield place[0], atoms
        else:
            there.update(pairs)
            back.update((a, c) for c, a in pairs)


def _places(tracer: ChannelTracer) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    for name, conv in tracer.convs.items():
        if conv.inputs is not None:
            yield (name, "inputs"), conv.inputs
        yield (name, "outputs"), conv.outputs
    for kind in ("norms", "linears", "features"):
        for name, atoms in getattr(tracer, kind).items():
            yield (name, kind), atoms
    for name, vector in tracer.vectors.items():
        yield (name.rpartition(".")[0], name), vector.atoms


def _other_steps(
    tracer: ChannelTracer, classes: np.ndarray, narrower: ChannelTracer, stays: np.ndarray, there: dict[int, int]
) -> bool:
    """Freeze what does other steps in a narrower network, on other channels, or with numbers made of a width."""
    for step, again in zip(tracer.steps, narrower.steps, strict=False):
        described, stored = tracer.described(step.where), ""
        if (step.where, step.name) != (again.where, again.name):
            stored = f"{described} computes otherwise (`{again.name}`) in a narrower network"
        elif len(step.atoms) != len(again.atoms):
            stored = f"`{step.name}` in {described} {_STORED}"
        elif step.numbers != again.numbers:
            stored = f"{described} gives `{step.name}` a number that depends on its width"
        for atoms, others in zip(step.atoms, again.atoms, strict=False):
            expected = {there.get(c, FIXED) for c in np.unique(classes[atoms[atoms >= 0]]).tolist() if stays[c]}
            got = {narrower.atoms.find(a) for a in np.unique(others[others >= 0]).tolist()}
            if not stored and expected != got:
                stored = f"`{step.name}` in {described} {_STORED}"
        if stored:  # what follows may differ for no other reason
            return _freeze(tracer, step, stored)
    return False


def _freeze(tracer: ChannelTracer, step: Step, reason: str) -> bool:
    """Freeze what came out of a step; where that is nothing new what its module has touched, or the one around it."""
    before = len(tracer.atoms.why)
    for atoms in step.atoms:
        tracer.atoms.freeze(atoms, reason)
    module: str | None = step.where
    while len(tracer.atoms.why) == before and module is not None:
        tracer.freeze_touched(module, reason)
        module = module.rpartition(".")[0] if module else None
    return len(tracer.atoms.why) > before
