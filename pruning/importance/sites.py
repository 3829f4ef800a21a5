"""Where a channel's response is read: behind the batch norm and activation of the convolution that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from paretoprune.pruning.graph.layers import LayerTable


@contextmanager
def watch_outputs(model: nn.Module, table: LayerTable, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see(convolution name, response)` for every convolution a forward pass reaches; response (B, out, H, W)."""
    handles = []
    for name in table.convs:
        module = model.get_submodule(table.layer_of[name])

        def hook(_: nn.Module, __: Any, output: torch.Tensor, name: str = name) -> None:
            see(name, output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
