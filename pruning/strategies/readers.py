"""Which convolution alone reads a layer's output, with nothing in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from paretoprune.pruning.graph.layers import LayerTable
from paretoprune.pruning.yolo.loading import input_channels
from paretoprune.pruning.yolo.saving import plain_copy

_PROBE_SIZE = 128  # pixels


def sole_readers(model: nn.Module, table: LayerTable, layers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Convolution -> the convolution that alone reads what it gives.

    The layer table says that no other convolution gives or reads these channels (as a residual sum, a concatenation
    or a second branch would); a forward pass says that the very tensor arrives there unchanged, neither pooled nor
    activated on the way.

    Args:
        layers: (layer, its convolution); the layer's output is what is followed.
    """
    candidates = {conv: reader for _, conv in layers if (reader := _only_reader(model, table, conv)) is not None}
    arrives = _arrivals(model, {layer: conv for layer, conv in layers if conv in candidates}, set(candidates.values()))
    return {conv: reader for conv, reader in candidates.items() if (conv, reader) in arrives}


def _only_reader(model: nn.Module, table: LayerTable, conv: str) -> str | None:
    outputs = table.convs[conv].outputs
    if any(np.isin(outputs, other.outputs).any() for name, other in table.convs.items() if name != conv):
        return None
    if any(np.isin(outputs, classes).any() for classes in (*table.linears.values(), *table.features.values())):
        return None
    readers = [n for n, other in table.convs.items() if n != conv and np.isin(outputs, other.inputs).any()]
    if len(readers) != 1 or not np.array_equal(table.convs[readers[0]].inputs, outputs):
        return None
    reader: Any = model.get_submodule(readers[0])
    plain = type(reader) is nn.Conv2d and reader.groups == 1 and reader.padding_mode == "zeros"
    return readers[0] if plain and isinstance(reader.padding, tuple) else None


def _arrivals(model: nn.Module, layers: dict[str, str], readers: set[str]) -> set[tuple[str, str]]:
    """(convolution, reader) where the layer's output is the reader's input, unwritten since."""
    given: dict[int, tuple[str, torch.Tensor, int]] = {}  # by identity; the tensor is held, so no other takes its place
    found: set[tuple[str, str]] = set()

    def give(conv: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> None:
            given[id(output)] = (conv, output, output._version)

        return hook

    def read(reader: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, inputs: Any) -> None:
            source = given.get(id(inputs[0]))
            if source is not None and source[2] == inputs[0]._version:
                found.add((source[0], reader))

        return hook

    model = plain_copy(model)  # hooks and the head's anchor cache go with the copy
    for layer, conv in layers.items():
        model.get_submodule(layer).register_forward_hook(give(conv))
    for reader in readers:
        model.get_submodule(reader).register_forward_pre_hook(read(reader))
    with torch.no_grad():
        model(torch.zeros(1, input_channels(model), _PROBE_SIZE, _PROBE_SIZE))
    return found
