"""Copying a network with some of its tensors replaced by narrower ones.

`copy.deepcopy` would copy weights that are cut right afterwards, and spends most of its time on the hundreds of small
dictionaries of a network's modules; a sweep prunes one baseline thousands of times.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import nn

# Immutable: the copy may hold the same object.
_SHARED = frozenset(
    {type(None), bool, int, float, str, bytes, type, types.FunctionType, torch.Size, torch.dtype, torch.device}
)
_CONTAINERS = frozenset({dict, OrderedDict, set})


class Narrowed:
    """The tensors that a network's narrower copy gets, and the sizes its modules state. The network is not touched."""

    def __init__(self) -> None:
        self._replaced: dict[int, Any] = {}  # by the identity of what they replace, as a memo of deepcopy
        self._sizes: list[tuple[nn.Module, dict[str, int]]] = []

    def conv(self, conv: Any, outputs: torch.Tensor | None, inputs: torch.Tensor | None, depthwise: bool) -> None:
        """Keep these output and input channels (indices; None: all) of a convolution, transposed or not."""
        self._replace(conv.weight, *((inputs, outputs) if conv.transposed else (outputs, inputs)))
        self._replace(conv.bias, outputs)
        sizes = {} if outputs is None else {"out_channels": len(outputs)}
        if depthwise:
            sizes["in_channels"] = sizes["groups"] = sizes["out_channels"]
        elif inputs is not None:
            sizes["in_channels"] = len(inputs)
        self._sizes.append((conv, sizes))

    def norm(self, norm: Any, channels: torch.Tensor) -> None:
        """Keep these channels of a batch norm."""
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            self._replace(tensor, channels)
        self._sizes.append((norm, {"num_features": len(channels)}))

    def linear(self, linear: Any, outputs: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
        """Keep these outputs and inputs of a linear layer (None: all)."""
        self._replace(linear.weight, outputs, inputs)
        self._replace(linear.bias, outputs)
        sizes = {} if outputs is None else {"out_features": len(outputs)}
        self._sizes.append((linear, sizes if inputs is None else sizes | {"in_features": len(inputs)}))

    def vector(self, tensor: torch.Tensor, channels: torch.Tensor, dim: int) -> None:
        """Keep these channels of a parameter or buffer that has them along one dimension."""
        self._replace(tensor, *(*(None,) * dim, channels))

    def scale(self, module: Any, rows: np.ndarray, factor: float) -> None:
        """Multiply these of the outputs that a batch norm or linear layer keeps."""
        for tensor in (module.weight, module.bias):
            self._replaced[id(tensor)][torch.from_numpy(rows)] *= factor

    def attribute(self, module: nn.Module, name: str, value: int) -> None:
        """Set an attribute by which a module's forward pass knows a width."""
        self._sizes.append((module, {name: value}))

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A copy of the model, independent of it, with the narrower tensors in place."""
        memo = dict(self._replaced)
        copied = clone(model, memo)
        for module, sizes in self._sizes:
            vars(memo[id(module)]).update(sizes)
        return copied

    def _replace(self, tensor: torch.Tensor | None, *kept: torch.Tensor | None) -> None:
        """Cut a tensor to what is kept along its first dimensions (None: all)."""
        if tensor is None or all(indices is None for indices in kept):
            return
        cut = tensor
        for dim, indices in enumerate(kept):
            cut = cut if indices is None else cut.index_select(dim, indices)
        is_parameter = type(tensor) is nn.Parameter  # `isinstance` takes as long as the cut
        self._replaced[id(tensor)] = nn.Parameter(cut.detach(), tensor.requires_grad) if is_parameter else cut


def clone(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy(model, memo)` gives, several times faster; `memo` ends up holding every module's copy.

    Gradients are left behind.
    """
    modules = list(model.modules())
    if any(_has_its_own_way(kind) for kind in {type(m) for m in modules}):
        return copy.deepcopy(model, memo)
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(modules):  # children first: a `__setstate__` may look at them
        state = {}
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _SHARED:
                state[key] = value
            elif kind in _CONTAINERS and not value:  # a module has ten of these
                state[key] = kind()
            else:
                state[key] = _copied(value, memo)
        state.pop("_compiled_call_impl", None)
        memo[id(module)].__setstate__(state)
    found: nn.Module = memo[id(model)]
    return found


def _has_its_own_way(kind: type) -> bool:
    """Whether a class copies otherwise than `nn.Module` does (its `__getstate__` is what `clone` does itself)."""
    special = ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__", "__slots__")
    return any(name in vars(base) for base in kind.__mro__ if base not in (nn.Module, object) for name in special)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _SHARED or (kind is tuple and _SHARED.issuperset(map(type, value))):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is torch.Tensor:
        memo[id(value)] = value.detach().clone()
    elif kind is nn.Parameter:
        memo[id(value)] = nn.Parameter(value.detach().clone(), value.requires_grad)
    elif kind is dict or kind is OrderedDict:
        memo[id(value)] = kind((k, _copied(v, memo)) for k, v in value.items())
    else:
        return copy.deepcopy(value, memo)
    return memo[id(value)]
