"""What each tensor function does to the channels of its operands: the tracer's table of handlers.

A handler gets the call and labels its result. Handlers are looked up by the function's name without underscores, so
`Tensor.add`, `Tensor.__add__`, `torch.add` and the operator `aten::add` share one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv, ConvTranspose

from paretoprune.pruning.graph.elementwise import value_at_zero
from paretoprune.pruning.graph.labels import FIXED, ZEROS, Label, State
from paretoprune.pruning.graph.tracer import ChannelTracer, ConvTrace, Step

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# Read only what a tensor looks like, not what it holds.
_METADATA = frozenset(
    "size shape dim ndim ndimension numel nelement dtype device layout names stride storage_offset element_size "
    "is_contiguous is_floating_point is_complex is_signed is_cuda is_cpu is_mps is_quantized is_sparse is_meta is_leaf "
    "is_pinned is_inference is_conj is_neg is_mkldnn is_xpu is_nested is_tensor is_same_size requires_grad "
    "grad grad_fn get_device len hash version is_view backward_hooks itemsize nbytes type result_type can_cast "
    "retain_grad promote_types output_nr __dir__ register_hook qscheme imag real".split()
)
_ONLY_LOOK = "new_full new_zeros new_ones new_empty new_tensor zeros_like ones_like full_like empty_like rand_like "
_ONLY_LOOK += "randn_like zeros ones empty full rand randn arange linspace tensor as_tensor eye scalar_tensor"


@dataclass(frozen=True)
class Call:
    """One call of a function: `name` without underscores and overload."""

    t: ChannelTracer
    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def get(self, index: int, *names: str, default: Any = None) -> Any:
        """An argument, however it was given."""
        if len(self.args) > index:
            return self.args[index]
        return next((self.kwargs[n] for n in names if n in self.kwargs), default)

    @property
    def source(self) -> Any:
        """The first operand."""
        return self.get(0, "input", "self", "tensors", "tensor", "x")

    @property
    def operands(self) -> list[torch.Tensor]:
        return tensors((self.args, tuple(self.kwargs.values())))


Handler = Callable[[Call], None]
HANDLERS: dict[str, Handler] = {}
MOVES: set[str] = set()  # functions whose numbers are places and sizes, not values


def register(names: str, moves: bool = False) -> Callable[[Handler], Handler]:
    """Put a handler into the table under these names; `moves`: the numbers among their arguments are no values."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        if moves:
            MOVES.update(names.split())
        return handler

    return add


