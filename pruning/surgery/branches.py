"""Removal of branches: a network of the same classes with fewer units, that computes what masking them computes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from paretoprune.pruning.graph.branches import Branches, Chain, find_branches, name_after
from paretoprune.pruning.plan import Plan
from paretoprune.pruning.surgery.cloning import clone


def remove_branches(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of the model without these branches (`find_branches`). The model itself is not touched.

    Units behind a removed one move up in their list, so what stays may have another name (`name_after`). The result
    equals the original in which the branches contribute zero.

    Raises `PlanError` for a branch that the model does not have or that cannot be removed.
    """
    branches = find_branches(model)
    wanted = branches.checked(names)
    copied = clone(model, {})
    cut_branches(copied, branches, wanted)
    return copied


@torch.no_grad()
def cut_branches(model: nn.Module, branches: Branches, names: Collection[str]) -> None:
    """Remove branches from a model in place.

    Args:
        model: the one that `branches` were found in, or a copy of it with fewer channels.
        names: as `Branches.checked` gives them.
    """
    touched = [chain for chain in branches.chains if any(branch.name in names for branch in chain.branches)]
    modules = dict(model.named_modules())  # names change on the way
    for chain in touched:
        (_cut_listed if chain.listed else _cut_sequence)(chain, modules, names)


def without_branches(plan: Plan, branches: Branches, names: tuple[str, ...]) -> Plan:
    """The plan of the network that lost these branches besides, without what it says of layers inside them.

    Every name stays that of the unpruned network, and kept indices are its channels: a plan has one set of names.
    """
    gone = branches.removed_modules(names)
    ratios = {layer: ratio for layer, ratio in plan.ratios.items() if name_after(layer, gone) is not None}
    kept = {conv: indices for conv, indices in plan.kept.items() if name_after(conv, gone) is not None}
    return replace(plan, ratios=ratios, kept=kept, branches=names)


def _cut_listed(chain: Chain, modules: dict[str, Any], names: Collection[str]) -> None:
    closing = modules[chain.closing]
    weight, gone = closing.weight, chain.gone(names)
    place = weight.shape[1] - (modules[chain.behind].out_channels if chain.behind else 0)
    for number, (entry, members) in reversed(list(enumerate(chain.entries))):
        width = _width(members[-1].contributions[-1], modules)
        place -= width
        if entry in gone:
            part = weight[:, place : place + width]
            before = weight[:, :place].clone()
            if all(branch.residual for branch in members):
                before[:, -width:] += part
            weight = torch.cat([before, weight[:, place + width :]], dim=1)
            del modules[chain.name][number]
            continue
        for inner in reversed(range(len(members))):
            if members[inner].name in names:
                del modules[entry][inner]
    _set_weight(closing, weight)


def _cut_sequence(chain: Chain, modules: dict[str, Any], names: Collection[str]) -> None:
    gone = [(number, branch) for number, branch in enumerate(chain.branches) if branch.name in names]
    zero = [branch for _, branch in gone if not branch.residual]
    if zero:  # from here to the end all are removed; the closing convolution reads what the first of these read
        closing, last = modules[chain.closing], chain.branches[-1]
        width = _width(last.contributions[-1], modules)
        read = next(m.in_channels for m in modules[zero[0].name].modules() if isinstance(m, nn.Conv2d))
        weight = closing.weight
        _set_weight(closing, torch.cat([weight.new_zeros(len(weight), read, *weight.shape[2:]), weight[:, width:]], 1))
    for number, _ in reversed(gone):
        del modules[chain.name][number]


def _width(contribution: str, modules: dict[str, Any]) -> int:
    """Channels that a unit gives: those of the last convolution of what it contributes."""
    return next(
        int(m.out_channels) for m in reversed(list(modules[contribution].modules())) if isinstance(m, nn.Conv2d)
    )


def _set_weight(conv: Any, weight: torch.Tensor) -> None:
    conv.weight = nn.Parameter(weight.detach().contiguous(), conv.weight.requires_grad)
    conv.in_channels = weight.shape[1]
