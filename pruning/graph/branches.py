"""Branches: the repeated units of a block that can be removed whole (depth), and for the others the reason why not.

What a block's `forward` does with its units follows from its class, so classes of Ultralytics are looked up here. A
removed unit contributes nothing: where it has a shortcut it gives what it reads, else it gives zero. Blocks use their
units in one of two ways:

- *listed* (C2f): each unit reads what the one before it gives, and a closing convolution reads all that they give. A
  unit with a shortcut then repeats the part before it, so that its columns of that convolution are added to that
  part's; the columns of one without a shortcut go.
- *in sequence* (C3): the block goes on with what the last one gives. A unit with a shortcut is left out; so is one
  without, but then the convolution that reads the sequence gets zeros for its columns.

What reads a zero must go as well, so a unit without a shortcut is removed together with those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from ultralytics.nn.modules import block as blocks
from ultralytics.nn.modules.conv import Conv, LightConv, RepConv
from ultralytics.nn.modules.transformer import TransformerBlock, TransformerLayer

from paretoprune.pruning.errors import PlanError


@dataclass(frozen=True)
class Branch:
    """One unit, as a row for people (`removable`, else a `reason`), and what its removal means.

    Attributes:
        name: of its module (`model.4.m.0`).
        channels: that it gives; None where that is not known.
        residual: whether it has a shortcut: removed it gives what it reads, else zero.
        contributions: the modules whose output a mask sets to zero in place of a removal.
        needs: the branches behind it that must be removed with it.
    """

    name: str
    block: int
    channels: int | None
    removable: bool
    reason: str
    residual: bool
    contributions: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """The units of one block, in the order they run.

    Attributes:
        name: of the list or sequence that holds them (`model.4.m`).
        entries: names of what it holds, each with its branches: one, or several in a sequence of its own.
        closing: the convolution that reads what they give; "" where nothing in the block depends on their number.
        listed: whether that one reads what every entry gives, not only the last.
        behind: the convolution whose outputs follow those of the entries in what `closing` reads; "" for none.
    """

    name: str
    entries: tuple[tuple[str, tuple[Branch, ...]], ...]
    closing: str
    listed: bool
    behind: str

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for _, members in self.entries for branch in members)

    def gone(self, names: Collection[str]) -> set[str]:
        """The entries that are left empty when these branches are removed."""
        return {entry for entry, members in self.entries if all(branch.name in names for branch in members)}


@dataclass(frozen=True)
class Branches:
    """All branches of a model; made by `find_branches`."""

    chains: tuple[Chain, ...]
    alone: tuple[Branch, ...]  # what a block has one of, so that it is not removable

    def to_rows(self) -> list[dict[str, object]]:
        """Rows with the keys of `LayerTable.to_rows`, and `removable`; none of them is a layer, so none is prunable."""
        return [
            {
                "layer": branch.name,
                "block": branch.block,
                "group": None,
                "out_channels": branch.channels,
                "prunable": False,
                "reason": branch.reason or "a branch: it is removed whole, by `branches_removed` of a plan",
                "removable": branch.removable,
            }
            for branch in self.by_name.values()
        ]

    @cached_property
    def by_name(self) -> dict[str, Branch]:
        """In the order of the network."""
        found = [*self.alone, *(branch for chain in self.chains for branch in chain.branches)]
        return {branch.name: branch for branch in sorted(found, key=lambda branch: natural(branch.name))}

    def checked(self, names: Iterable[str]) -> tuple[str, ...]:
        """The branches of a plan in the network's order, without those inside others that are removed.

        Raises `PlanError` for one that the model does not have or that cannot be removed.
        """
        wanted = set(names)
        if unknown := sorted(wanted - self.by_name.keys()):
            raise PlanError(
                f"every branch of a plan must exist in the model, but it has none named {unknown[0]}. "
                "`paretoprune layers MODEL` lists them."
            )
        for name in wanted:
            branch = self.by_name[name]
            if not branch.removable:
                raise PlanError(f"{name} is not removable: {branch.reason}. Leave it out of the plan.")
            if missing := sorted(set(branch.needs) - wanted, key=natural):
                raise PlanError(
                    f"{name} has no shortcut, so what reads its output goes with it, but the plan leaves {missing[0]}. "
                    f"Remove {' and '.join(missing)} as well."
                )
        return tuple(name for name in self.by_name if name in wanted and not any(_above(name, o) for o in wanted))

    def removed_modules(self, names: Collection[str]) -> frozenset[str]:
        """The outermost modules that leave the model with these branches."""
        return frozenset(names).union(*(chain.gone(names) for chain in self.chains))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts module names with numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _above(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def name_after(name: str, removed: Collection[str]) -> str | None:
    """A module's name in the network without the `removed` modules (`Branches.removed_modules`); None if it is gone."""
    place, found = "", []
    for part in name.split("."):
        here = f"{place}.{part}" if place else part
        if here in removed:
            return None
        before = [r for r in removed if r.rpartition(".")[0] == place and r.rpartition(".")[2].isdigit()]
        found.append(str(int(part) - sum(int(r.rpartition(".")[2]) < int(part) for r in before)) if before else part)
        place = here
    return ".".join(found)


