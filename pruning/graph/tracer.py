"""What a trace knows of a network's channels: the state that handlers of functions and modules read and write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from paretoprune.pruning.graph.labels import FIXED, Atoms, Label, State


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


Calling = Callable[["ChannelTracer", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class ChannelTracer(TorchFunctionMode):
    """Runs one forward pass and collects what happened to the channels. Not reusable across models."""

    def __init__(self, model: nn.Module, head_prefix: str, call: Calling) -> None:
        """`call`: runs a function and notes what it did to the channels (see `operations.call`)."""
        super().__init__()
        self._call = call
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
        return self._call(self, func, args, kwargs or {})


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
