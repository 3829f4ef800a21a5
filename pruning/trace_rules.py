"""Modules whose forward hides a dependency between channels that the functions alone do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules.block import Attention

from pruning.trace import ChannelTracer, ConvTrace
from pruning.trace_labels import Label, State

_QUERIES = "queries and keys keep their width, their product is scaled by it"
Rule = Callable[[ChannelTracer, str, Any], Callable[..., Any]]


def attention(tracer: ChannelTracer, name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`Attention` of YOLOv10/11/26: views the values as (B, C, H, W) with the C of its *input*.

    So the input's channels and the values' (heads x head_dim) leave in the same proportion, and every head loses the
    same number. Queries and keys keep their width: their dot product is scaled by it.
    """
    inner = module.forward
    heads, key, value = module.num_heads, module.key_dim, module.head_dim

    def forward(x: torch.Tensor) -> torch.Tensor:
        atoms = tracer.labels(x, "attention")
        with torch._C.DisableTorchFunction():
            out: torch.Tensor = inner(x)
        out._channel_seen = True  # type: ignore[attr-defined]
        qkv = tracer.conv(f"{name}.qkv.conv", module.qkv.conv.out_channels, atoms, x.shape[1])
        rows = qkv.outputs.reshape(heads, 2 * key + value)
        values = rows[:, 2 * key :]
        tracer.atoms.freeze(rows[:, : 2 * key].ravel(), _QUERIES)
        flat = values.ravel()
        tracer.convs.setdefault(f"{name}.pe.conv", ConvTrace(f"{name}.pe.conv", flat, flat, depthwise=True))
        proj = tracer.conv(f"{name}.proj.conv", module.proj.conv.out_channels, flat, len(flat))
        for part, atoms_of in (("qkv", qkv.outputs), ("pe", flat), ("proj", proj.outputs)):
            if isinstance(getattr(module, part), nn.Module) and hasattr(getattr(module, part), "bn"):
                tracer.norms[f"{name}.{part}.bn"] = atoms_of
        if atoms is None:
            tracer.atoms.freeze(flat, "the attention's input keeps its channels")
        else:
            tracer.ties.append((atoms, flat))
        tracer.pieces.extend(values)
        tracer.ties.extend((values[0], other) for other in values[1:])
        tracer.attributes.append((name, "head_dim", values[0]))
        return tracer.label(out, proj.outputs, fresh=True)

    return forward


def activation(tracer: ChannelTracer, name: str, module: Any) -> Callable[..., Any]:
    """An elementwise module that maps 0 to 0: looked at as a whole, whatever functions it is made of."""
    inner = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        label, version = tracer.label_of(x), x._version
        with torch._C.DisableTorchFunction():
            out: torch.Tensor = inner(x)
        out._channel_seen = True  # type: ignore[attr-defined]
        if label is None or (out is x and x._version == version):  # an identity leaves a convolution's output as it is
            return out
        tracer.put(out, Label(label.atoms, max(label.state, State.ZERO)))
        return out

    return forward


RULES: dict[type, Rule] = {Attention: attention}
