"""Surgery: from ratios to widths, from widths to the channels that stay, and their removal from a copy of the network.

Which channels leave together is the layer table's knowledge, so no graph is traced here: applying a plan costs little
more than copying what stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.errors import PlanError
from paretoprune.pruning.graph.layers import ALWAYS, Group, LayerTable
from paretoprune.pruning.graph.patterns import governing, means
from paretoprune.pruning.plan import Plan, check_ratio
from paretoprune.pruning.surgery.cloning import Narrowed


def resolve(table: LayerTable, ratios: Mapping[str, float], round_to: int = 8) -> dict[int, int]:
    """Turn ratios by layer name or pattern (`model.4.*`) into widths by group id, for the groups that get narrower.

    Which key a group goes by says `pruning.graph.patterns.governing`; a pattern passes over layers that are not
    prunable. The width is the allowed one nearest to `channels * (1 - ratio)`, the larger of two, never zero.

    Raises:
        PlanError: a ratio outside [0, 1); a name or pattern that matches nothing; a named layer that is not prunable;
            two layers of one group that are named with different ratios.
    """
    if round_to < 1:
        raise PlanError(f"`round_to` must be at least 1, but got {round_to}.")
    _check_keys(table, ratios)
    widths = {}
    for group in table.groups:
        key = governing(ratios, group.layers, table.by_name)
        if key is not None:
            _check_together(group, ratios)
            widths[group.id] = nearest_width(group, ratios[key], round_to)
    return {g: w for g, w in sorted(widths.items()) if w < table.groups[g].channels}


def _check_keys(table: LayerTable, ratios: Mapping[str, float]) -> None:
    for key, ratio in ratios.items():
        check_ratio(key, ratio)
    unknown = [key for key in ratios if not any(means(key, name, table.by_name) for name in table.by_name)]
    if unknown:
        raise PlanError(
            f"every layer of a plan must exist in the model, but it has none named {listed(sorted(unknown))}. "
            "`paretoprune layers MODEL` lists them."
        )
    for key, ratio in ratios.items():
        if key in table.by_name and key not in table.group_of and ratio > 0:
            raise PlanError(f"{key} is not prunable: {table.by_name[key].reason}. Leave it out of the plan.")


def _check_together(group: Group, ratios: Mapping[str, float]) -> None:
    named = [layer for layer in group.layers if layer in ratios]
    for layer in named[1:]:
        if abs(ratios[named[0]] - ratios[layer]) > 1e-9:
            raise PlanError(
                f"{named[0]} and {layer} lose their channels together, so their ratios must be equal, but got "
                f"{ratios[named[0]]} and {ratios[layer]}. Give one of them."
            )


def nearest_width(group: Group, ratio: float, round_to: int = 8) -> int:
    """The allowed width nearest to `channels * (1 - ratio)`; of two equally near ones the larger."""
    target = group.channels * (1 - ratio)
    return min(group.widths(round_to), key=lambda w: (abs(w - target), -w))


def canonical_ratios(table: LayerTable, widths: Mapping[int, int]) -> dict[str, float]:
    """Realised ratio of every layer that gets narrower: two plans are equal if and only if these are."""
    groups = ((table.groups[g], w) for g, w in widths.items())
    cut = {name: round(1 - w / g.channels, 6) for g, w in groups if w < g.channels for name in g.layers}
    return dict(sorted(cut.items()))


def choose_kept(table: LayerTable, widths: Mapping[int, int], scores: np.ndarray) -> np.ndarray:
    """Which classes stay: in every part the ones of the highest score, ties to the lower index.

    Args:
        widths: by group id, of the group's first part.
        scores: shape (class_count,), higher is worth more.

    Returns:
        bool array, shape (class_count,); `ALWAYS` is kept.
    """
    kept = np.ones(table.class_count, dtype=bool)
    for group_id, width in widths.items():
        group = table.groups[group_id]
        if width < 1:
            raise PlanError(f"a layer must keep at least one channel, but {group.name} was given width {width}.")
        for part, count in zip(group.parts, group.kept_per_part(width), strict=True):
            order = np.argsort(-scores[part], kind="stable")
            kept[part[order[count:]]] = False
    return kept


def classes_from_kept(table: LayerTable, kept: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The classes that a plan's recorded indices leave, shape (class_count,).

    Raises:
        PlanError: a convolution is unknown, an index out of range, or channels that leave together are split.
    """
    unfit = [n for n, indices in kept.items() if n not in table.convs or not _within(indices, table.convs[n].outputs)]
    if unfit:
        raise PlanError(_for_another_model(table, unfit))
    stays = np.ones(table.class_count, dtype=bool)
    for name, indices in kept.items():
        stays[np.delete(table.convs[name].outputs, list(indices))] = False
    for name, indices in kept.items():
        if not np.array_equal(np.flatnonzero(stays[table.convs[name].outputs]), np.asarray(sorted(indices))):
            unfit.append(name)
    if unfit:
        raise PlanError(_for_another_model(table, unfit))
    if not stays[ALWAYS]:
        raise PlanError("the plan removes channels that must stay; it is for another model.")
    return stays


