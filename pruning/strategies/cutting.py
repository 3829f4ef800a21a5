"""Cutting one module in place, by torch-pruning's primitives: surgery without knowing who else is concerned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning as tp
from torch import nn


def convolution_in(layer: nn.Module) -> Any:
    """The convolution of a layer: the one that an Ultralytics wrapper holds, or the layer itself."""
    return getattr(layer, "conv", None) or getattr(layer, "conv_transpose", None) or layer


def cut_outputs(layer: nn.Module, kept: Sequence[int]) -> None:
    """Keep these output channels of a layer: of its convolution and of the batch norm that its wrapper holds."""
    conv = convolution_in(layer)
    gone = _others(conv.out_channels, kept)
    tp.prune_conv_out_channels(conv, gone)
    norm: Any = getattr(layer, "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        tp.prune_batchnorm_out_channels(norm, gone)


def cut_inputs(conv: Any, kept: Sequence[int]) -> None:
    """Keep these input channels of a convolution; one in groups has none of its own in its weights."""
    if conv.groups == 1:
        tp.prune_conv_in_channels(conv, _others(conv.in_channels, kept))
    else:
        conv.in_channels = len(kept)


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


def _others(count: int, kept: Sequence[int]) -> list[int]:
    return sorted(set(range(count)) - set(kept))
