"""Linear mappings from the channels of a layer that stay to all it had: solved, inserted, and folded away again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paretoprune.pruning.device import nothing
from paretoprune.pruning.recovery.least_squares import Moments, solve_ridge
from paretoprune.pruning.strategies.cutting import cut_inputs, cut_outputs, replace_module


@dataclass(frozen=True)
class Cut:
    """One layer to be cut and mapped back.

    Attributes:
        layer: its name in the network.
        conv: its convolution's name.
        kept: ascending indices of the output channels that stay.
        channels: all output channels, the mapping's.
        reader: the convolution that the mapping can be folded into, if there is one.
        biased: whether the mapping may add a constant; not where it will be folded into a convolution that pads with
            zeros, since there the constant would be missing at the border.
    """

    layer: str
    conv: str
    kept: tuple[int, ...]
    channels: int
    reader: str | None = None
    biased: bool = True

    @property
    def removed(self) -> list[int]:
        """Ascending indices of the output channels that go."""
        return sorted(set(range(self.channels)) - set(self.kept))


@dataclass(frozen=True)
class Reconstruction:
    """Removed channels as a linear function of the kept ones: weights (removed, kept), constants (removed,)."""

    weights: torch.Tensor
    constants: torch.Tensor


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    cuts: Sequence[Cut],
    images: torch.Tensor,
    positions: int,
    ridge: float,
    seed: int = 0,
    chunk: int = 16,
    pause: Callable[[], None] = nothing,
) -> dict[str, Reconstruction]:
    """Least squares per layer: what the removed channels answer (after activation), from what the kept ones answer.

    Args:
        model: the uncut network, eval mode, on any device.
        images: (N, C, H, W), moved to the model's device chunk by chunk.
        positions: sampled per layer over all images.
        ridge: relative to the mean diagonal of the kept channels' second moments.
        pause: called between two chunks, where others may use the device.
    """
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Moments] = {}

    def see(cut: Cut, output: torch.Tensor) -> None:
        rows = output.permute(0, 2, 3, 1).flatten(0, 2)
        count = max(1, positions * len(output) // len(images))
        rows = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
        x, y = rows[None][:, :, list(cut.kept)], rows[None][:, :, cut.removed]
        if not cut.biased:  # with its mirror image the data has mean zero, so the best constant is zero
            x, y = torch.cat([x, -x], dim=1), torch.cat([y, -y], dim=1)
        if cut.layer not in moments:
            moments[cut.layer] = Moments.about(x, y)
        moments[cut.layer].add(x, y)

    hooks = [
        model.get_submodule(c.layer).register_forward_hook(lambda _, __, output, c=c: see(c, output)) for c in cuts
    ]
    device = next(model.parameters()).device
    try:
        for start in range(0, len(images), chunk):
            pause()
            model(images[start : start + chunk].to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {c.layer: _solved(c, moments[c.layer], ridge) for c in cuts if c.layer in moments}


def _solved(cut: Cut, moments: Moments, ridge: float) -> Reconstruction:
    start = torch.zeros(1, len(cut.kept), len(cut.removed), device=moments.xx.device)
    found = solve_ridge(moments, start, start[:, :1], ridge)
    constants = found.intercept[0, 0] if cut.biased else torch.zeros(len(cut.removed))
    return Reconstruction(found.weights[0].T.float().cpu(), constants.float().cpu())


def insert(model: nn.Module, cut: Cut, found: Reconstruction | None) -> None:
    """Cut the layer in place and put the mapping behind it: `Sequential(layer, 1x1 convolution)`.

    Kept channels pass through as rows of the identity. Without a reconstruction the removed ones are zero.
    """
    layer: Any = model.get_submodule(cut.layer)
    mapping = nn.Conv2d(len(cut.kept), cut.channels, 1, bias=cut.biased)
    with torch.no_grad():
        mapping.weight.zero_()
        mapping.weight[list(cut.kept), range(len(cut.kept)), 0, 0] = 1.0
        if found is not None:
            mapping.weight[cut.removed, :, 0, 0] = found.weights
        if mapping.bias is not None:
            mapping.bias.zero_()
            if found is not None:
                mapping.bias[cut.removed] = found.constants
    cut_outputs(layer, cut.kept)
    replace_module(model, cut.layer, nn.Sequential(layer, mapping).train(layer.training))


def renamed(cuts: Sequence[Cut]) -> dict[str, str]:
    """Names that convolutions have once the mappings are in: `model.3.conv` becomes `model.3.0.conv`."""
    return {c.conv: f"{c.layer}.0{c.conv[len(c.layer) :]}" for c in cuts}


@torch.no_grad()
def fold(model: nn.Module, cuts: Sequence[Cut], names: Mapping[str, str]) -> list[str]:
    """Multiply mappings into the convolutions that alone read them, in place, and take them out.

    Exact: the reader's weights become W M, and a constant b of the mapping becomes W b in the reader's bias or batch
    norm. The constant is there only where the reader pads nothing.

    Args:
        cuts: in execution order, so that a reader's own mapping is still there when its turn as a reader comes.
        names: the convolutions' present names (see `renamed`).

    Returns:
        The layers whose mapping is gone.
    """
    folded = []
    for cut in cuts:
        if cut.reader is None:
            continue
        pair: Any = model.get_submodule(cut.layer)
        reader_name = names.get(cut.reader, cut.reader)
        _absorb(pair[1], model, reader_name)
        replace_module(model, cut.layer, pair[0])
        folded.append(cut.layer)
    return folded


def _absorb(mapping: nn.Conv2d, model: nn.Module, reader_name: str) -> None:
    reader: Any = model.get_submodule(reader_name)
    weight = reader.weight.double()
    matrix = mapping.weight[:, :, 0, 0].double()  # (channels, kept)
    cut_inputs(reader, range(mapping.in_channels))  # for the shapes; the weights follow
    reader.weight.copy_(torch.einsum("ochw,ck->okhw", weight, matrix))
    if mapping.bias is None:
        return
    shift = (weight.sum(dim=(2, 3)) @ mapping.bias.double()).to(reader.weight.dtype)
    if reader.bias is not None:
        reader.bias += shift
    else:
        norm: Any = model.get_submodule(reader_name.rpartition(".")[0]).bn
        norm.running_mean -= shift