def _within(indices: Sequence[int], outputs: np.ndarray) -> bool:
    return len(indices) > 0 and min(indices) >= 0 and max(indices) < len(outputs)


def _for_another_model(table: LayerTable, names: Iterable[str]) -> str:
    layers = list(dict.fromkeys(table.layer_of.get(n, n.removesuffix(".conv")) for n in names))
    return (
        f"the plan is for another model: it does not fit {listed(layers)} of this one. "
        'Give the model it was made for, or remove "kept" and "hash" to apply its ratios only.'
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def kept_indices(table: LayerTable, stays: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Per convolution that loses output channels: the indices it keeps."""
    flags = {name: stays[c.outputs] for name, c in table.convs.items()}
    return {name: tuple(np.flatnonzero(f).tolist()) for name, f in flags.items() if not f.all()}


@torch.no_grad()
def remove(model: nn.Module, table: LayerTable, stays: np.ndarray) -> nn.Module:
    """A copy of the model without the classes that do not stay. The model itself is not touched."""
    modules = dict(model.named_modules())
    device = next(model.parameters()).device
    narrowed = Narrowed()

    def places(classes: np.ndarray) -> torch.Tensor | None:
        """Where a channel stays, ascending; None where all stay."""
        kept = stays[classes]
        return None if kept.all() else torch.from_numpy(np.flatnonzero(kept)).to(device)

    for name, channels in table.convs.items():
        outputs = places(channels.outputs)
        inputs = None if channels.depthwise else places(channels.inputs)
        if outputs is not None or inputs is not None:
            narrowed.conv(modules[name], outputs, inputs, channels.depthwise)
    for name, classes in table.norms.items():
        if (kept := places(classes)) is not None:
            narrowed.norm(modules[name], kept)
    for name, classes in table.linears.items():
        inputs, outputs = places(classes), places(table.features[name])
        if inputs is not None or outputs is not None:
            narrowed.linear(modules[name], outputs, inputs)
    for name, (dim, classes) in table.vectors.items():
        owner, _, attribute = name.rpartition(".")
        if (kept := places(classes)) is not None:
            narrowed.vector(getattr(modules[owner], attribute), kept, dim)
    for name, rows, factor in scaled(table, stays):
        narrowed.scale(modules[name], np.searchsorted(np.flatnonzero(stays[given_by(table, name)]), rows), factor)
    for name, attribute, classes in table.attributes:
        narrowed.attribute(modules[name], attribute, int(stays[classes].sum()))
    return narrowed.copy_of(model)


def given_by(table: LayerTable, name: str) -> np.ndarray:
    """Classes of what a batch norm or linear layer gives."""
    return table.norms[name] if name in table.norms else table.features[name]


def scaled(table: LayerTable, stays: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """Norms and linear layers, the unpruned indices of kept outputs, the factor for them: see `LayerTable.scalings`."""
    for name, classes, counted, power in table.scalings:
        if not stays[counted].all():
            outputs = given_by(table, name)
            yield (
                name,
                np.flatnonzero(np.isin(outputs, classes) & stays[outputs]),
                float(stays[counted].mean() ** power),
            )


def prune(model: nn.Module, table: LayerTable, widths: Mapping[int, int], scores: np.ndarray) -> tuple[nn.Module, Plan]:
    """Remove the least important channels until every group has its width.

    Args:
        widths: by group id (see `resolve`).
        scores: importance per class, shape (class_count,), higher stays.

    Returns:
        The pruned copy and the plan with realised ratios and kept indices.
    """
    stays = choose_kept(table, widths, scores)
    return remove(model, table, stays), Plan(canonical_ratios(table, widths), kept_indices(table, stays))


def replay(model: nn.Module, table: LayerTable, plan: Plan) -> tuple[nn.Module, Plan]:
    """Apply a plan that records its kept channels: the same network again, bit for bit, without importance.

    Raises:
        PlanError: the plan was made for another model; also where its channels exist here, but its ratios say that
            the layers they come from had other widths.
    """
    stays = classes_from_kept(table, plan.kept)
    found = canonical_ratios(table, {g.id: int(stays[g.parts[0]].sum()) for g in table.groups})
    layers = {**plan.ratios, **found}
    unfit = [n for n in layers if abs(found.get(n, 0.0) - plan.ratios.get(n, 0.0)) > 2e-6]  # both rounded to 1e-6
    if unfit:
        raise PlanError(_for_another_model(table, unfit))
    return remove(model, table, stays), Plan(dict(plan.ratios), kept_indices(table, stays))
