"""What each tensor function does to the channels of its operands: the tracer's table of handlers.

A handler gets the tracer, the function, its arguments and its result, and labels the result. Handlers are looked up by
the function's name without underscores, so `Tensor.add`, `Tensor.__add__` and `torch.add` share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pruning.elementwise import value_at_zero

if TYPE_CHECKING:  # the tracer imports this table; only the annotation looks back
    from pruning.trace import ChannelTracer

Handler = Callable[["ChannelTracer", Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]
HANDLERS: dict[str, Handler] = {}

# Every channel by itself, zeros stay zeros, but not elementwise: a removed channel is a zero channel on both sides.
_ZERO_KEEPING = (
    "dropout max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate upsample to type_as prelu"
).split()


def _register(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys((n.strip("_") for n in names), handler))
        return handler

    return add


@_register("new_full", "new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
def _only_reads_the_shape(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Makes a tensor of its own: depends on no channel's value."""


def handle_unlisted(t: ChannelTracer, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
    """An operation without a handler: an elementwise function of one tensor keeps channels apart, whatever its name.

    Where it moves zeros, it is only allowed as a convolution's own activation: masking happens after it.
    """
    source: Any = args[0] if args else None
    atoms, others = t.labels(source), _tensors((args[1:], tuple(kwargs.values())))
    alike = isinstance(result, torch.Tensor) and result.shape == getattr(source, "shape", None)
    if atoms is None or not alike or any(x.numel() != 1 for x in others):
        return handle_unknown(t, func, args, kwargs, result)
    at_zero = value_at_zero(lambda probe: func(probe, *args[1:], **kwargs))
    if at_zero == 0 or (at_zero is not None and t.fresh(source)):
        t.label(result, atoms)
    else:
        handle_unknown(t, func, args, kwargs, result)


def handle_unknown(t: ChannelTracer, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
    """An operation that mixes channels, or nobody knows: freeze every labelled operand. The result is fixed."""
    name = getattr(func, "__name__", "operation").strip("_")
    for operand in _tensors((args, tuple(kwargs.values()))):
        t.freeze(operand, name)


@_register(*_ZERO_KEEPING)
def _pass(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    atoms = t.labels(args[0])
    if atoms is not None and isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[1] == len(atoms):
        t.label(result, atoms)
    elif atoms is not None:
        handle_unknown(t, func, args, kwargs, result)


@_register("pad")
def _pad(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    widths = args[1] if len(args) > 1 else kwargs["pad"]
    value = kwargs.get("value") or (args[3] if len(args) > 3 else 0) or 0
    spatial = len(widths) <= 4 and value == 0 and (args[2] if len(args) > 2 else kwargs.get("mode", "constant"))
    _pass(t, func, args, kwargs, result) if spatial else handle_unknown(t, func, args, kwargs, result)


@_register("conv2d", "conv_transpose2d")
def _convolution(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    source, weight = args[0], args[1]
    name = t.owner_of(weight)
    module = t.modules.get(name or "")
    if name is None or module is None:
        return handle_unknown(t, func, args, kwargs, result)
    groups, wide = module.groups, (module.in_channels, module.out_channels)  # type: ignore[union-attr]
    atoms = t.labels(source)
    if groups == 1:
        found = t.conv(name, wide[1], atoms, wide[0])
        t.label(result, found.outputs, fresh=True)
    elif groups == wide[0] == wide[1] and func.__name__ == "conv2d":
        _depthwise(t, name, atoms if atoms is not None else np.full(wide[0], -1), result)
    else:
        t.freeze(source, f"convolution in {groups} groups")
        found = t.conv(name, wide[1], None, wide[0])
        t.atoms.freeze(found.outputs, f"it is a convolution in {groups} groups")
        t.label(result, found.outputs, fresh=True)


def _depthwise(t: ChannelTracer, name: str, atoms: np.ndarray, result: torch.Tensor) -> None:
    from pruning.trace import ConvTrace

    known = t.convs.setdefault(name, ConvTrace(name, atoms, atoms, depthwise=True))
    known.outputs = known.inputs = t.atoms.couple(known.outputs, atoms, f"{name} is shared between unequal inputs")
    t.label(result, known.outputs, fresh=True)


@_register("batch_norm")
def _batch_norm(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
    name, atoms = t.owner_of(mean), t.labels(args[0])
    if atoms is None:
        return
    if name is None or not t.fresh(args[0]):  # shifts channels that are zero by now: removing them would not be exact
        return handle_unknown(t, func, args, kwargs, result)
    t.norms[name] = atoms
    t.label(result, atoms, fresh=True)


@_register("linear")
def _linear(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    name, atoms = t.owner_of(args[1]), t.labels(args[0])
    if atoms is None:
        return
    if name is None or args[0].ndim != 2:
        return handle_unknown(t, func, args, kwargs, result)
    t.linears[name] = atoms


@_register("flatten")
def _flatten(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    atoms = t.labels(args[0])
    if atoms is None:
        return
    if result.ndim == 2 and result.shape[1] == len(atoms):  # behind a global pooling
        t.label(result, atoms)
    else:
        handle_unknown(t, func, args, kwargs, result)


@_register("add", "radd", "iadd", "sub", "isub", "mul", "rmul", "imul", "maximum", "div", "truediv")
def _elementwise(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    known = [(a, atoms) for a in args[:2] if (atoms := t.labels(a)) is not None]
    name = func.__name__.strip("_")
    additive = name.endswith(("add", "sub")) or name == "maximum"
    if not known:
        return
    if len(known) == 2 and known[0][0].shape[1] == known[1][0].shape[1] and not name.endswith("div"):
        atoms = t.atoms.couple(known[0][1], known[1][1], t.reason(name))
        return void(t.label(result, atoms, fresh=t.fresh(args[0]) and t.fresh(args[1]) and additive))
    tensor, atoms = known[0]
    other = args[1] if args[0] is tensor else args[0]
    spread = not isinstance(other, torch.Tensor) or other.numel() == 1 or (other.ndim > 1 and other.shape[1] == 1)
    zero = isinstance(other, (int, float)) and other == 0  # RepConv adds 0 where it has no identity branch
    if len(known) == 1 and spread and (zero or not additive) and result.shape[1] == len(atoms):
        return void(t.label(result, atoms, fresh=t.fresh(tensor)))
    handle_unknown(t, func, args, kwargs, result)


@_register("cat", "concat", "concatenate")
def _concatenate(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
    tensors = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    labels = [t.labels(x) for x in tensors]
    if all(a is None for a in labels):
        return
    if dim % result.ndim != 1:
        return handle_unknown(t, func, args, kwargs, result)
    parts = [a if a is not None else np.full(x.shape[1], -1) for x, a in zip(tensors, labels, strict=True)]
    t.label(result, np.concatenate(parts), fresh=all(t.fresh(x) for x in tensors))


@_register("chunk", "split", "tensor_split")
def _cut(t: ChannelTracer, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Cut along the channels: pieces of one chunk must stay of equal size, or the stock forward would cut elsewhere."""
    source, atoms = args[0], t.labels(args[0])
    if atoms is None:
        return
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    sizes = {piece.shape[1] for piece in result} if dim % source.ndim == 1 else set()
    owner = t.modules.get(t.where())
    follows = _width_attribute(t, owner, atoms)  # the module's `c`, which a split by size reads
    if len(sizes) != 1 or (func.__name__ != "chunk" and not follows):
        return handle_unknown(t, func, args, kwargs, result)
    width, pieces = sizes.pop(), []
    for k, piece in enumerate(result):
        pieces.append(atoms[k * width : (k + 1) * width])
        t.label(piece, pieces[-1], fresh=t.fresh(source))
    t.pieces.extend(pieces)
    t.ties.extend((pieces[0], other) for other in pieces[1:])
    if follows:
        t.attributes.append((t.where(), "c", pieces[0]))


def _width_attribute(t: ChannelTracer, owner: Any, atoms: np.ndarray) -> bool:
    cv1 = t.convs.get(f"{t.where()}.cv1.conv")
    return cv1 is not None and hasattr(owner, "c") and 2 * owner.c == len(atoms) and np.array_equal(cv1.outputs, atoms)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in _tensors(v)]
    return []


def void(_: object) -> None:
    """Drop a value, so that a handler's early return stays one line."""
