"""Modules whose forward hides a dependency between channels that the functions alone do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.nn.modules.block import SAVPE, AAttn, Attention, MaxSigmoidAttnBlock

from paretoprune.pruning.graph.labels import FIXED, Label, State
from paretoprune.pruning.graph.tracer import ChannelTracer, ConvTrace

_QUERIES = "queries and keys keep their width, their product is scaled by it"
_MERGED = "its norm is merged into it, which would have to take back the attention's scale"
_PROMPTS = "prompt embeddings keep their width"
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


def area_attention(tracer: ChannelTracer, name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """`AAttn` of YOLO12: queries, keys and values share one `head_dim`, which also scales the product of the first two.

    A query's channel leaves with the key's that it meets, and all heads lose the same number of both and of values. The
    scale grows as `head_dim` shrinks: the norm behind queries and keys takes that back, the fourth root in each.
    """
    inner = module.forward
    heads, width = module.num_heads, module.head_dim

    def forward(x: torch.Tensor) -> torch.Tensor:
        atoms = tracer.labels(x, "attention")
        with torch._C.DisableTorchFunction():
            out: torch.Tensor = inner(x)
        out._channel_seen = True  # type: ignore[attr-defined]
        qkv = tracer.conv(f"{name}.qkv.conv", module.qkv.conv.out_channels, atoms, x.shape[1])
        queries, keys, values = qkv.outputs.reshape(heads, 3, width).swapaxes(0, 1)
        tracer.atoms.couple(queries.ravel(), keys.ravel(), "")
        flat = values.ravel()
        tracer.convs.setdefault(f"{name}.pe.conv", ConvTrace(f"{name}.pe.conv", flat, flat, depthwise=True))
        proj = tracer.conv(f"{name}.proj.conv", module.proj.conv.out_channels, flat, len(flat))
        for part, atoms_of in (("qkv", qkv.outputs), ("pe", flat), ("proj", proj.outputs)):
            if hasattr(getattr(module, part), "bn"):
                tracer.norms[f"{name}.{part}.bn"] = atoms_of
        if hasattr(module.qkv, "bn"):
            tracer.scalings.append((f"{name}.qkv.bn", queries.ravel(), queries[0], 0.25))
        else:
            tracer.atoms.freeze(qkv.outputs, _MERGED)
        pieces = [*queries, *values]
        tracer.pieces.extend(pieces)
        tracer.ties.extend((pieces[0], other) for other in pieces[1:])
        tracer.attributes.extend([(name, "head_dim", queries[0]), (name, "all_head_dim", flat)])
        return tracer.label(out, proj.outputs, fresh=True)

    return forward


def guided_attention(tracer: ChannelTracer, name: str, module: Any) -> Callable[..., torch.Tensor]:
    """`MaxSigmoidAttnBlock` of YOLO-World: each head's gate is the product of its channels and as many of a guide.

    A channel leaves with the guide's that it meets, and every head loses the same number, of the channels it reads as
    of the gated ones. The gate is divided by the root of the heads' width, which the guide's linear layer takes back.
    """
    inner, heads = module.forward, module.nh
    if module.ec is not None:  # in no stock model: its channels are embedded first
        return inner  # type: ignore[no-any-return]

    def by_head(atoms: np.ndarray) -> list[np.ndarray]:
        pieces = list(atoms.reshape(heads, -1))
        tracer.pieces.extend(pieces)
        tracer.ties.extend((pieces[0], other) for other in pieces[1:])
        return pieces

    def forward(x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        atoms = tracer.labels(x, "attention")
        with torch._C.DisableTorchFunction():
            out: torch.Tensor = inner(x, guide)
        out._channel_seen = True  # type: ignore[attr-defined]
        tracer.freeze(guide, "attention")
        if atoms is not None:
            tracer.linears[f"{name}.gl"] = np.full(module.gl.in_features, FIXED)
            tracer.features[f"{name}.gl"] = atoms
            first = by_head(atoms)[0]
            tracer.scalings.append((f"{name}.gl", atoms, first, 0.5))
            tracer.attributes.append((name, "hc", first))
        gated = tracer.conv(f"{name}.proj_conv.conv", module.proj_conv.conv.out_channels, atoms, x.shape[1]).outputs
        if hasattr(module.proj_conv, "bn"):
            tracer.norms[f"{name}.proj_conv.bn"] = gated
        by_head(gated)
        return tracer.label(out, gated)

    return forward


def visual_prompts(tracer: ChannelTracer, name: str, module: Any) -> Callable[..., Any]:
    """`SAVPE` of YOLOE: its last convolutions' outputs are viewed by stored widths, the embedding's and its pieces'."""
    inner = module.forward

    def forward(*args: Any) -> Any:
        out = inner(*args)
        for part in ("cv3", "cv4", "cv5", "cv6.0.conv", "cv6.1"):
            tracer.atoms.freeze(tracer.convs[f"{name}.{part}"].outputs, _PROMPTS)
        return out

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


RULES: dict[type, Rule] = {
    Attention: attention,
    AAttn: area_attention,
    MaxSigmoidAttnBlock: guided_attention,
    SAVPE: visual_prompts,
}