def call(t: ChannelTracer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function and note what it did to the channels."""
    name, below = _name_of(func)
    handler = HANDLERS.get(name, unlisted)
    inputs = tensors((args, tuple(kwargs.values())))
    writes = "out" in kwargs or name == "setitem" or _is_in_place(func)
    before = [(x, getattr(x, "_channel_label", None)) for x in inputs[:1]] if writes else []
    result = func(*args, **kwargs)
    what = Call(t, func, name, args, kwargs, result)
    _check_origin(what, inputs, writes)
    made = tensors(result)
    if not made and name not in ("setitem", "delitem"):
        if name not in _METADATA:
            for x in inputs:
                t.freeze(x, name)
        return result
    handler(what)
    t.steps.append(_step(what))
    if "out" in kwargs:
        freeze_all(what)
    for x, label in before:
        _check_write(t, name, x, label)
    made_blank = below and name.startswith("empty")  # filled by something that is no function of torch's
    for x in () if made_blank or name.startswith(("empty", "new_empty")) else made:
        x._channel_seen = True  # type: ignore[attr-defined]
    if name in ("setitem",) and inputs:
        inputs[0]._channel_seen = True  # type: ignore[attr-defined]
    return result


def _name_of(func: Any) -> tuple[str, bool]:
    """A function's name, and whether it is an operator that was called from below Python's functions."""
    if isinstance(func, torch._ops.OpOverload):
        return func.overloadpacket.__name__.strip("_"), True
    name = getattr(func, "__name__", "operation")
    if name == "__get__":  # an attribute
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_"), False


def _is_in_place(func: Any) -> bool:
    name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else getattr(func, "__name__", "")
    if name.endswith("__"):
        return name.startswith("__i") and name[3:-2] in HANDLERS  # `__iadd__`
    return bool(name.endswith("_"))


def _check_origin(what: Call, inputs: list[torch.Tensor], writes: bool) -> None:
    """A tensor that nothing seen has made may hold anything: nothing that its module has touched may be removed."""
    if what.name == "lift_fresh":
        return
    for k, x in enumerate(inputs):
        if not hasattr(x, "_channel_seen") and not (writes and k == 0) and what.name not in _METADATA:
            where = what.t.where()
            what.t.freeze_touched(where, f"{what.t.described(where)} computes with what tracing does not see")


def _check_write(t: ChannelTracer, name: str, target: torch.Tensor, before: Label | None) -> None:
    """A write that changes what is known of a tensor leaves other views of its memory with stale labels."""
    after = getattr(target, "_channel_label", None)
    if after is before or (before is not None and after is not None and _alike(before, after)):
        return
    if target._is_view() or getattr(target, "_channel_viewed", False):
        for label in (before, after, getattr(target._base, "_channel_label", None)):
            if label is not None:
                t.atoms.freeze(label.atoms, t.reason(f"{name} in place", "which writes into a part of another tensor"))
        if target._base is not None and getattr(target._base, "_channel_label", None) is None:
            t.freeze(target, name)


def _alike(a: Label, b: Label) -> bool:
    return a.state >= b.state and np.array_equal(a.atoms, b.atoms)


def _step(what: Call) -> Step:
    # its number of groups follows (as an attribute), or it was frozen
    sized = what.name in MOVES or what.name in ("conv2d", "conv_transpose2d", "group_norm")
    sized = sized or what.name.startswith(("empty", "zeros", "ones", "new", "rand"))
    numbers = () if sized else tuple(_numbers((what.args, tuple(what.kwargs.values()))))
    made = tensors(what.result) or what.operands[:1]  # a write gives back nothing, but changes its target
    labels = [getattr(x, "_channel_label", None) for x in made]
    return Step(what.t.where(), what.name, numbers, tuple(label.atoms for label in labels if label is not None))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (bool, int, float)):
        return [float(value)]
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in _numbers(v)]
    return []


def freeze_all(what: Call, why: str = "which needs them all") -> None:
    """An operation that mixes channels, or nobody knows: freeze every labelled operand. The result is fixed."""
    for operand in what.operands:
        what.t.freeze(operand, what.name, why)


@register(_ONLY_LOOK)
def _only_looks(what: Call) -> None:
    """Makes a tensor of its own: depends on no channel's value."""
    made = what.result
    if "zeros" in what.name and made.ndim > 1:
        what.t.put(made, Label(np.full((1,) * made.ndim, ZEROS)))
    elif what.name in ("tensor", "as_tensor", "new_tensor"):
        freeze_all(what)


def unlisted(what: Call) -> None:
    """An operation without a handler: an elementwise function of one tensor keeps channels apart, whatever its name."""
    t, source, result = what.t, what.source, what.result
    label = t.label_of(source)
    others = [x for x in what.operands if x is not source]
    alike = isinstance(result, torch.Tensor) and result.shape == getattr(source, "shape", None)
    if label is None or not alike or not what.args or any(x.numel() != 1 or t.label_of(x) is not None for x in others):
        return freeze_all(what)
    at_zero = value_at_zero(lambda probe: what.func(probe, *what.args[1:], **what.kwargs))
    if at_zero is None:
        return freeze_all(what)
    t.put(result, Label(label.atoms, _behind(t, label.state, at_zero == 0)))


def _behind(t: ChannelTracer, state: State, keeps_zeros: bool) -> State:
    """The state behind an elementwise function. Inside of `Conv`, masking happens behind whatever activates."""
    if state is State.APART or keeps_zeros:
        return max(state, State.ZERO)
    inside = any(isinstance(t.modules.get(name), (Conv, ConvTranspose)) for name in t.stack[-3:])
    return State.ZERO if state is State.FRESH and inside else State.APART


@register("dropout dropout2d feature_dropout interpolate upsample grid_sample max_pool2d avg_pool2d lp_pool2d "
          "adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices")  # fmt: skip
def _pool(what: Call) -> None:
    """Every channel by itself, over the last two dimensions, zeros stay zeros."""
    t, source = what.t, what.source
    label = t.label_of(source)
    results = tensors(what.result)
    grid = what.get(1, "grid") if what.name == "grid_sample" else None
    local = label is not None and all(d < source.ndim - 2 for d in label.varying)
    t.freeze(grid, what.name)  # where all channels are read
    if label is None or not local:
        return freeze_all(what)
    for x in results:
        t.put(x, Label(label.atoms, max(label.state, State.ZERO)))


@register("conv2d conv_transpose2d")
def _convolution(what: Call) -> None:
    t, source, weight = what.t, what.source, what.get(1, "weight")
    name, role = t.owner_of(weight)
    module, bias = t.modules.get(name), what.get(2, "bias")
    turned = what.name == "conv_transpose2d"
    own = isinstance(module, nn.ConvTranspose2d if turned else nn.Conv2d) and role == "weight"
    if not own or source.ndim != 4:
        if isinstance(t.modules.get(t.where()), _CONVOLUTIONS):  # its weight is computed: normalised, quantised
            t.refused[t.where()] = f"its weight is computed anew for each pass in {t.described(t.where())}"
        return freeze_all(what, "with a weight that is no convolution's own")
    groups = what.get(6, "groups", default=1)
    wide = (source.shape[1], what.result.shape[1])
    atoms = t.labels(source, what.name) if groups in (1, wide[0]) else None
    if groups == 1:
        outputs = t.conv(name, wide[1], atoms, wide[0]).outputs
    elif groups == wide[0] == wide[1] and not turned:
        outputs = _depthwise(t, name, atoms if atoms is not None else np.full(wide[0], FIXED))
    else:
        t.freeze(source, f"convolution in {groups} groups")
        outputs = t.conv(name, wide[1], None, wide[0]).outputs
        t.atoms.freeze(outputs, f"it is a convolution in {groups} groups")
    t.label(what.result, outputs, fresh=True)
    if bias is not None and bias is not getattr(module, "bias", None):
        _scaled(what, what.result, bias)


def _depthwise(t: ChannelTracer, name: str, atoms: np.ndarray) -> np.ndarray:
    known = t.convs.setdefault(name, ConvTrace(name, atoms, atoms, depthwise=True))
    known.outputs = known.inputs = t.atoms.couple(known.outputs, atoms, f"{name} is shared between unequal inputs")
    return known.outputs


def _scaled(what: Call, target: torch.Tensor, vector: torch.Tensor) -> None:
    """`vector`, a parameter with a number per channel of dimension 1, is used on `target`: both go together."""
    t, label = what.t, what.t.label_of(vector)
    own = t.label_of(target)
    atoms = None if own is None or vector.ndim != 1 else own.along(1, target.shape[1])
    if atoms is None or label is None or len(vector) != target.shape[1]:
        return freeze_all(what)
    t.atoms.couple(label.atoms, atoms, t.reason(what.name))


@register("prelu")
def _prelu(what: Call) -> None:
    t, source, weight = what.t, what.source, what.get(1, "weight")
    label = t.label_of(source)
    if label is None:
        return freeze_all(what)
    if weight.numel() > 1:
        _scaled(what, source, weight)
        owner, role = t.owner_of(weight)
        if role == "weight" and hasattr(t.modules[owner], "num_parameters"):
            t.attributes.append((owner, "num_parameters", t.vectors[f"{owner}.{role}"].atoms))
    t.put(what.result, Label(label.atoms, max(label.state, State.ZERO)))


@register("batch_norm")
def _batch_norm(what: Call) -> None:
    t, source = what.t, what.source
    name, _ = t.owner_of(what.get(1, "running_mean"))
    label = t.label_of(source)
    if label is None:
        return freeze_all(what)
    atoms = label.along(1, source.shape[1])
    if not name or atoms is None:
        return freeze_all(what)
    before = t.norms.get(name)
    shared = f"{name} is shared between unequal inputs"
    t.norms[name] = atoms if before is None else t.atoms.couple(before, atoms, shared)
    # shifts channels that are zero by now: removing them is only exact where something zero multiplies the result
    t.put(what.result, Label(label.atoms, State.FRESH if label.state is State.FRESH else State.APART))


@register("group_norm")
def _group_norm(what: Call) -> None:
    """All channels of one of its groups leave together: the statistics of the other groups do not change then."""
    t, source, place = what.t, what.source, what.t.where()
    label = t.label_of(source)
    atoms = None if label is None else label.along(1, source.shape[1])
    groups = int(what.get(1, "num_groups"))
    if label is None or atoms is None or groups == 1 or not isinstance(t.modules.get(place), nn.GroupNorm):
        return freeze_all(what)  # also where the number of groups stands elsewhere and would not follow
    members = atoms.reshape(groups, -1)
    for column in members.T[1:]:
        t.atoms.couple(members[:, 0], column, t.reason(what.name))
    for vector in (what.get(2, "weight"), what.get(3, "bias")):
        if vector is not None:
            _scaled(what, source, vector)
    t.attributes.extend([(place, "num_groups", members[:, 0]), (place, "num_channels", atoms)])
    t.put(what.result, Label(label.atoms, State.FRESH if label.state is State.FRESH else State.APART))


@register("linear")
def _linear(what: Call) -> None:
    t, source, weight, bias = what.t, what.source, what.get(1, "weight"), what.get(2, "bias")
    name, role = t.owner_of(weight)
    module = t.modules.get(name)
    if not isinstance(module, nn.Linear) or role != "weight" or source.ndim != 2:
        return freeze_all(what)
    atoms = t.labels(source, what.name)
    atoms = np.full(source.shape[1], FIXED) if atoms is None else atoms
    shared = f"{name} is shared between unequal inputs"
    before = t.linears.get(name)
    t.linears[name] = atoms if before is None else t.atoms.couple(before, atoms, shared)
    if name not in t.features:
        t.features[name] = t.atoms.new(what.result.shape[1])
    t.label(what.result, t.features[name], fresh=True)
    if bias is not None and bias is not module.bias:
        _scaled(what, what.result, bias)


@register("add radd iadd sub isub rsub mul rmul imul multiply maximum minimum fmax fmin div truediv itruediv rtruediv "
          "rdiv true_divide divide subtract pow rpow where lerp eq ne gt ge lt le")  # fmt: skip
def elementwise(what: Call) -> None:
    """Element by element over several tensors, broadcast: what meets must leave together."""
    t, result = what.t, what.result
    kind = what.name.removeprefix("i")
    count = 3 if what.name in ("where", "lerp") else 2
    named = [v for key, v in what.kwargs.items() if key not in ("alpha", "rounding_mode", "out")]
    values = [v for v in (*what.args[:count], *named) if isinstance(v, (torch.Tensor, int, float))]
    labelled = [(v, label) for v in values if (label := t.label_of(v)) is not None]
    if not labelled:
        return
    merged, labelled = _meet(what, labelled)
    constants = [v for v in values if not any(v is x for x, _ in labelled)]
    for x in constants:
        if isinstance(x, torch.Tensor):
            _meet_constant(what, merged, x)
    state = _state_of(what, kind, labelled, constants)
    if state is None:
        return freeze_all(what)
    t.put(result, Label(merged, state))


def _meet(what: Call, labelled: list[tuple[Any, Label]]) -> tuple[np.ndarray, list[tuple[Any, Label]]]:
    """The atoms of the result of operands that meet element by element, and the operands that count."""
    t, ndim = what.t, what.result.ndim
    merged: np.ndarray | None = None
    counting = []
    aligned = [(v, label, label.atoms.reshape((1,) * (ndim - v.ndim) + label.atoms.shape)) for v, label in labelled]
    reason = t.reason(what.name)
    for k, (value, label, atoms) in enumerate(aligned):
        others = [a for j, (_, _, a) in enumerate(aligned) if j != k]
        widest = np.broadcast_shapes(*(a.shape for a in others)) if others else (1,) * ndim
        if any(w > 1 and n == 1 for n, w in zip(atoms.shape, widest, strict=True)) and (atoms >= 0).any():
            t.atoms.freeze(atoms, t.reason(what.name, "where one channel meets many"))
            continue
        counting.append((value, label))
        merged = atoms if merged is None else t.atoms.couple(*_alike_arrays(merged, atoms), reason)
    if merged is None:  # each is spread over the others
        merged = np.full((1,) * ndim, FIXED)
    return merged, counting


def _alike_arrays(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shape = np.broadcast_shapes(a.shape, b.shape)
    return np.broadcast_to(a, shape), np.broadcast_to(b, shape)


def _meet_constant(what: Call, merged: np.ndarray, constant: torch.Tensor) -> None:
    """A number of its own for every channel, which is no parameter, keeps its width."""
    shape = (1,) * (what.result.ndim - constant.ndim) + tuple(constant.shape)
    if any(n > 1 and m > 1 for n, m in zip(merged.shape, shape, strict=True)):
        t = what.t
        t.atoms.freeze(merged, t.reason(what.name, "with a tensor that has a number for each of them"))


def _state_of(what: Call, kind: str, labelled: list[tuple[Any, Label]], constants: list[Any]) -> State | None:
    """What a removed channel holds in the result; None where that is no number."""
    states = [label.state for _, label in labelled] or [State.APART]
    first = labelled[0][0] is what.source if labelled else False
    if kind in ("mul", "rmul", "multiply"):
        if min(states) is State.APART:
            return State.APART
        return State.ZERO
    if kind in ("div", "truediv", "true_divide", "divide"):
        if not first:
            return State.APART if max(states) is State.APART and len(labelled) == 1 and labelled else None
        if len(states) > 1:
            return None if states[1] is not State.APART else max(states[0], State.ZERO)
        return max(states[0], State.ZERO)
    if kind == "pow" and first and len(labelled) == 1 and all(isinstance(c, (int, float)) and c > 0 for c in constants):
        return max(states[0], State.ZERO)
    if kind in ("pow", "rpow", "eq", "ne", "gt", "ge", "lt", "le", "rtruediv", "rdiv"):
        return State.APART if max(states) is State.APART or kind in ("eq", "ne", "gt", "ge", "lt", "le") else None
    if kind == "where":
        states = [label.state for v, label in labelled if v is not what.source] or [State.APART]
        moved = [c for c in constants if c is not what.source]
        return State.APART if moved else max(State.ZERO, *states)
    if any(isinstance(c, torch.Tensor) or c != 0 for c in constants):  # RepConv adds 0 where it has no identity branch
        return State.APART
    return max(State.ZERO, *states)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested list or tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for v in value if not isinstance(v, (int, str, float)) for x in tensors(v)]
    return []
