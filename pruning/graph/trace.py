"""Follow every channel of a network through one forward pass.

Each output channel of each convolution is an *atom*, and so is each element of a parameter that has one number per
channel. While the network runs once on a small random image, a `TorchFunctionMode` carries along which atom every
element of every activation belongs to (`labels`): what only moves elements moves their atoms (`moves`), an
addition couples them (both summands lose the same channels or none), a depthwise convolution, pooling or activation
passes them on (`operations`). Whatever the tracer does not know freezes the atoms it touches, with a reason, so an
unknown operation can cost reach but never correctness.

Reading functions instead of autograd nodes is what makes `chunk` (C2f, C3k2, PSA, RepNCSPELAN4), end-to-end heads and
attention traceable in one pass of milliseconds, where a gradient-graph tracer guesses shapes or does not end.
What runs below Python's functions (TorchScript, extensions) is seen by its operators; a tensor that nothing seen has
made freezes all that its module has touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paretoprune.base.errors import typed_line
from paretoprune.pruning.errors import ModelError
from paretoprune.pruning.graph import moves  # noqa: F401  its handlers join the table of operations
from paretoprune.pruning.graph.elementwise import is_activation
from paretoprune.pruning.graph.modules import RULES, activation
from paretoprune.pruning.graph.operations import call
from paretoprune.pruning.graph.passes import passes_of
from paretoprune.pruning.graph.tracer import ChannelTracer
from paretoprune.pruning.yolo.loading import input_channels

_TRACE_SIZE = 128  # pixels; the smallest square that gives RT-DETR its 300 anchors


class _BelowFunctions(TorchDispatchMode):
    """Hands operators that no traced function has called (TorchScript's, an extension's) to the tracer."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler for this: 1.8 s, 900 modules."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))  # a function again: the tracer sees it unless it is in one already


def trace(model: nn.Module) -> ChannelTracer:
    """Trace every way in which a task model is run.

    Args:
        model: an Ultralytics task model with the block list `model.model`; it is not touched.

    Raises ModelError, one line, for a network that does not run.
    """
    attempts = _image_shapes(model)
    for left, shape in enumerate(attempts, 1 - len(attempts)):
        tracer = prepare(copy.deepcopy(model))
        try:
            run(tracer, shape)
        except Exception as error:  # anybody's layers may say anything about themselves
            if left == 0:
                tried = ", ".join(f"{c} channels of {size} pixels" for c, size in attempts)
                why = typed_line(error, 200, whole=True)
                where = tracer.described(tracer.failed_in or "")
                if _runs(model, attempts):  # a fault of the tracer's, not of the network
                    raise ModelError(
                        f"channels must be followed through every layer, but in {where} that fails ({why}), although "
                        "the network runs; report it with this layer's code"
                    ) from error
                raise ModelError(
                    f"the network must run on an image ({tried}), but it does not: {where} fails ({why})"
                ) from None
        else:
            return tracer
    raise AssertionError("there is an attempt")


def _runs(model: nn.Module, shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether the network by itself is run in every way on images of any of the shapes (channels, pixels)."""
    for channels, size in shapes:
        copied, images = copy.deepcopy(model), torch.zeros(2, channels, size, size)
        try:
            with torch.no_grad():
                for each in passes_of(copied):
                    each.run(copied.train(each.training), images)
        except Exception:  # noqa: BLE001  anybody's layers may say anything about themselves
            continue
        return True
    return False


def _image_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Channels and pixels of images that a model may run on, the likeliest first."""
    channels = input_channels(model)
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    args: Any = getattr(model, "args", {})
    trained = args.get("imgsz") if isinstance(args, dict) else getattr(args, "imgsz", None)
    size = trained if isinstance(trained, int) else 640
    return list(dict.fromkeys([(channels, _TRACE_SIZE), (first, _TRACE_SIZE), (channels, size)]))


def prepare(model: nn.Module) -> ChannelTracer:
    """A tracer of a model, not yet run; the model is used up."""
    model = model.float().cpu()
    tracer = ChannelTracer(model, f"model.{len(model.model) - 1}", call)  # type: ignore[arg-type]
    _watch_modules(model, tracer)
    return tracer


def run(tracer: ChannelTracer, shape: tuple[int, int]) -> None:
    """The forward passes, on images of so many channels and pixels; where one fails, `failed_in` says in what."""
    model, (channels, size) = tracer.modules[""], shape
    tracer.shape = shape
    image = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for each in passes_of(model):
            model.train(each.training)
            copied = image.clone()
            copied._channel_seen = True  # type: ignore[attr-defined]
            with _BelowFunctions(), tracer:
                output = each.run(model, copied)
            with tracer.module(tracer.head_prefix):
                _freeze_outputs(tracer, output)
    for owner, where in tracer.reused.items():
        known = tracer.convs.get(owner)
        sides = (known.outputs, known.inputs) if known else (tracer.linears.get(owner), tracer.features.get(owner))
        for atoms in sides:
            if atoms is not None:
                tracer.atoms.freeze(atoms, f"the weight of {owner} is used in {where} as well")
    for name, vector in tracer.vectors.items():
        _couple_vector(tracer, *name.rpartition(".")[::2], vector.atoms)


def _couple_vector(tracer: ChannelTracer, owner: str, name: str, atoms: np.ndarray) -> None:
    """A norm's or convolution's own vector that something else used as well goes with what it belongs to."""
    known = tracer.norms.get(owner)
    if known is None and owner in tracer.convs:
        known = tracer.convs[owner].outputs
    if known is None and owner in tracer.features:
        known = tracer.features[owner]
    if known is not None:
        tracer.atoms.couple(atoms, known, f"{owner}.{name} is used elsewhere")


def _freeze_outputs(tracer: ChannelTracer, output: Any) -> None:
    """What leaves the model keeps its channels, except the feature maps that heads hand through for the loss."""
    if isinstance(output, torch.Tensor):
        tracer.freeze(output, "output")
    elif isinstance(output, dict):
        for key, value in output.items():
            if key != "feats":
                _freeze_outputs(tracer, value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            _freeze_outputs(tracer, value)


def _watch_modules(model: nn.Module, tracer: ChannelTracer) -> None:
    scripted = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule))
    for name, module in model.named_modules():
        if f"{name}.".startswith(scripted):  # cannot be told apart: its operators are seen as its owner's
            continue
        rule = RULES.get(type(module)) or (activation if is_activation(module) else None)
        inner = module.forward if rule is None else rule(tracer, name, module)
        module.forward = _named_forward(tracer, name, inner)  # type: ignore[method-assign]


def _named_forward(tracer: ChannelTracer, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with tracer.module(name):
            _note(tracer, name, (args, tuple(kwargs.values())))
            output = inner(*args, **kwargs)
        _note(tracer, tracer.where(), output)
        return output

    return forward


def _note(tracer: ChannelTracer, module: str, values: Any) -> None:
    """Remember that a module has to do with the channels of these tensors."""
    if isinstance(values, torch.Tensor):
        label = getattr(values, "_channel_label", None)
        if label is not None:
            tracer.touched[module].append(label.atoms)
    elif isinstance(values, (list, tuple)):
        for value in values:
            _note(tracer, module, value)
    elif isinstance(values, dict):
        _note(tracer, module, tuple(values.values()))
