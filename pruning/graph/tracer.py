"""Follow every channel of a network through one forward pass.

Each output channel of each convolution is an *atom*, and so is each element of a parameter that has one number per
channel. While the network runs once on a small random image, a `TorchFunctionMode` carries along which atom every
element of every activation belongs to (`trace_labels`): what only moves elements moves their atoms (`trace_moves`), an
addition couples them (both summands lose the same channels or none), a depthwise convolution, pooling or activation
passes them on (`trace_ops`). Whatever the tracer does not know freezes the atoms it touches, with a reason, so an
unknown operation can cost reach but never correctness.

Reading functions instead of autograd nodes is what makes `chunk` (C2f, C3k2, PSA, RepNCSPELAN4), end-to-end heads and
attention traceable in one pass of milliseconds, where a gradient-graph tracer guesses shapes or does not end.
What runs below Python's functions (TorchScript, extensions) is seen by its operators; a tensor that nothing seen has
made freezes all that its module has touched.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from paretoprune.pruning.errors import ModelError
from paretoprune.pruning.graph.elementwise import is_activation
from paretoprune.pruning.graph.labels import FIXED, Atoms, Label, State
from paretoprune.pruning.graph.operations import call
from paretoprune.pruning.graph.passes import passes_of
from paretoprune.pruning.yolo.loading import input_channels

_TRACE_SIZE = 128  # pixels; the smallest square that gives RT-DETR its 300 anchors


@dataclass
class ConvTrace:
    """One convolution as met in the trace; `inputs`/`outputs` are atoms per channel, shape (in,) and (out,)."""

    name: str
    outputs: np.ndarray
    inputs: np.ndarray | None = None
    depthwise: bool = False


@dataclass(frozen=True)
class Vector:
    """A parameter or buffer with one number per channel: the dimension they lie along, and their atoms."""

    dim: int
    atoms: np.ndarray


@dataclass(frozen=True)
class Step:
    """One function call: where, its name, the plain numbers it computed with, and the atoms of its results."""

    where: str
    name: str
    numbers: tuple[float, ...]
    atoms: tuple[np.ndarray, ...]


class ChannelTracer(TorchFunctionMode):
    """Runs one forward pass and collects what happened to the channels. Not reusable across models."""

    def __init__(self, model: nn.Module, head_prefix: str) -> None:
        super().__init__()
        self.atoms = Atoms()
        self.convs: dict[str, ConvTrace] = {}
        self.norms: dict[str, np.ndarray] = {}
        self.linears: dict[str, np.ndarray] = {}  # what they read
        self.features: dict[str, np.ndarray] = {}  # what they give
        self.vectors: dict[str, Vector] = {}
        self.reused: dict[str, str] = {}  # layers whose weight something else reads as well, and what
        self.refused: dict[str, str] = {}  # convolutions that were run in a way that nothing is known of
        self.pieces: list[np.ndarray] = []  # the parts that a chunk or split cut an activation into
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []  # both sides must keep channels in the same proportion
        self.attributes: list[tuple[str, str, np.ndarray]] = []  # (module, attribute, atoms): attribute = how many stay
        self.touched: dict[str, list[np.ndarray]] = defaultdict(list)  # by module, all atoms that it had to do with
        self.steps: list[Step] = []
        self.free: list[int] = []  # of every spread over several dimensions, the one that stays free
        self.as_before: list[int] = []  # the same of a trace that this one is to be compared with
        self.cuts = False  # whether a function cut or turned the channels by numbers of its own
        self.shape = (0, 0)  # of the image: channels, pixels
        self.scalings: list[tuple[str, np.ndarray, np.ndarray, float]] = []  # see `LayerTable.scalings`
        self.head_prefix = head_prefix
        self.stack: list[str] = []
        self.failed_in: str | None = None  # the innermost module that raised an error
        self.modules = dict(model.named_modules())
        self.tensors = _owned_tensors(model)
        for name, tensor in model.named_parameters(remove_duplicate=False):
            first = self.tensors[id(tensor)]
            if first != name and self.is_weight(name):
                for owner in (first.rpartition(".")[0], name.rpartition(".")[0]):
                    self.reused[owner] = f"{first.rpartition('.')[0]} and {name.rpartition('.')[0]}"
                    self.refused[owner] = f"its weight is shared by {self.reused[owner]}"
        for value in _reachable_tensors(model):
            value._channel_seen = True  # type: ignore[attr-defined]

    # ---- what the handlers use
    def label_of(self, tensor: Any) -> Label | None:
        """What is known of a tensor's atoms; None for what no removal changes. Parameters get theirs when asked for."""
        if not isinstance(tensor, torch.Tensor):
            return None
        found: Label | None = getattr(tensor, "_channel_label", None)
        name = self.tensors.get(id(tensor))
        if name is not None and self.is_weight(name):
            self.reused.setdefault(name.rpartition(".")[0], self.described(self.where()))
            return None
        if found is None and name is not None and sum(n > 1 for n in tensor.shape) == 1:
            vector = Vector(max(range(tensor.ndim), key=tensor.shape.__getitem__), self.atoms.new(tensor.numel()))
            self.vectors[name] = vector
            found = Label(vector.atoms.reshape(tensor.shape), State.APART)
            self.put(tensor, found)
        return found

    def is_weight(self, name: str) -> bool:
        """Whether a parameter is the weight of a convolution or linear layer, which is cut with that layer."""
        owner, _, role = name.rpartition(".")
        return role == "weight" and isinstance(self.modules.get(owner), (_ConvNd, nn.Linear))

    def put(self, tensor: torch.Tensor, label: Label) -> None:
        """Attach a label."""
        if any(n not in (1, m) for n, m in zip(label.atoms.shape, tensor.shape, strict=True)):
            raise AssertionError(f"atoms of shape {label.atoms.shape} for {tuple(tensor.shape)} in {self.where()}")
        tensor._channel_label = label  # type: ignore[attr-defined]
        self.touched[self.where()].append(label.atoms)

    def labels(self, tensor: Any, operation: str) -> np.ndarray | None:
        """Atoms of dimension 1, for a reader that takes removed channels for zeros; None where none may be removed.

        Where the channels lie otherwise, or removed ones are not zero, they are frozen.
        """
        label = self.label_of(tensor)
        if label is None:
            return None
        atoms = label.along(1, tensor.shape[1])
        if atoms is None:
            self.freeze(tensor, operation)
        elif label.state is State.APART and (atoms >= 0).any():
            self.atoms.freeze(atoms, self.reason(operation, "where a removed channel would not be zero"))
        else:
            return np.maximum(atoms, FIXED)
        return None

    def label(self, tensor: torch.Tensor, atoms: np.ndarray, fresh: bool = False) -> torch.Tensor:
        """Attach atoms of dimension 1; `fresh` says that the tensor is a convolution's output before its activation."""
        shape = [1] * tensor.ndim
        shape[1] = len(atoms)
        self.put(tensor, Label(atoms.reshape(shape), State.FRESH if fresh else State.ZERO))
        return tensor

    def owner_of(self, parameter: Any) -> tuple[str, str]:
        """Names of the module that a parameter or buffer belongs to, and of itself in it; empty ones for others."""
        module, _, name = self.tensors.get(id(parameter), "").rpartition(".")
        return module, name

    def where(self) -> str:
        return self.stack[-1] if self.stack else "the model"

    def freeze(self, tensor: Any, operation: str, why: str = "which needs them all") -> None:
        """Nothing may be removed from this tensor's channels."""
        label = self.label_of(tensor)
        if label is not None:
            self.atoms.freeze(label.atoms, self.reason(operation, why))

    def freeze_touched(self, module: str, reason: str) -> None:
        """Nothing may be removed from what a module has read or made."""
        for atoms in self.touched[module]:
            self.atoms.freeze(atoms, reason)

    def reason(self, operation: str, why: str = "which needs them all") -> str:
        owner = self.where()
        if owner == self.head_prefix or owner.startswith(self.head_prefix + "."):
            head = type(self.modules[self.head_prefix]).__name__
            return f"its output channels have a fixed meaning for the {head} head ({operation})"
        return f"its channels enter `{operation}` in {self.described(owner)}, {why}"

    def described(self, module: str) -> str:
        kind = type(self.modules[module]).__name__ if module in self.modules else "model"
        return f"{module} ({kind})"

    def conv(self, name: str, out_channels: int, inputs: np.ndarray | None, in_channels: int) -> ConvTrace:
        """The record of a (non-depthwise) convolution, made at its first call; a later call couples the inputs."""
        inputs = np.full(in_channels, FIXED) if inputs is None else inputs
        known = self.convs.get(name)
        if known is None:
            known = self.convs[name] = ConvTrace(name, self.atoms.new(out_channels), inputs)
        elif known.inputs is not None:
            known.inputs = self.atoms.couple(known.inputs, inputs, f"{name} is shared between unequal inputs")
        return known

    @contextmanager
    def module(self, name: str) -> Iterator[None]:
        self.stack.append(name)
        try:
            yield
        except Exception:
            self.failed_in = self.failed_in or name
            raise
        finally:
            self.stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call(self, func, args, kwargs or {})


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
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
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
    tracer = ChannelTracer(model, f"model.{len(model.model) - 1}")  # type: ignore[arg-type]
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
    from paretoprune.pruning.graph.modules import RULES, activation

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


def _owned_tensors(model: nn.Module) -> dict[int, str]:
    return {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}


def _reachable_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that the modules hold, registered or not."""
    for module in model.modules():
        yield from _tensors_in({k: v for k, v in vars(module).items() if k != "_modules"})


def _tensors_in(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner, depth - 1)