@dataclass(frozen=True)
class _Unit:
    """`contributions`: see `Branch`, names within the unit; "" is the unit. `residual`: whether it has a shortcut."""

    contributions: tuple[str, ...]
    residual: Callable[[Any], bool]


@dataclass(frozen=True)
class _Block:
    """Where a class keeps its units ("": it is their sequence), and which module reads what they give; see `Chain`."""

    units: str = "m"
    closing: str = ""
    listed: bool = False
    behind: str = ""


def _never(unit: Any) -> bool:
    return False


def _added(unit: Any) -> bool:
    return bool(unit.add)


def _plain_shortcut(unit: Any) -> bool:
    return isinstance(unit.shortcut, nn.Identity)


_UNITS: dict[type, _Unit] = {
    blocks.Bottleneck: _Unit(("cv2",), _added),
    blocks.RepBottleneck: _Unit(("cv2",), _added),
    blocks.CIB: _Unit(("cv1",), _added),
    blocks.PSABlock: _Unit(("attn", "ffn"), _added),
    blocks.ABlock: _Unit(("attn", "mlp"), lambda unit: True),
    blocks.GhostBottleneck: _Unit(("conv",), _plain_shortcut),
    blocks.ResNetBlock: _Unit(("cv3",), _plain_shortcut),  # its ReLU changes nothing: what it reads is one's output
    TransformerLayer: _Unit(("ma", "fc2"), lambda unit: True),
    blocks.C3k: _Unit(("cv3",), _never),
    Conv: _Unit(("",), _never),
    LightConv: _Unit(("",), _never),
    RepConv: _Unit(("",), _never),
}
_C2F, _C3 = _Block(closing="cv2", listed=True), _Block(closing="cv3")
_BLOCKS: dict[type, _Block] = {
    **dict.fromkeys((blocks.C2f, blocks.C3k2, blocks.C2fCIB, blocks.C2fPSA, blocks.A2C2f), _C2F),
    blocks.C2fAttn: _Block(closing="cv2", listed=True, behind="attn.proj_conv"),
    blocks.C3f: _Block(closing="cv3", listed=True),
    blocks.HGBlock: _Block(closing="sc", listed=True),
    **dict.fromkeys((blocks.C3, blocks.C3x, blocks.C3Ghost, blocks.C3k, blocks.RepCSP, blocks.BottleneckCSP), _C3),
    blocks.C2: _Block(closing="cv2"),
    blocks.C2PSA: _Block(),
    blocks.RepC3: _Block(),
    blocks.C1: _Block(),
    blocks.ResNetLayer: _Block(units="layer"),
    TransformerBlock: _Block(units="tr"),
}
_REPEATED = _Block(units="")
_ALONE: dict[type, tuple[str, ...]] = {  # parts of a block that its forward calls by name
    blocks.PSA: ("attn", "ffn"),
    blocks.RepNCSPELAN4: ("cv2", "cv3"),
    blocks.ELAN1: ("cv2", "cv3"),
}


