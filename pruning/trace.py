"""Follow every channel of a network through one forward pass.

Each output channel of each convolution is an *atom*. While the network runs once on a small random image, a
`TorchFunctionMode` carries the atoms of every activation's channel dimension along: a concatenation joins them, a chunk
or split slices them, an addition couples them (both summands lose the same channels or none), a depthwise convolution,
pooling or zero-preserving activation passes them on. Whatever the tracer does not know freezes the atoms it touches,
with a reason, so an unknown operation can cost reach but never correctness.

Reading functions instead of autograd nodes is what makes `chunk` (C2f, C3k2, PSA, RepNCSPELAN4), end-to-end heads and
attention traceable in one pass of milliseconds, where a gradient-graph tracer guesses shapes or does not end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pruning.elementwise import is_activation
from pruning.errors import ModelError
from pruning.passes import Pass, passes_of
from pruning.trace_ops import HANDLERS, handle_unlisted

FIXED = -1  # the atom of a channel nobody may remove (the image's, or one behind an unknown operation)
_TRACE_SIZE = 128  # pixels; the smallest square that gives RT-DETR its 300 anchors


@dataclass
class ConvTrace:
    """One convolution as met in the trace; `inputs`/`outputs` are atoms per channel, shape (in,) and (out,)."""

    name: str
    outputs: np.ndarray
    inputs: np.ndarray | None = None
    depthwise: bool = False


@dataclass
class Atoms:
    """Union-find over atoms; a frozen class carries the reason it was frozen for."""

    parent: list[int] = field(default_factory=list)
    why: dict[int, str] = field(default_factory=dict)

    def new(self, count: int) -> np.ndarray:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        for atom in atoms:
            if atom != FIXED:
                self.why.setdefault(self.find(int(atom)), reason)

    def couple(self, a: np.ndarray, b: np.ndarray, reason: str) -> np.ndarray:
        """Make the atoms of `a` and `b` (equal length) one class each; a fixed partner freezes the other."""
        for left, right in zip(a.tolist(), b.tolist(), strict=True):
            if left == FIXED and right == FIXED:
                continue
            if FIXED in (left, right):
                self.why.setdefault(self.find(max(left, right)), reason)
                continue
            low, high = sorted((self.find(left), self.find(right)))
            if low != high:
                self.parent[high] = low
                if high in self.why:
                    self.why.setdefault(low, self.why.pop(high))
        return np.maximum(a, b)  # a fixed channel takes the (now frozen) partner's identity


class ChannelTracer(TorchFunctionMode):
    """Runs one forward pass and collects what happened to the channels. Not reusable across models."""

    def __init__(self, model: nn.Module, head_prefix: str) -> None:
        super().__init__()
        self.atoms = Atoms()
        self.convs: dict[str, ConvTrace] = {}
        self.norms: dict[str, np.ndarray] = {}
        self.linears: dict[str, np.ndarray] = {}
        self.pieces: list[np.ndarray] = []  # the parts that a chunk or split cut an activation into
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []  # both sides must keep channels in the same proportion
        self.attributes: list[tuple[str, str, np.ndarray]] = []  # (module, attribute, atoms): attribute = how many stay
        self.head_prefix = head_prefix
        self.stack: list[str] = []
        self.modules = dict(model.named_modules())
        self._owner = {id(p): name for name, m in self.modules.items() for p in _identifying_tensors(m)}

    # ---- what the handlers use
    def labels(self, tensor: Any) -> np.ndarray | None:
        """Atoms of the tensor's dimension 1, or None where nothing is known of it."""
        return getattr(tensor, "_channel_atoms", None) if isinstance(tensor, torch.Tensor) else None

    def label(self, tensor: torch.Tensor, atoms: np.ndarray, fresh: bool = False) -> torch.Tensor:
        """Attach atoms; `fresh` says that the tensor is a convolution's output before its activation."""
        if tensor.shape[1] != len(atoms):
            raise AssertionError(f"{len(atoms)} atoms for {tensor.shape[1]} channels in {self.where()}")
        tensor._channel_atoms = atoms  # type: ignore[attr-defined]
        tensor._channel_fresh = fresh  # type: ignore[attr-defined]
        return tensor

    def fresh(self, tensor: torch.Tensor) -> bool:
        return bool(getattr(tensor, "_channel_fresh", False))

    def owner_of(self, parameter: Any) -> str | None:
        """Name of the module a weight (or running mean) belongs to."""
        return self._owner.get(id(parameter))

    def where(self) -> str:
        return self.stack[-1] if self.stack else "the model"

    def freeze(self, tensor: Any, operation: str) -> None:
        """Nothing may be removed from this tensor's channels."""
        atoms = self.labels(tensor)
        if atoms is not None:
            self.atoms.freeze(atoms, self.reason(operation))

    def reason(self, operation: str) -> str:
        owner = self.where()
        kind = type(self.modules[owner]).__name__ if owner in self.modules else "model"
        if owner == self.head_prefix or owner.startswith(self.head_prefix + "."):
            head = type(self.modules[self.head_prefix]).__name__
            return f"its output channels have a fixed meaning for the {head} head ({operation})"
        return f"its channels enter `{operation}` in {owner} ({kind}), which needs them all"

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
        finally:
            self.stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _holds_tensor(result):
            return result
        handler = HANDLERS.get(getattr(func, "__name__", "").strip("_"), handle_unlisted)
        handler(self, func, args, kwargs, result)
        return result


def trace(model: nn.Module) -> ChannelTracer:
    """Trace every way in which a task model is run.

    Args:
        model: an Ultralytics task model with the block list `model.model`; it is not touched.

    Raises ModelError, one line, for a network that does not run by itself either.
    """
    given, model = model, copy.deepcopy(model).float().cpu()
    head = f"model.{len(model.model) - 1}"  # type: ignore[arg-type]
    tracer = ChannelTracer(model, head)
    _watch_modules(model, tracer)
    generator = torch.Generator().manual_seed(0)
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    image = torch.rand(2, channels, _TRACE_SIZE, _TRACE_SIZE, generator=generator)
    with torch.no_grad():
        for each in passes_of(model):
            model.train(each.training)
            try:
                with tracer:
                    output = each.run(model, image.clone())
            except Exception:
                _refuse_broken(copy.deepcopy(given).float().cpu().train(each.training), each, image)
                raise
            with tracer.module(head):
                _freeze_outputs(tracer, output)
    return tracer


def _refuse_broken(model: nn.Module, each: Pass, image: torch.Tensor) -> None:
    try:
        each.run(model, image)
    except Exception as error:  # noqa: BLE001  a file's layers may say anything about themselves
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ModelError(f"the network must run on an image of {_TRACE_SIZE} pixels, but it does not ({why})") from None


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
    from pruning.trace_rules import RULES, activation

    for name, module in model.named_modules():
        rule = RULES.get(type(module)) or (activation if is_activation(module) else None)
        inner = module.forward if rule is None else rule(tracer, name, module)
        module.forward = _named_forward(tracer, name, inner)  # type: ignore[method-assign]


def _named_forward(tracer: ChannelTracer, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with tracer.module(name):
            return inner(*args, **kwargs)

    return forward


def _identifying_tensors(module: nn.Module) -> list[torch.Tensor]:
    names = ("weight", "running_mean")
    return [t for n in names if isinstance(t := getattr(module, n, None), torch.Tensor)]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, (list, tuple)) and any(_holds_tensor(v) for v in value)
