"""Functions that move elements, write them, or gather them over dimensions: the atoms are moved by the same function.

A view, slice, concatenation or shuffle is run a second time, on the atoms themselves: where they end up is what the
result's elements belong to. Numbers in its arguments (the places of a slice, the sizes of a view) may be stored ones
that a narrower network would get wrong; `surgery.layer_table` finds that out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from paretoprune.pruning.graph.labels import FIXED, ZEROS, Label, State, compact
from paretoprune.pruning.graph.operations import Call, elementwise, freeze_all, register, tensors

_REDUCING = (
    "sum mean amax amin max min std var prod median nanmean nansum softmax log_softmax softmin logsumexp argmax "
)
_REDUCING += "argmin cumsum any all count_nonzero sort argsort topk"
_ZERO_KEEPING = frozenset("sum mean amax amin max min std var prod median nanmean nansum cumsum".split())
_CUTTING = ("roll", "getitem", "narrow", "select", "index_select", "tensor_split", "unfold")
_INDEX_LATER = ("getitem", "index_select", "gather", "take_along_dim", "narrow", "select", "index")


_SAME = "to float half double bfloat16 type type_as data cpu lift_fresh clone"  # another number at the same place
_MOVING = (
    "view reshape permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze flatten unflatten ravel "
    "expand expand_as view_as reshape_as repeat repeat_interleave tile flip roll rot90 chunk split split_with_sizes "
    "hsplit vsplit dsplit tensor_split unsafe_chunk unsafe_split unbind select narrow getitem index_select stack "
    "hstack vstack dstack cat concat concatenate pixel_shuffle pixel_unshuffle channel_shuffle T mT H mH t contiguous "
    "native_channel_shuffle detach adjoint atleast_1d atleast_2d atleast_3d unfold positive meshgrid broadcast_to "
    "broadcast_tensors "
)


@register(_MOVING + _SAME, moves=True)
def _move(what: Call) -> None:
    t, results = what.t, tensors(what.result)
    operands = what.operands
    labels = [t.label_of(x) for x in operands]
    if all(label is None for label in labels):
        return
    later = operands[1:] if what.name in _INDEX_LATER else []
    if any(t.label_of(x) is not None for x in later):
        return freeze_all(what)
    if what.result is what.source:
        return
    shadows = {id(x): _shadow(x, label) for x, label in zip(operands, labels, strict=True) if not _among(x, later)}
    moved = _replayed(what, shadows)
    if moved is None or [m.shape for m in moved] != [tuple(r.shape) for r in results]:
        return freeze_all(what)
    if what.name in ("channel_shuffle", "native_channel_shuffle"):  # pieces that are interleaved lose the same places
        spread = labels[0] is not None and bool(labels[0].varying)
        rows = (
            labels[0].atoms.reshape(what.get(1, "groups"), -1) if labels[0] is not None and spread else np.empty((0, 0))
        )
        for row in rows[1:]:
            t.atoms.couple(rows[0], row, t.reason(what.name))
    state = max(State.ZERO, *(label.state for label in labels if label is not None))
    moved = [_kept_apart(what, compact(atoms)) for atoms in moved]
    for tensor, atoms in zip(results, moved, strict=True):
        t.put(tensor, Label(atoms, state))
        if tensor._base is not None:
            tensor._base._channel_viewed = True  # type: ignore[attr-defined]
    sources = [label for label in labels if label is not None]
    if what.name in _CUTTING:
        t.cuts |= any(not np.array_equal(sources[0].atoms.ravel(), atoms.ravel()) for atoms in moved)
    _tie_pieces(what, sources, moved)


def _among(x: torch.Tensor, those: list[torch.Tensor]) -> bool:
    return any(x is y for y in those)


def _shadow(x: torch.Tensor, label: Label | None) -> torch.Tensor:
    atoms = np.full((1,) * x.ndim, FIXED) if label is None else label.atoms
    return torch.from_numpy(np.ascontiguousarray(atoms)).expand(x.shape)


def _replayed(what: Call, shadows: dict[int, torch.Tensor]) -> list[np.ndarray] | None:
    """The function's results for the atoms; None where it takes none."""
    if what.name in _SAME.split():
        return [shadows[id(what.source)].numpy()]
    if what.name in ("view", "view_as"):  # the atoms may lie in memory otherwise
        shadows = {key: x.contiguous() for key, x in shadows.items()}
    args, kwargs = _swapped(what.args, shadows), {k: _swapped(v, shadows) for k, v in what.kwargs.items()}
    func = what.func
    try:
        if (
            what.name == "unfold" and what.result.ndim == 3 and len(what.args[0].shape) == 4
        ):  # im2col, which pads with 0
            args = ((args[0] - ZEROS).double(), *args[1:])
            found = tensors(func(*args, **kwargs).long() + ZEROS)
        else:
            found = tensors(func(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    return [x.numpy() for x in found]


def _swapped(value: Any, shadows: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return shadows.get(id(value), value)
    if isinstance(value, list):
        return [_swapped(v, shadows) for v in value]
    if type(value) is tuple:
        return tuple(_swapped(v, shadows) for v in value)
    return value


def _kept_apart(what: Call, atoms: np.ndarray) -> np.ndarray:
    """Where a view spread the channels over several dimensions: they lose the same places all along the shorter ones.

    Otherwise what a narrower network views would be cut elsewhere. The longest dimension stays free, the last of two.
    """
    varying = [d for d, n in enumerate(atoms.shape) if n > 1]
    if len(varying) < 2:
        return atoms
    free = 1 if what.name == "pixel_shuffle" else max(varying, key=lambda d: (atoms.shape[d], d))
    t = what.t
    free = t.as_before[len(t.free)] if len(t.free) < len(t.as_before) else free
    t.free.append(free)
    for dim in varying:
        if dim != free:
            for k in range(1, atoms.shape[dim]):
                t.atoms.couple(atoms.take([0], dim), atoms.take([k], dim), t.reason(what.name))
            atoms = atoms.max(axis=dim, keepdims=True)
    return atoms


def _tie_pieces(what: Call, sources: list[Label], results: list[np.ndarray]) -> None:
    """Pieces that a function cut the channels into keep the same share each, or the cut would fall elsewhere."""
    t = what.t
    if len(sources) != 1:
        return
    whole = np.unique(sources[0].atoms)
    pieces = [np.unique(atoms) for atoms in results]
    pieces = [p[p >= 0] for p in pieces]
    rest = np.setdiff1d(whole[whole >= 0], np.concatenate(pieces)) if pieces else np.array([])
    if all(len(p) == (whole >= 0).sum() for p in pieces):
        return
    pieces = [p for p in (*pieces, rest) if len(p)]
    roots = {tuple(sorted({t.atoms.find(int(a)) for a in p})): p for p in pieces}
    pieces = list(roots.values())
    t.pieces.extend(pieces)
    t.ties.extend((pieces[0], other) for other in pieces[1:])
    if what.name in ("split", "split_with_sizes", "chunk"):
        _follow_attributes(what, pieces)


def _follow_attributes(what: Call, pieces: list[np.ndarray]) -> None:
    """A split by sizes that its module holds (C2f's `c`, a partial convolution's two): the attributes follow."""
    module = what.t.where()
    held = {a: v for a, v in vars(what.t.modules.get(module, what.t)).items() if type(v) is int and a[0] != "_"}
    for piece in pieces:
        names = [a for a, size in held.items() if size == len(piece)]
        if "c" in names or (len(names) == 1 and what.name != "chunk"):  # C2f can do both: chunk, or split by `c`
            what.t.attributes.append((module, "c" if "c" in names else names[0], piece))


@register("pad", moves=True)
def _pad(what: Call) -> None:
    t, source = what.t, what.source
    label = t.label_of(source)
    if label is None:
        return
    widths, mode = list(what.get(1, "pad")), what.get(2, "mode", default="constant")
    value = what.get(3, "value", default=0) or 0
    padded = [source.ndim - 1 - k for k in range(len(widths) // 2) if widths[2 * k] or widths[2 * k + 1]]
    if mode != "constant":
        if any(d in label.varying for d in padded):
            return freeze_all(what)
        return t.put(what.result, Label(label.atoms, max(label.state, State.ZERO)))
    across = any(d in label.varying for d in padded)
    atoms = _shadow(source, label)
    moved = torch.nn.functional.pad(atoms, widths, value=FIXED if across else ZEROS).numpy()
    state = max(label.state, State.ZERO) if value == 0 else State.APART
    t.put(what.result, Label(compact(moved), state))


@register("setitem copy fill zero masked_fill", moves=True)
def _write(what: Call) -> None:
    """Write into (a part of) a tensor: its atoms are overwritten likewise."""
    t, target = what.t, what.source
    index = what.args[1] if what.name == "setitem" else ...
    value = (
        0
        if what.name == "zero"
        else what.args[2]
        if what.name in ("setitem", "masked_fill")
        else what.get(1, "src", "value")
    )
    label, written = t.label_of(target), t.label_of(value)
    if what.name == "masked_fill":
        if label is None or value != 0 or t.label_of(what.args[1]) is not None or what.result is target:
            return freeze_all(what)
        return t.put(what.result, Label(label.atoms, max(label.state, State.ZERO)))
    if label is None and written is None:
        return
    if any(
        isinstance(i, torch.Tensor) and t.label_of(i) is not None for i in (index if type(index) is tuple else (index,))
    ):
        return freeze_all(what)
    atoms = _shadow(target, label).numpy().copy()
    place = torch.from_numpy(atoms)
    if isinstance(value, torch.Tensor):
        new = _shadow(value, written)
    else:
        new = torch.tensor(ZEROS if value == 0 else FIXED)
    try:
        place[index] = new
    except (RuntimeError, TypeError, ValueError, IndexError):
        return freeze_all(what)
    states = [x.state for x in (label, written) if x is not None and (x.atoms >= 0).any()]
    t.put(target, Label(_kept_apart(what, compact(atoms)), max(State.ZERO, *states) if states else State.ZERO))


@register(_REDUCING)
def _reduce(what: Call) -> None:
    """Sums, means, maxima, softmax over dimensions: each channel by itself as long as it is not one of them."""
    t, source = what.t, what.source
    label = t.label_of(source)
    dims = what.get(1, "dim", "axis")
    if what.name in ("topk",):
        dims = what.get(2, "dim", default=-1)
    elif what.name in ("sort", "argsort") and not isinstance(dims, int):
        dims = what.kwargs.get("dim", -1)
    if isinstance(dims, torch.Tensor):  # max(x, y)
        return elementwise(what)
    if label is None:
        return freeze_all(what)
    over = _dims(dims, source.ndim)
    results = tensors(what.result)
    mixed = [d for d in label.varying if d in over]
    if mixed or any(t.label_of(x) is not None for x in what.operands if x is not source):
        zeros_drop_out = what.name == "sum" and label.state is not State.APART and set(label.varying) <= over
        return None if zeros_drop_out else freeze_all(what, "which goes over all of them, a removed one included")
    state = max(label.state, State.ZERO) if what.name in _ZERO_KEEPING else State.APART
    for x in results:
        atoms = label.atoms if x.ndim == source.ndim else np.squeeze(label.atoms, tuple(over))
        t.put(x, Label(atoms, state))


def _dims(dims: Any, ndim: int) -> set[int]:
    if dims is None or isinstance(dims, bool):
        return set(range(ndim))
    found = {d % ndim for d in ((dims,) if isinstance(dims, int) else dims)} if ndim else set()
    return found or set(range(ndim))