def find_branches(model: nn.Module) -> Branches:
    """Look up every block of a task model; it is not touched."""
    chains, alone = [], []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _ALONE:
            reason = f"{kind.__name__} has one of it and calls it by name"
            for part in _ALONE[kind]:
                width = _channels(module.get_submodule(part))
                alone.append(Branch(f"{name}.{part}", _block_of(name), width, False, reason, False, ()))
        how = next((_BLOCKS[base] for base in kind.__mro__ if base in _BLOCKS), None)
        if kind is nn.Sequential and name.count(".") == 1:  # a block that its yaml repeats (YOLOv3's bottlenecks)
            how = _REPEATED
        chain = None if how is None else _chain(name, module, how)
        chains += [] if chain is None else [chain]
    return Branches(tuple(chains), tuple(alone))


def _chain(name: str, module: nn.Module, how: _Block) -> Chain | None:
    """The units of a block; None where it has none (a C3TR has a transformer, a network's first ResNetLayer none)."""
    held: Any = getattr(module, how.units, None) if how.units else module
    holder = f"{name}.{how.units}" if how.units else name
    if not isinstance(held, (nn.ModuleList, nn.Sequential)) or getattr(module, "is_first", False):
        return None
    entries: list[tuple[str, tuple[Branch, ...]]] = []
    later: list[Branch] = []  # behind the one that is looked at
    for number in reversed(range(len(held))):
        entry, place = held[number], f"{holder}.{number}"
        nested = type(entry) is nn.Sequential
        members: list[Branch] = []
        for inner, unit in reversed(list(entry.named_children())) if nested else [("", entry)]:
            branch = _branch(f"{place}.{inner}" if inner else place, unit, module, how, number, later, nested)
            members.insert(0, branch)
            later.insert(0, branch)
        entries.insert(0, (place, tuple(members)))
    reads = [_conv_of(module, name, part) for part in (how.closing, how.behind)]
    return Chain(holder, tuple(entries), reads[0], how.listed, reads[1])


def _branch(
    name: str, unit: nn.Module, block: nn.Module, how: _Block, number: int, later: list[Branch], nested: bool
) -> Branch:
    known, kind = _UNITS.get(type(unit)), type(block).__name__
    residual = known is not None and known.residual(unit)
    missing = next((branch.name for branch in later if not branch.removable), None)
    reason = ""
    if type(block) not in _BLOCKS and how is not _REPEATED:
        reason = f"{kind} is no class of Ultralytics that is known here, so what it does with its units is not known"
    elif known is None:
        reason = f"{type(unit).__name__} is no unit of Ultralytics, so what it gives is not known"
    elif isinstance(block, blocks.ResNetLayer) and (not residual or number == 0):
        reason = "its shortcut is a convolution: it changes the channels or the resolution"
    elif not residual and how.behind:
        reason = f"it has no shortcut, and the attention of {kind} would read what it reads in place of zero"
    elif not residual and (nested or not how.closing):
        reason = f"it has no shortcut, and {kind} would go on with what it reads in place of zero"
    elif not residual and missing is not None:
        reason = f"it has no shortcut, and {missing}, which reads it, is not removable"
    contributions = () if known is None else tuple(f"{name}.{part}" if part else name for part in known.contributions)
    needs = () if residual or reason else tuple(branch.name for branch in later)
    width = None if known is None else _channels(unit.get_submodule(known.contributions[-1]))
    return Branch(name, _block_of(name), width, not reason, reason, residual, contributions, needs)


def _channels(module: nn.Module) -> int:
    """Channels that a sequence of layers gives: those of its last one."""
    last: Any = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    return int(last.out_channels if isinstance(last, nn.Conv2d) else last.out_features)


def _conv_of(module: nn.Module, name: str, part: str) -> str:
    """The convolution of a block's part, which may be a wrapper with its norm and activation; "" for no part."""
    if not part:
        return ""
    return f"{name}.{part}" if isinstance(module.get_submodule(part), nn.Conv2d) else f"{name}.{part}.conv"


def _block_of(name: str) -> int:
    return int(name.split(".")[1])
