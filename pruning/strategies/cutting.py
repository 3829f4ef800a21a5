"""Cutting one module by hand, in place: what surgery does for whole groups, without knowing who else is concerned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def convolution_in(layer: nn.Module) -> Any:
    """The convolution of a layer: the one that an Ultralytics wrapper holds, or the layer itself."""
    return getattr(layer, "conv", None) or getattr(layer, "conv_transpose", None) or layer


@torch.no_grad()
def cut_outputs(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep these output channels of a layer: of its convolution and of the batch norm that its wrapper holds."""
    conv = convolution_in(layer)
    index = torch.tensor(list(kept), device=conv.weight.device)
    conv.weight = _taken(conv.weight, 1 if conv.transposed else 0, index)
    if conv.bias is not None:
        conv.bias = _taken(conv.bias, 0, index)
    conv.out_channels = len(index)
    norm: Any = getattr(layer, "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        norm.weight, norm.bias = (_taken(p, 0, index) for p in (norm.weight, norm.bias))
        for name in ("running_mean", "running_var"):
            setattr(norm, name, getattr(norm, name)[index].clone())
        norm.num_features = len(index)


@torch.no_grad()
def cut_inputs(conv: Any, kept: Sequence[int]) -> None:
    """Keep these input channels of a convolution; one in groups has none of its own in its weights."""
    index = torch.tensor(list(kept), device=conv.weight.device)
    if conv.groups == 1:
        conv.weight = _taken(conv.weight, 0 if conv.transposed else 1, index)
    conv.in_channels = len(index)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`; it takes over what Ultralytics notes on a numbered block."""
    old = model.get_submodule(name)
    for attribute in ("f", "i", "type"):
        if attribute in vars(old):
            setattr(module, attribute, getattr(old, attribute))
    if "np" in vars(old):
        module.np = sum(p.numel() for p in module.parameters())  # type: ignore[assignment]
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _taken(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().index_select(dim, index).clone(), requires_grad=tensor.requires_grad)
